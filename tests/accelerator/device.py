"""The simulated device ``acc:0``: importing this module registers it in the process.

A tensor of the device is an :class:`AcceleratorTensor`, a wrapper that says ``acc:0`` and holds a tensor of the CPU. An
operation that has one among its arguments is computed on what they hold. Operations that make a tensor there from none,
such as ``torch.zeros(3, device="acc")``, are kernels of the backend, and do the same.
"""

from __future__ import annotations

import functools
import types

import torch

from tests.accelerator import mixing
from tests.accelerator.kernels import KERNELS
from tests.accelerator.waits import count_wait

NAME = "acc"

_PlainGenerator = torch.Generator


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return True

    def is_built(self):
        return True

    def has_primary_context(self, device_index):
        return True


def _device_module():
    """Return what becomes ``torch.acc``; the global generator of the device is that of the CPU."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.current_device, module.device_count = lambda: 0, lambda: 1
    module.set_device, module.synchronize = lambda device: None, lambda device=None: None
    module.manual_seed_all = lambda seed: None  # torch.manual_seed seeds that of the CPU itself
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


class Generator(torch.Generator):
    """A generator that knows its device, and gives other numbers there than on the CPU, as that of CUDA does.

    Torch lets no backend in Python have generators: behind it is one of the CPU.
    """

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        _PLACES[generator._cdata] = torch.device(device)
        return generator

    @property
    def device(self):
        return _place_of(self)

    def manual_seed(self, seed):
        super().manual_seed(seed if self.device.type == "cpu" else seed + 1)
        return self


_PLACES = {}  # by the address of what is behind a generator, since an operation gets another object for it


def _place_of(generator):
    return _PLACES.get(generator._cdata, torch.device("cpu"))


class AcceleratorTensor(torch.Tensor):
    """A tensor of the device.

    Args:
        inner: What it holds, on the CPU.
    """

    @staticmethod
    def __new__(cls, inner):
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        # a view of a tensor from outside of inference mode is no tensor of inference mode
        with torch.inference_mode(inner.is_inference()):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, device=DEVICE, requires_grad=False, **options
            )
        tensor.inner = inner
        return tensor

    def __repr__(self):
        return f"AcceleratorTensor({self.inner})"

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self):
        return self.cpu().tolist()  # torch refuses it for a class of tensors

    # a function of torch is not answered as a whole, but each of the operations that it consists of
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


def _run(operation, args, kwargs):
    """Answer one operation, with the checks of a device and the count of its waits."""
    if _is_composed(operation):
        return operation.decompose(*args, **kwargs)  # inference mode hands it on as a whole
    name, wanted = operation._schema.name, kwargs.get("device")
    leaves = [*_leaves(args), *_leaves(kwargs.values())]
    on_device = [leaf for leaf in leaves if isinstance(leaf, AcceleratorTensor)]
    on_cpu = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, AcceleratorTensor)]
    goes_to_device = bool(on_device) if wanted is None else torch.device(wanted).type == NAME
    if on_device:
        mixing.refuse(name, args, on_device, on_cpu)
        count_wait(name, args, kwargs, lambda value: isinstance(value, AcceleratorTensor))
    if goes_to_device:
        mixing.refuse_generators(name, [_place_of(leaf) for leaf in leaves if isinstance(leaf, _PlainGenerator)], NAME)
    plain = {key: _mapped(_inner, value) for key, value in kwargs.items()}
    if wanted is not None:
        plain["device"] = torch.device("cpu")
    result = KERNELS.get(name, operation)(*_mapped(_inner, args), **plain)
    known = {id(_inner(leaf)): leaf for leaf in (*on_device, *on_cpu)}
    return _mapped(lambda value: _outer(value, known, goes_to_device), result)


@functools.cache
def _is_composed(operation):
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd")


def _leaves(values):
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _mapped(function, value):
    """Apply a function to what lists and tuples hold."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, part) for part in value])
    return function(value)


def _inner(value):
    return value.inner if isinstance(value, AcceleratorTensor) else value


def _outer(value, known, goes_to_device):
    """Return a result; an argument that was written to in place is the result itself."""
    if not isinstance(value, torch.Tensor):
        return value
    outer = known.get(id(value))
    if outer is None:
        return AcceleratorTensor(value) if goes_to_device else value
    if (outer.shape, outer.stride()) != (value.shape, value.stride()):
        outer.data = AcceleratorTensor(value)
    return outer


def _register():
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    kept = _Hooks(), _Guard(), torch.library.Library("aten", "IMPL")
    torch._C._acc.register_python_privateuseone_hook(kept[0])
    torch._C._acc.register_python_privateuseone_device_guard(kept[1])
    for operation in _factories():
        kept[2].impl(
            operation.name(), lambda *args, _made=operation, **kwargs: _run(_made, args, kwargs), "PrivateUse1"
        )
    kept[2].impl("_copy_from", _copy_from, "PrivateUse1")
    torch.Generator = Generator
    return kept


def _copy_from(source, target, non_blocking=False):
    """Copy for ``torch.tensor``, which passes by the class of a tensor."""
    _inner(target).copy_(_inner(source))
    return target


def _factories():
    """Yield the operations that make a tensor on a device from none."""
    for name in torch._C._dispatch_get_all_op_names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        if name.startswith("aten::") and hasattr(torch.ops.aten, packet):
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
            if operation is not None and _is_factory(operation):
                yield operation


def _is_factory(operation):
    arguments = operation._schema.arguments
    takes_device = any(argument.name == "device" for argument in arguments)
    takes_tensor = any("Tensor" in str(argument.type) for argument in arguments)
    return takes_device and not takes_tensor and not _is_composed(operation)


_KEPT = _register()  # torch holds no reference to them
DEVICE = torch.device(NAME, 0)
