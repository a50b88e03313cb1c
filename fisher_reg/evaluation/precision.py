"""Full precision inside a forward, since derivatives of rounded values are dominated by rounding errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisher_reg.evaluation.rules import Rule, Rules

HALF = (torch.float16, torch.bfloat16)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a half precision, else ``dtype``."""
    return torch.float32 if dtype in HALF else dtype


class FullPrecision(Rules):
    """Rules that undo autocast, and casts to half precision, inside a forward.

    Args:
        rules: More rules, as in :class:`Rules`.
        needs_graph: As in :class:`Rules`.
        device_type: The device type whose autocast is undone.
        undoes_casts: Whether casts are undone, for a module whose weights have also been promoted.

    Attributes:
        saw_half: Whether a call still returned half precision.
    """

    def __init__(
        self, rules: dict[Any, Rule], needs_graph: bool = False, *, device_type: str, undoes_casts: bool
    ) -> None:
        super().__init__(rules | (_CASTS if undoes_casts else {}), needs_graph)
        self.device_type = device_type
        self.undoes_casts = undoes_casts
        self.saw_half = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call."""
        if self.undoes_casts and kwargs and kwargs.get("dtype") in HALF:
            kwargs = kwargs | {"dtype": torch.float32}
        if torch.is_autocast_enabled(self.device_type) and not any(_is_half(item) for item in args):
            with torch.autocast(self.device_type, enabled=False):
                result = super().__torch_function__(function, types, args, kwargs)
        else:
            result = super().__torch_function__(function, types, args, kwargs)
        self.saw_half = self.saw_half or _is_half(result)
        return result


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    promoted: list[Any] = [at_least_float32(item) if isinstance(item, torch.dtype) else item for item in args]
    return tensor.to(*promoted, **kwargs)


def _type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args and str(args[0]) in _HALF_TYPES:
        return _float(tensor)
    return tensor.type(*args, **kwargs)


def _float(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor.float() if tensor.dtype != torch.float64 else tensor


_HALF_TYPES = ("torch.float16", "torch.bfloat16", "torch.HalfTensor", "torch.BFloat16Tensor")

_CASTS: dict[Any, Rule] = {
    torch.Tensor.half: _float,
    torch.Tensor.bfloat16: _float,
    torch.Tensor.to: _to,
    torch.Tensor.type: _type,
}
