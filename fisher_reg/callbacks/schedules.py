"""Schedules of the weight of a penalty."""

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
class ConstantSchedule(Schedule):
    """A constant weight."""

    num_steps: int | None = None

    def factor(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class _Ramp(Schedule):
    end: float = 0.0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.end < math.inf:
            raise ValueError(f"{type(self).__name__} needs a finite end >= 0; got {self.end}.")
        if self.num_steps is not None:
            check_at_least_one(self, num_steps=self.num_steps)


class LinearSchedule(_Ramp):
    """From the weight to ``end`` times the weight, linearly.

    Args:
        end: Last factor, at least 0; above 1 the weight grows.
        num_steps: Optimiser steps until the last factor; None for those of the whole training.
    """

    def factor(self, progress: float) -> float:
        """Return the factor at a ``progress`` from 0 to 1."""
        return 1.0 + (self.end - 1.0) * progress


class CosineSchedule(_Ramp):
    """Like :class:`LinearSchedule`, but along half a period of a cosine."""

    def factor(self, progress: float) -> float:
        """Return the factor at a ``progress`` from 0 to 1."""
        return self.end + (1.0 - self.end) * (1.0 + math.cos(math.pi * progress)) / 2
