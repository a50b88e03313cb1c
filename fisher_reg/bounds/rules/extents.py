"""Ranges of the entries of an operand: at the example, over a region around it, or over all inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisher_reg.bounds.operator_norms.ranges import Interval, Range, Tokens, largest_entry
from fisher_reg.bounds.rules.call import Call, Operand
from fisher_reg.bounds.sensitivity import Sensitivity


def range_of(operand: Operand) -> Range | None:
    """Return the known range of an operand that is one tensor."""
    return operand.sensitivity.range if isinstance(operand.sensitivity, Sensitivity) else None


def extent(operand: Operand, call: Call) -> tuple[Tensor, Tensor]:
    """Return the lower and the upper end of each entry, in the shape of the value; infinite if not known."""
    value = operand.value.double()
    if call.at_example or operand.is_constant:
        return value, value
    known = range_of(operand)
    if isinstance(known, Interval):
        low, high = torch.full_like(value, known.low), torch.full_like(value, known.high)
    elif isinstance(known, Tokens):
        reach = known.gamma.double().abs() * known.radius
        low, high = ((known.beta.double() + side).expand(value.shape) for side in (-reach, reach))
    else:
        high = torch.full_like(value, largest_entry(known))
        low = -high
    if operand.around is not None:
        width = operand.around.width
        low, high = torch.maximum(low, value - width), torch.minimum(high, value + width)
    return low, high


def largest_modulus(operand: Operand, call: Call) -> Tensor:
    """Return a bound of the modulus of each entry, in the shape of the value; infinite if not known."""
    low, high = extent(operand, call)
    return torch.maximum(low.abs(), high.abs())


def worst(sizes: Tensor, operand: Operand, call: Call) -> Tensor:
    """Return the largest of sizes whose first axis is that of the operand; per example if its values are known."""
    is_apart = operand.is_apart and (call.at_example or operand.around is not None)
    return sizes.reshape(len(sizes), -1).amax(1) if is_apart and not operand.is_constant else sizes.amax()


def width_of(operand: Operand) -> Tensor | None:
    """Return a bound of the deviation of each entry from that at the example: zero for a constant, None if unknown."""
    if operand.is_constant:
        return torch.zeros_like(operand.value, dtype=torch.float64)
    return None if operand.around is None else operand.around.width


def distance_to(known: Range, value: Tensor) -> Tensor:
    """Return the largest distance of each entry from any number in its range."""
    if isinstance(known, Interval):
        return torch.maximum(known.high - value, value - known.low).clamp_min(0)
    if isinstance(known, Tokens):
        return (value - known.beta.detach()).abs() + known.gamma.detach().abs() * known.radius
    return value.abs() + largest_entry(known)


POSITIVE = Interval(0.0, math.inf)
