"""Strict float32: no TensorFloat-32 and no bfloat16 inside multiplications and convolutions.

By default torch computes float32 convolutions on a GPU in TensorFloat-32, and matrix products only on request (on a CPU
in bfloat16, with ``set_float32_matmul_precision("medium")``). TensorFloat-32 has ten bits. The derivative of a rounded
function has an error of about 1e-3, and a difference quotient over a step of half the digits is only noise. A strict
pass gives the numbers of the CPU. It may use difference quotients, which cost one forward each, in place of dual
numbers, which cost about three. Convolutions are slower; ``recipes.gpu_check`` measures by how much.

The settings are torch's and hold for the whole process: other threads also compute strictly while a block is open. On a
GPU ``torch.backends.cudnn.flags()`` raises in a block, with torch's default settings: it does not accept settings of
single operations.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from fisher_reg.evaluation.process_wide import ProcessWide

_C: Any = torch._C  # torch.backends.mkldnn.fp32_precision of torch 2.14 sets another setting than it gets
_HAS_OPERATIONS = hasattr(_C, "_get_fp32_precision_getter")  # torch 2.9
_BACKENDS = (("cuda", "all"), ("mkldnn", "all"))
_CUDNN = (("cuda", "conv"), ("cuda", "rnn"))
_OPERATIONS = (*_CUDNN, ("cuda", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"), ("mkldnn", "matmul"))
_REDUCED = ("tf32", "bf16")


@contextmanager
def strict_by_operation() -> Generator[None, None, None]:
    """Change the settings of each operation, of torch 2.9 and later.

    An operation without its own setting follows its backend, and that follows ``torch.backends.fp32_precision``. A
    getter does not show which is the case, and an operation that has been set never follows again. So the general
    settings are changed first, and then those of the operations that do not follow them.
    """
    with ExitStack() as stack:
        found = [(backend, _get(backend)) for backend in _BACKENDS]
        _change(stack, ("generic", "all"), _get(("generic", "all")))
        for backend, precision in found:
            if precision != "ieee":  # one that is strict now followed the general setting
                _change(stack, backend, precision if _get(backend) in _REDUCED else "none")
        if all(_get(operation) == "tf32" for operation in _CUDNN):
            _clear_flag_of_cudnn(stack)
        for operation in _OPERATIONS:
            if _get(operation) in _REDUCED:
                _change(stack, operation, _get(operation))
        yield


@contextmanager
def strict_by_flags() -> Generator[None, None, None]:
    """Change the two flags of torch before 2.9."""
    with ExitStack() as stack:
        precision = torch.get_float32_matmul_precision()
        if precision != "highest":
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        _clear_flag_of_cudnn(stack)
        yield


@contextmanager
def strict_on_cpu() -> Generator[None, None, None]:
    """Change something only if a program has asked for less than float32 on a CPU, which is not the default."""
    if _HAS_OPERATIONS:
        is_reduced = any(_get(operation) in _REDUCED for operation in _OPERATIONS if operation[0] == "mkldnn")
    else:
        is_reduced = torch.get_float32_matmul_precision() != "highest"
    with strict_everywhere() if is_reduced else nullcontext():
        yield


strict_everywhere = strict_by_operation if _HAS_OPERATIONS else strict_by_flags
_ON_CPU, _EVERYWHERE = ProcessWide(strict_on_cpu), ProcessWide(strict_everywhere)


def strictly(device: torch.device) -> ProcessWide:
    """Compute float32 in strict float32 on a device during the block, and restore the settings after it."""
    return _ON_CPU if device.type == "cpu" else _EVERYWHERE


def _get(setting: tuple[str, str]) -> str:
    precision: str = _C._get_fp32_precision_getter(*setting)
    return precision


def _change(stack: ExitStack, setting: tuple[str, str], found: str) -> None:
    stack.callback(_C._set_fp32_precision_setter, setting[0], setting[1], found)
    _C._set_fp32_precision_setter(*setting, "ieee")


def _clear_flag_of_cudnn(stack: ExitStack) -> None:
    # torch.backends.cudnn.flags, which a model may open, reads the flag, and raises if the operations differ from it.
    # It already raises in a program that has set them one by one: then the flag is not changed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 warns once that the flag is deprecated
        try:
            is_allowed = _C._get_cudnn_allow_tf32()
        except RuntimeError:
            return
        if is_allowed:
            stack.callback(_C._set_cudnn_allow_tf32, True)
            _C._set_cudnn_allow_tf32(False)
