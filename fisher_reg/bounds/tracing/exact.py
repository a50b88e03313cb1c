"""A network in exact arithmetic, approximated by double precision: no value is rounded to a narrower type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
}
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NARROW_NAMES = ("torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor")


class ExactArithmetic(TorchFunctionMode):
    """Computes every floating-point value in float64, also if the network casts to a narrower type.

    A cast between floating-point types is the identity in exact arithmetic. Weights and inputs must be float64.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer one call."""
        function = _CASTS.get(function, function)
        args = tuple(_wide(item) for item in args)
        named = {key: _wide(item) for key, item in (kwargs or {}).items()}
        return widened(function(*args, **named))


def _wide(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return torch.float64 if argument in _NARROW else argument
    return "torch.DoubleTensor" if isinstance(argument, str) and argument in _NARROW_NAMES else argument


def widened(value: Any) -> Any:
    """Return a tensor, or the tensors of a tuple or list, with narrower floating-point types converted to float64."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _NARROW else value
    if type(value) in (tuple, list):
        return type(value)(widened(item) for item in value)
    return value
