"""How the weight of a penalty changes while training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from fisher_reg.callbacks.batch import check_at_least_one


class Schedule(Protocol):
    """A factor of the weight over the training."""

    @property
    def num_steps(self) -> int | None:
        """Optimiser steps until the end; None for those of the whole training."""

    def factor(self, progress: float) -> float:
        """Return the factor at a ``progress`` from 0 to 1."""


@dataclass(frozen=True)
class ConstantSchedule:
    """The weight as it is."""

    num_steps: int | None = None

    def factor(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class LinearSchedule:
    """From the weight to ``end`` times the weight along a line.

    Args:
        end: Last factor, at least 0; above 1 the weight grows.
        num_steps: Optimiser steps until then; None for those of the whole training.
    """

    end: float = 0.0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        _check(self, self.end, self.num_steps)

    def factor(self, progress: float) -> float:
        """Return the factor at a ``progress`` from 0 to 1."""
        return 1.0 + (self.end - 1.0) * progress


@dataclass(frozen=True)
class CosineSchedule:
    """From the weight to ``end`` times the weight along half a cosine, flat at both ends.

    Args:
        end: Last factor, at least 0; above 1 the weight grows.
        num_steps: Optimiser steps until then; None for those of the whole training.
    """

    end: float = 0.0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        _check(self, self.end, self.num_steps)

    def factor(self, progress: float) -> float:
        """Return the factor at a ``progress`` from 0 to 1."""
        return self.end + (1.0 - self.end) * (1.0 + math.cos(math.pi * progress)) / 2


def _check(schedule: object, end: float, num_steps: int | None) -> None:
    if not 0 <= end < math.inf:
        raise ValueError(f"{type(schedule).__name__} needs a finite end >= 0; got {end}.")
    if num_steps is not None:
        check_at_least_one(schedule, num_steps=num_steps)


@dataclass
class LambdaControl:
    r"""A weight that is adapted until a mean eigenvalue tracks a target.

    Each measurement moves the logarithm of the weight by ``gain`` times :math:`\log(\lambda / \text{target})`, an
    integral control, within a factor of ``max_factor`` from where it began.

    Args:
        target: Mean largest eigenvalue, in nats per squared input unit.
        weight: Where the weight begins.
        gain: Share of the error, in logarithms, by which one measurement moves the weight.
        max_factor: Most by which the weight may grow or shrink in all.
    """

    target: float
    weight: float
    gain: float = 0.15
    max_factor: float = 1e3

    def __post_init__(self) -> None:
        if not 0 < self.target < math.inf:
            raise ValueError(f"target_lambda must be positive and finite; got {self.target}.")
        self.begin = self.weight

    @property
    def is_at_limit(self) -> bool:
        """Whether the weight has moved as far as it may."""
        return abs(math.log(self.weight / self.begin)) > 0.999 * math.log(self.max_factor)

    def update(self, measured: float) -> None:
        """Move the weight after a measurement that is finite; zero counts as far below the target."""
        if math.isfinite(measured):
            error = math.log(max(measured, self.target / self.max_factor) / self.target)
            log_factor = math.log(self.weight / self.begin) + self.gain * error
            limit = math.log(self.max_factor)
            self.weight = self.begin * math.exp(min(max(log_factor, -limit), limit))
