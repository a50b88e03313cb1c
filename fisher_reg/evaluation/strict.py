"""Strict float32: no TensorFloat-32 and no bfloat16 in matrix products and convolutions.

By default torch computes float32 convolutions on a GPU in TensorFloat-32, and optionally also matrix products (on a CPU
in bfloat16, with ``set_float32_matmul_precision("medium")``). The mantissa then has ten bits, the derivative has a
relative error of about 1e-3, and a difference quotient over a step of half the digits is only rounding error. A strict
pass gives the numbers of the CPU and may use difference quotients, which cost one forward, instead of dual numbers,
which cost about three. Convolutions are slower in it; ``recipes.gpu_check`` measures by how much.

These are settings of torch for the whole process: other threads are also strict while a block is open. On a GPU
``torch.backends.cudnn.flags()`` raises an error in a block, since it does not support settings of single operations.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from fisher_reg.evaluation.process_wide import ProcessWide

_C: Any = torch._C  # torch.backends.mkldnn.fp32_precision of torch 2.14 reads and writes different settings
_HAS_OPERATIONS = hasattr(_C, "_get_fp32_precision_getter")  # torch 2.9
_BACKENDS = (("cuda", "all"), ("mkldnn", "all"))
_CUDNN = (("cuda", "conv"), ("cuda", "rnn"))
_OPERATIONS = (*_CUDNN, ("cuda", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"), ("mkldnn", "matmul"))
_REDUCED = ("tf32", "bf16")


@contextmanager
def strict_by_operation() -> Generator[None, None, None]:
    """Change the settings of each operation, of torch 2.9 and later.

    An operation without its own setting inherits that of its backend, and a backend that of
    ``torch.backends.fp32_precision``. A getter does not show whether a setting is inherited, and an operation that has
    been set never inherits again. Therefore the general settings are changed first, and then those that do not follow.
    """
    with ExitStack() as stack:
        found = [(backend, _get(backend)) for backend in _BACKENDS]
        _change(stack, ("generic", "all"), _get(("generic", "all")))
        for backend, precision in found:
            if precision != "ieee":  # an operation that is strict now inherits the general setting
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
    """Change the CPU settings only if a program has reduced the precision, which is not the default."""
    if _HAS_OPERATIONS:
        is_reduced = any(_get(operation) in _REDUCED for operation in _OPERATIONS if operation[0] == "mkldnn")
    else:
        is_reduced = torch.get_float32_matmul_precision() != "highest"
    with strict_everywhere() if is_reduced else nullcontext():
        yield


strict_everywhere = strict_by_operation if _HAS_OPERATIONS else strict_by_flags
_ON_CPU, _EVERYWHERE = ProcessWide(strict_on_cpu), ProcessWide(strict_everywhere)


def strictly(device: torch.device) -> ProcessWide:
    """Compute float32 strictly on a device during the block, and restore the settings afterwards."""
    return _ON_CPU if device.type == "cpu" else _EVERYWHERE


def _get(setting: tuple[str, str]) -> str:
    precision: str = _C._get_fp32_precision_getter(*setting)
    return precision


def _change(stack: ExitStack, setting: tuple[str, str], found: str) -> None:
    stack.callback(_C._set_fp32_precision_setter, setting[0], setting[1], found)
    _C._set_fp32_precision_setter(*setting, "ieee")


def _clear_flag_of_cudnn(stack: ExitStack) -> None:
    # torch.backends.cudnn.flags, which a model may open, reads the flag and raises an error if the operations differ
    # from it. If a program has set operations itself, the flag is not changed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 warns once that the flag is deprecated
        try:
            is_allowed = _C._get_cudnn_allow_tf32()
        except RuntimeError:
            return
        if is_allowed:
            stack.callback(_C._set_cudnn_allow_tf32, True)
            _C._set_cudnn_allow_tf32(False)
