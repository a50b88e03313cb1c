"""Sensitivities of the values in the graph to the input of the network, as logarithms of Lipschitz constants."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_reg.bounds.operator_norms.ranges import Range

Number = float | Tensor


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of a value in the graph to the input of the network.

    Attributes:
        log_norm: Logarithm of a Lipschitz constant of ``scale * value``, a scalar or one per example ``(B,)``; None for
            a value that does not depend on the input.
        scale: Diagonal scaling, positive and broadcastable to the value; None for 1.
        range: The range of the value, if known.
        parts: If the value is a tuple of tensors, the sensitivity of each.
    """

    log_norm: Tensor | None
    scale: Tensor | None = None
    range: Range | None = None
    parts: tuple[Sensitivity, ...] = ()

    @property
    def is_constant(self) -> bool:
        """Whether the value is known not to depend on the input."""
        return self.log_norm is None

    def plain(self) -> Sensitivity:
        """Return the sensitivity of the value without scaling."""
        if self.scale is None or self.log_norm is None:
            return self
        return replace(self, log_norm=self.log_norm - self.scale.amin().log(), scale=None)

    def within(self, scale: Tensor | None) -> Tensor:
        """Return the log norm for another diagonal scaling."""
        assert self.log_norm is not None
        if scale is self.scale:
            return self.log_norm
        ratio = torch.ones(()).double() if scale is None else scale
        return self.log_norm + (ratio if self.scale is None else ratio / self.scale).amax().log()


CONSTANT = Sensitivity(None)
"""The sensitivity of a value that does not depend on the input."""


def shifted(sensitivity: Sensitivity, log_factor: Tensor | float) -> Tensor:
    """Return the log norm of the value times a factor."""
    assert sensitivity.log_norm is not None
    return sensitivity.log_norm + log_factor


def as_double(value: Number) -> Tensor:
    """Return a number or tensor in double precision; a Python number is not rounded to float32 first."""
    return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def log(value: Number) -> Tensor:
    """Return the logarithm in double precision: minus infinity for zero, with a zero gradient there."""
    tensor = as_double(value)
    positive = tensor > 0
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(positive | tensor.isnan(), torch.where(positive, tensor, tiny + 0 * tensor).log(), -math.inf)


def log_sum(log_values: Iterable[Tensor]) -> Tensor:
    """Return ``log(sum_i exp(l_i))`` of the log values ``l_i``; the gradient is finite also if all are -inf."""
    values = torch.stack(torch.broadcast_tensors(*log_values))
    largest = values.detach().amax(0)
    base = torch.where(largest == -math.inf, 0.0, largest)
    return base + log((values - base).exp().sum(0))


def side_by_side(log_norms: Iterable[Tensor]) -> Tensor:
    """Return the log norm of several values concatenated: the root of the sum of squares."""
    return 0.5 * log_sum([2 * log_norm for log_norm in log_norms])
