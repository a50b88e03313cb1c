"""The queries: the inputs plus random steps that stay within bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_reg.sampling import normal, uniform
from fisher_reg.solvers import unit

_REACH = 3**0.5  # the largest value of a uniform variable with mean 0 and variance 1


@dataclass(frozen=True)
class Questions:
    r"""Points :math:`c + h v / \sigma` around the inputs, with independent entries of mean 0 and variance 1 in v.

    Without bounds :math:`v` is normal and :math:`c = x`. Within bounds :math:`v` is uniform on
    :math:`[-\sqrt 3, \sqrt 3]`, and :math:`c` is the point nearest to x from which no step can leave the range: a pixel
    at its bound moves inwards by :math:`\sqrt 3 h / \sigma` on average. The effect of this shift on the predictions is
    the same in every column, and is removed with their mean.

    Attributes:
        inputs: ``(B, *S)``.
        std: :math:`\sigma`, broadcastable to the inputs.
        low: Smallest values, broadcastable to the inputs; None without bounds.
        high: Largest values; None without bounds.
    """

    inputs: Tensor
    std: Tensor
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def are_bounded(self) -> bool:
        """Whether there are bounds."""
        return self.low is not None

    def direction(self, generator: torch.Generator) -> Tensor:
        """Return a direction ``v / std`` of shape ``(B, *S)``."""
        if self.low is None:
            return normal(self.inputs, generator) / self.std
        return (2 * uniform(self.inputs, generator) - 1) * _REACH / self.std

    def unit_direction(self, generator: torch.Generator) -> Tensor:
        """Return a direction ``v / std`` with ``v`` of norm one."""
        return unit(normal(self.inputs, generator).flatten(1)).view_as(self.inputs) / self.std

    def point(self, step: Tensor, direction: Tensor) -> Tensor:
        """Return the points at steps ``(B,)`` along a direction."""
        return self.around(step * _REACH, step, direction)

    def around(self, reach: Tensor, step: Tensor, direction: Tensor) -> Tensor:
        """Return the points at a step along a direction, from a centre at least ``reach / std`` inside the bounds."""
        length = self._per_example(step)
        if self.low is None or self.high is None:
            return self.inputs + length * direction
        margin = self._per_example(reach) / self.std
        centre = self.inputs.maximum(self.low + margin).minimum(self.high - margin)
        return (centre + length * direction).maximum(self.low).minimum(self.high)  # rounding could leave the range

    def largest_step(self) -> Tensor:
        """Return the length ``(B,)`` of the longest step that stays within the bounds for every pixel."""
        if self.low is None or self.high is None:
            return self.inputs.new_full((len(self.inputs),), torch.inf)
        room = (self.high - self.low) * self.std / (2 * _REACH)  # largest h with 2 sqrt(3) h / sigma <= high - low
        return room.expand_as(self.inputs).flatten(1).amin(1)

    def _per_example(self, numbers: Tensor) -> Tensor:
        return numbers.view(-1, *[1] * (self.inputs.ndim - 1))


def within(questions: Questions, bounds: Any) -> Questions:
    """Return the queries within ``bounds``, a pair ``(low, high)``, or None for no bounds.

    Raises:
        ValueError: If the bounds are not a range, or the inputs violate them.
    """
    if bounds is None:
        return questions
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError(f"bounds must be a pair (low, high), such as (0, 1); got {bounds!r}.")
    inputs = questions.inputs
    low, high = (_as_tensor(bound).to(inputs) for bound in bounds)
    try:
        torch.broadcast_to(high - low, inputs.shape)
    except RuntimeError as error:
        raise ValueError(
            f"bounds must be broadcastable to the inputs {tuple(inputs.shape)}; got {tuple(low.shape)} and "
            f"{tuple(high.shape)}."
        ) from error
    if not bool((low < high).all()):
        raise ValueError(
            "bounds must be (low, high) with low < high everywhere; the smallest difference is "
            f"{float((high - low).min()):.3g}. Remove pixels that cannot change."
        )
    _check_inside(inputs, low, high)
    return replace(questions, low=low, high=high)


def _as_tensor(bound: Any) -> Tensor:
    return bound if isinstance(bound, Tensor) else torch.from_numpy(np.array(bound, dtype=np.float64, order="C"))


def _check_inside(inputs: Tensor, low: Tensor, high: Tensor) -> None:
    below, above = float((low - inputs).max()), float((inputs - high).max())
    if max(below, above) > 0:
        side, by = ("below low", below) if below >= above else ("above high", above)
        raise ValueError(
            f"The inputs must lie within bounds; one is {side} by {by:.3g}, and they reach from "
            f"{float(inputs.min()):.4g} to {float(inputs.max()):.4g}. Pass the bounds in the unit of the inputs, "
            "or clip the inputs."
        )
