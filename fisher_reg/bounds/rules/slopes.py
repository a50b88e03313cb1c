"""Slopes of activations at given numbers and over intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Turn(NamedTuple):
    """A number at which the slope of an activation is extreme or jumps, and its slopes there."""

    place: float
    lowest: float
    largest: float
    spread: float = 0.0  # how far from the place the extreme may be


GELU_SLOPE = 0.5 * (1 + math.erf(1.0)) + math.sqrt(2) * math.exp(-1.0) / math.sqrt(2 * math.pi)
"""Largest slope of ``x Phi(x)``, at ``x = sqrt(2)`` where its second derivative ``(2 - x^2) phi(x)`` vanishes."""


def _gelu(module: nn.GELU) -> tuple[Turn, ...]:
    if module.approximate == "tanh":
        return Turn(1.4185, 1.1291, 1.1291, 0.01), Turn(-1.4185, -0.1291, -0.1291, 0.01)
    return Turn(math.sqrt(2), GELU_SLOPE, GELU_SLOPE, 1e-6), Turn(-math.sqrt(2), 1 - GELU_SLOPE, 1 - GELU_SLOPE, 1e-6)


TURNS: dict[type[nn.Module], Callable[[Any], tuple[Turn, ...]]] = {
    nn.ReLU: lambda module: (Turn(0.0, 0.0, 1.0),),
    nn.ReLU6: lambda module: (Turn(0.0, 0.0, 1.0), Turn(6.0, 0.0, 1.0)),
    nn.Hardtanh: lambda module: (Turn(module.min_val, 0.0, 1.0), Turn(module.max_val, 0.0, 1.0)),
    nn.LeakyReLU: lambda module: (Turn(0.0, *sorted((module.negative_slope, 1.0))),),
    nn.ELU: lambda module: (Turn(0.0, *sorted((module.alpha, 1.0))),),
    nn.CELU: lambda module: (Turn(0.0, 1.0, 1.0),),
    nn.SELU: lambda module: (Turn(0.0, 1.05, 1.7581),),
    nn.GELU: _gelu,
    nn.SiLU: lambda module: (Turn(2.39936, 1.09984, 1.09984, 1e-3), Turn(-2.39936, -0.09984, -0.09984, 1e-3)),
    nn.Mish: lambda module: (Turn(1.49057, 1.0885, 1.0885, 1e-3), Turn(-2.25638, -0.11253, -0.11253, 1e-3)),
    nn.Hardswish: lambda module: (Turn(-3.0, -0.5, 0.0), Turn(3.0, 1.0, 1.5)),
    nn.Hardsigmoid: lambda module: (
        Turn(-3.0, 0.0, 0.1666667),
        Turn(3.0, 0.0, 0.1666667),
    ),  # 1/6, which torch rounds up
    nn.Tanh: lambda module: (Turn(0.0, 1.0, 1.0),),
    nn.Sigmoid: lambda module: (Turn(0.0, 0.25, 0.25),),
    nn.Softplus: lambda module: (Turn(module.threshold / module.beta, 1.0 - math.exp(-module.threshold), 1.0),),
    nn.Softsign: lambda module: (Turn(0.0, 1.0, 1.0),),
    nn.LogSigmoid: lambda module: (),
    nn.Tanhshrink: lambda module: (Turn(0.0, 0.0, 0.0),),
    nn.Softshrink: lambda module: (Turn(-module.lambd, 0.0, 1.0), Turn(module.lambd, 0.0, 1.0)),
}
"""Between two neighbouring turns, and outside all turns, the slope is monotone."""

RISING = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SELU, nn.Hardsigmoid, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign,
    nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink,
)  # fmt: skip
"""Activations that are nondecreasing."""


def slopes_at(module: nn.Module, hidden: Tensor) -> Tensor:
    """Return the slope of an activation at each number."""
    with torch.enable_grad():
        point = hidden.detach().clone().requires_grad_()
        (slopes,) = torch.autograd.grad(module(point * 1.0).sum(), point)  # the copy may be overwritten in place
    return slopes


def slopes_within(module: nn.Module, hidden: Tensor, width: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the smallest and the largest slope of an activation over ``hidden - width .. hidden + width``.

    Args:
        module: The activation.
        hidden: The middle of each interval.
        width: Half the length of each interval, broadcastable to ``hidden``.

    Returns:
        Both in the shape of ``hidden``, valid also for one-sided slopes; None for a module with unknown turns.
    """
    kind = next((kind for kind in type(module).__mro__ if kind in TURNS), None)
    if kind is None:
        return None
    low, high = hidden - width, hidden + width
    ends = slopes_at(module, low), slopes_at(module, high)
    lowest, largest = torch.minimum(*ends), torch.maximum(*ends)
    for turn in TURNS[kind](module):
        meets = (low <= turn.place + turn.spread) & (high >= turn.place - turn.spread)
        lowest = torch.where(meets, lowest.clamp_max(turn.lowest), lowest)
        largest = torch.where(meets, largest.clamp_min(turn.largest), largest)
    return lowest, largest


def range_within(module: nn.Module, hidden: Tensor, width: Tensor) -> Tensor | None:
    """Return a bound of the deviation of an activation from its value at ``hidden``; None if it is not known.

    The largest slope times the width is a bound for every activation; a monotone one has its extremes at the ends.
    """
    slopes = slopes_within(module, hidden, width)
    if slopes is None:
        return None
    steepest = torch.maximum(slopes[0].abs(), slopes[1].abs()) * width
    if not isinstance(module, RISING):
        return steepest
    middle = module(hidden.clone())
    rise, fall = module(hidden + width) - middle, middle - module(hidden - width)
    rounding = 4 * torch.finfo(middle.dtype).eps * middle.abs()  # of the two differences
    return torch.minimum(steepest, torch.maximum(rise, fall) + rounding)
