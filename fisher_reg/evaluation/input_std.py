"""The standard deviation by which the inputs were divided, in its usual forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

InputStd = float | Sequence[float] | Tensor
"""Standard deviation of the input normalisation: one number, one per channel, or broadcastable to one example."""


def check_input_std(input_std: InputStd | None) -> None:
    """Check that an argument can be a standard deviation of inputs; None is allowed.

    Raises:
        TypeError: If it is not made of real numbers.
        ValueError: If a number in it is not positive and finite, or there is none.
    """
    if input_std is not None:
        _numbers(input_std)


def standard_deviation(input_std: InputStd | None, inputs: Tensor) -> Tensor | None:
    """Return a standard deviation as a tensor that is broadcastable to one example ``*S`` of inputs ``(B, *S)``.

    Args:
        input_std: A number, or numbers. A vector (a list, a tuple, a tensor ``(C,)``) has one number per channel, the
            first axis of an example, or else one per entry of the last axis. Anything with more axes is broadcast to
            one example; a leading axis of length one may stand for the batch.
        inputs: ``(B, *S)``; only the shape is used.

    Returns:
        A tensor with as many axes as an example or none, on its own device; None for None.

    Raises:
        TypeError: As :func:`check_input_std`.
        ValueError: As there, or if the shape does not fit, or fits in two ways.

    Example:
        >>> standard_deviation([0.2, 0.3, 0.4], torch.zeros(5, 3, 8, 8)).shape
        torch.Size([3, 1, 1])
    """
    if input_std is None:
        return None
    std, example = _numbers(input_std), inputs.shape[1:]
    given = tuple(std.shape)
    while std.ndim > len(example) and std.shape[0] == 1:
        std = std[0]
    if std.numel() == 1:
        return std.reshape(())
    if std.ndim < len(example) and std.numel() == std.shape[-1]:
        std = _along_one_axis(std.flatten(), example, given)
    if not _fits(std, example):
        raise ValueError(_misfit(given, example))
    return std.reshape(*[1] * (len(example) - std.ndim), *std.shape)


def _numbers(input_std: Any) -> Tensor:
    error = TypeError(
        f"input_std must be a number, a list of numbers, or a tensor; got {input_std!r}. Write input_std=0.5, or one "
        "number per channel: input_std=[0.229, 0.224, 0.225]."
    )
    try:
        std = _tensor(input_std).detach()
    except (TypeError, ValueError, RuntimeError):
        raise error from None
    if std.is_complex() or std.dtype == torch.bool:
        raise error
    if not std.is_floating_point() or std.element_size() < 4:
        std = std.double()
    if std.numel() == 0:
        raise ValueError(f"input_std has no numbers; its shape is {tuple(std.shape)}.")
    if not bool(((std > 0) & std.isfinite()).all()):
        if not bool(std.isfinite().all()):
            raise ValueError(f"input_std must be positive and finite; got {input_std}.")
        raise ValueError(f"input_std must be positive; its smallest value is {float(std.min())}.")
    return std


def _tensor(value: Any) -> Tensor:
    """Return a tensor as it is; a number, an array or a sequence of these in double precision."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, str | bytes | bool | complex):
        raise TypeError("no real number")
    if isinstance(value, Sequence):
        return torch.stack([_tensor(part).double() for part in value]) if value else torch.zeros(0)
    return torch.from_numpy(np.array(value, dtype=np.float64))


def _along_one_axis(std: Tensor, example: torch.Size, given: tuple[int, ...]) -> Tensor:
    per_channel = (len(std), *[1] * (len(example) - 1))
    per_entry = (*[1] * (len(example) - 1), len(std))
    if len(given) > 1 and len(std) != example[-1]:
        raise ValueError(_misfit(given, example))
    if len(std) == example[0] == example[-1]:
        if bool((std == std[0]).all()):
            return std[0]
        raise ValueError(
            f"input_std of shape {given} fits two axes of an example {tuple(example)}: the channels, the first axis, "
            f"and the last one. Write torch.tensor(std).view{per_channel} for channels, "
            f"torch.tensor(std).view{per_entry} for the last axis."
        )
    return std.view(per_channel if len(std) == example[0] else per_entry)


def _fits(std: Tensor, example: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(std.shape, example) == example)
    except RuntimeError:
        return False


def _misfit(given: tuple[int, ...], example: torch.Size) -> str:
    what = "feature" if len(example) == 1 else f"channel (shape {(example[0], *[1] * (len(example) - 1))})"
    return (
        f"input_std of shape {given} does not fit one example of shape {tuple(example)}. Give one number, "
        f"{example[0]} numbers for one per {what}, or a tensor that is broadcastable to one example."
    )
