"""Which tensors and generators an operation of the simulated device may have among its arguments."""

from __future__ import annotations

_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")


def refuse(name, args, on_device, on_cpu):
    """Refuse what a CUDA device refuses: tensors of the CPU, but for numbers, copies, and indices.

    Args:
        name: Of the operation.
        args: Its positional arguments.
        on_device: All tensors of the device among its arguments.
        on_cpu: All others.

    Raises:
        RuntimeError: With the operation and the shapes.
    """
    if name == "aten::copy_" or not on_cpu:
        return
    if name in _INDEXING and any(args[0] is tensor for tensor in on_device):
        on_cpu = [tensor for tensor in on_cpu if not any(tensor is index for index in args[1])]
    writes_to_cpu = name.endswith("_") and any(args[0] is tensor for tensor in on_cpu)
    if writes_to_cpu or any(tensor.dim() for tensor in on_cpu):
        shapes = [tuple(tensor.shape) for tensor in on_device], [tuple(tensor.shape) for tensor in on_cpu]
        raise RuntimeError(f"{name} mixes the device, with shapes {shapes[0]}, and the CPU, with shapes {shapes[1]}.")


def refuse_generators(name, places, device_type):
    """Refuse a generator of another device than the operation draws on.

    Args:
        name: Of the operation.
        places: Devices of the generators among its arguments.
        device_type: On which it draws.

    Raises:
        RuntimeError: With the operation.
    """
    for place in places:
        if place.type != device_type:
            raise RuntimeError(f"{name} draws on {device_type} from a generator of {place}.")
