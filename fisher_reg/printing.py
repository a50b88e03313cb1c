"""Results as text: one line for ``repr``, a small table for ``print``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def short(value: Any) -> str:
    """Return a short text for a value: the shape of an array, the name of a function.

    Example:
        >>> import torch
        >>> short(torch.zeros(3, 1, 1)), short(torch.mean), short([0.1] * 99), short(0.5)
        ('tensor of shape (3, 1, 1)', 'mean', '99 values', '0.5')
    """
    if isinstance(value, Tensor | np.ndarray):
        is_number = value.ndim == 0
        return f"{float(value):.4g}" if is_number else f"{_kind(value)} of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple) and len(value) > _MOST_VALUES:
        return f"{len(value)} values"
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{type(value).__name__}(...)"


def short_repr(self: Any) -> str:
    """Return a short ``repr`` of a dataclass: its numbers, and the fields that differ from the defaults."""
    shown = [
        f"{field.name}={short(value)}"
        for field in dataclasses.fields(self)
        if isinstance(value := getattr(self, field.name), int | float) or _differs(value, field.default)
    ]
    return f"{type(self).__name__}({', '.join(shown)})"


def examples(count: int) -> str:
    """Return ``128 examples``, ``1 example``.

    Example:
        >>> examples(1), examples(2)
        ('1 example', '2 examples')
    """
    return f"{count} example" if count == 1 else f"{count} examples"


def spread(values: Tensor) -> str:
    """Return a number, or the (lower) median and the largest of ``(N,)`` values that are not NaN.

    Example:
        >>> import torch
        >>> spread(torch.tensor([1.0, 2.0, 30.0, torch.nan])), spread(torch.tensor([1.5])), spread(torch.zeros(0))
        ('median 2, largest 30', '1.5', 'none')
    """
    known = values.detach().cpu().double()
    known = known[~known.isnan()]
    if known.numel() <= 1:
        return f"{known.item():.4g}" if known.numel() else "none"
    return f"median {known.median():.4g}, largest {known.max():.4g}"


def table(title: str, columns: Mapping[str, Tensor], footer: str = "") -> str:
    """Return columns of numbers ``(B,)`` as text: a row per example, the first eight of them.

    Example:
        >>> import torch
        >>> print(table("2 examples", {"λ": torch.tensor([0.5, 12.0]), "converged": torch.tensor([True, False])}))
        2 examples
        example    λ  converged
              0  0.5        yes
              1   12         no
    """
    count = len(next(iter(columns.values())))
    shown = min(count, _MOST_ROWS)
    cells = [["example", *map(str, range(shown))]]
    cells += [[name, *map(_cell, values[:shown].tolist())] for name, values in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    rows = [
        "  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True))
        for row in zip(*cells, strict=True)
    ]
    if count > shown:
        rows.append(f"… and {examples(count - shown)} more")
    return "\n".join([title, *rows, *([footer] if footer else [])])


_MOST_VALUES = 4
_MOST_ROWS = 8
_LONGEST = 90


def _cell(value: float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}"


def _kind(value: Tensor | np.ndarray) -> str:
    return "tensor" if isinstance(value, Tensor) else "array"


def _differs(value: Any, default: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray) or isinstance(default, Tensor | np.ndarray):
        return value is not default
    return bool(value != default)
