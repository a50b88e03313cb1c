"""What a call may not change: all that a model holds, down to single numbers and identities, and the process itself."""

from __future__ import annotations

import functools
import io
import random
import re
import threading
import types
import warnings
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_file
from torch.nn.utils import parametrize

State = dict[str, Any]
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, np.generic)
_OPAQUE = (
    "torch._",
    "torch.fx",
    "torch.jit",
    "torch.export",
    "torch.utils",
    "torch.distributed",
    "lightning",
    "pytorch_",
)
"""Where the objects come from that are told apart by identity alone."""


class _Same:
    """Equal to nothing but the same object, which it keeps alive so that no identity is used twice."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):x}>"


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)  # torch 2.6 has none


def state_of(model: Any) -> State:
    """Describe whatever can be reached from a model, by the path that leads there."""
    state: State = {}
    _describe("model", model, state, set())
    if isinstance(model, nn.Module):
        for name, value in model.state_dict().items():
            state[f"state_dict {name}"] = _bytes(value) if isinstance(value, Tensor) else repr(value)
        for kind in dict.fromkeys(kind for part in model.modules() for kind in type(part).__mro__[:-1]):
            for name, member in list(vars(kind).items()):
                state[f"class {kind.__qualname__}.{name}"] = _Same(member)
    return state


def state_of_the_process() -> State:
    """Describe the random generators and the settings that are no model's."""
    stance = getattr(torch._dynamo.eval_frame, "_stance", None)
    hooks = {name: len(value) for name, value in vars(module_file).items() if name.startswith("_global_") and value}
    state = {
        "torch's random numbers": _bytes(torch.get_rng_state()),
        "python's random numbers": random.getstate(),
        "numpy's random numbers": repr(np.random.get_state()),
        "numpy's key": np.random.get_state()[1].tobytes(),
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "kernels of attention": tuple(
            getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()
            for kind in ("flash", "mem_efficient", "math", "cudnn")
        ),
        "oneDNN": torch.backends.mkldnn.enabled,
        "cuDNN": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "TensorFloat-32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
            for device in ("cpu", "cuda")
        ],
        "default type": (torch.get_default_dtype(), torch.get_default_device()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "threads of torch": torch.get_num_threads(),
        "stance of the compiler": repr(stance),
        "hooks of all modules": hooks,
        "modes of torch functions": torch._C._len_torch_function_stack(),
        "modes of dispatch": torch._C._len_torch_dispatch_stack(),
        "hooks of saved tensors": _top_hooks(True),
        "level of forward mode": torch.autograd.forward_ad._current_level,
        "cache of parametrizations": (parametrize._cache_enabled, len(parametrize._cache)),
        "filters of warnings": list(warnings.filters),
        "threads": [
            thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"
        ],  # of progress bars
    }
    for owner in (nn.Module, Tensor, torch, nn.functional):
        for name in ("__call__", "__getattr__", "__setattr__", "batch_norm", "scaled_dot_product_attention", "dropout"):
            state[f"{owner.__name__}.{name}"] = _Same(vars(owner).get(name))
    return state


def changes(before: State, after: State) -> list[str]:
    """Return what is not as it was, in words."""
    missing = "nothing"
    return [
        f"{path}: {str(before.get(path, missing))[:80]} -> {str(after.get(path, missing))[:80]}"
        for path in dict.fromkeys((*before, *after))
        if path not in before or path not in after or before[path] != after[path]
    ]


def form_of(model: Any) -> State:
    """Describe a model without the identities: two that went through the same have the same form."""
    return {
        re.sub(r"hooks\.\[\d+\]", "hooks.[]", path): _without_identity(value)
        for path, value in state_of(model).items()
        if not path.endswith((".memory", "hooks.keys"))
    }


def reached_from(model: Any) -> set[int]:
    """Return the identities of all tensors and modules that can be reached from a model."""
    found = {
        id(value.value) for value in state_of(model).values() if isinstance(value, _Same) and _is_part(value.value)
    }
    assert id(model) in found
    return found


def _is_part(value: Any) -> bool:
    return isinstance(value, Tensor | nn.Module)


def _without_identity(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_without_identity(item) for item in value)
    return type(value.value).__name__ if isinstance(value, _Same) else value


def _describe(path: str, value: Any, state: State, seen: set[int]) -> None:
    if isinstance(value, _PLAIN):
        state[path] = (type(value).__name__, repr(value))
        return
    if isinstance(value, types.MethodType | types.BuiltinMethodType):  # made anew at each look
        state[path] = (value.__name__, _Same(value.__self__), _Same(getattr(value, "__func__", None)))
        _describe(f"{path}.__self__", value.__self__, state, seen)
        return
    state[path] = _Same(value)
    if id(value) in seen:
        return
    seen.add(id(value))
    for name, item in _inside(value).items():
        _describe(f"{path}.{name}", item, state, seen)


def _inside(value: Any) -> dict[str, Any]:
    """Return what a thing consists of, by names."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, torch.jit.ScriptModule):
        parts = {name: part for name, part in value.named_children()}
        tensors = dict(value.named_parameters(recurse=False)) | dict(value.named_buffers(recurse=False))
        return {"training": getattr(value, "training", None), "keys": repr(sorted(vars(value))), **parts, **tensors}
    if isinstance(value, nn.Module):
        return {"kind": type(value), "keys": repr(list(vars(value))), **vars(value)}
    if isinstance(value, torch.Generator):
        return {"numbers": _bytes(value.get_state())}
    if isinstance(value, random.Random):
        return {"numbers": repr(value.getstate())}
    if isinstance(value, np.random.Generator):
        return {"numbers": repr(value.bit_generator.state)}
    if isinstance(value, np.random.RandomState):
        return {"numbers": repr(value.get_state()), "key": value.get_state()[1].tobytes()}
    if isinstance(value, np.ndarray):
        return {"numbers": value.tobytes(), "shape": repr(value.shape)}
    if isinstance(value, io.IOBase):
        return {"is closed": value.closed, "place": None if value.closed else value.tell()}
    if isinstance(value, _LOCKS):
        return {"lock": repr(value).split(" at ")[0]}
    if isinstance(value, weakref.ref):
        return {"target": value()}
    return _of_container(value) | _of_function(value) | _of_object(value)


def _of_tensor(tensor: Tensor) -> dict[str, Any]:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return {}
    return {
        "numbers": _bytes(tensor),
        "kind": repr((tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, tensor.is_leaf)),
        "memory": tensor.data_ptr(),
        "version": None if tensor.is_inference() else tensor._version,
        "graph": tensor.grad_fn if tensor.is_leaf else repr(tensor.grad_fn),
        "grad": tensor.grad if tensor.is_leaf else None,
        "hooks": len(tensor._backward_hooks or ()),
        **vars(tensor),
    }


def _of_container(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"keys": repr(list(value)), **{f"[{key!r}]": item for key, item in value.items()}}
    if isinstance(value, list | tuple | deque):
        return {"length": len(value), **{f"[{index}]": item for index, item in enumerate(value)}}
    return {"items": repr(sorted(map(repr, value)))} if isinstance(value, set | frozenset) else {}


def _of_function(value: Any) -> dict[str, Any]:
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if not isinstance(value, types.FunctionType):
        return {}
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    held = {f"cell {name}": cell.cell_contents for name, cell in cells}
    return {"code": repr(value.__code__), "defaults": value.__defaults__, **held, **vars(value)}


def _of_object(value: Any) -> dict[str, Any]:
    is_opaque = isinstance(value, type | types.ModuleType) or type(value).__module__.startswith(_OPAQUE)
    return {} if is_opaque or isinstance(value, types.FunctionType) else dict(getattr(value, "__dict__", {}))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
