r"""Trace of :math:`F = A^\top A` by random probes on the output side, and the paper's use of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fisher_reg.eigen import FactoredOperator, check_positive
from fisher_reg.sampling import fixed_generator, normal, signs


class Probe(Protocol):
    """Draws vectors whose second moment is the identity."""

    def draw(self, operator: FactoredOperator, generator: torch.Generator | None) -> Tensor:
        """Return one vector per example, ``(B, K)``."""


@dataclass(frozen=True)
class Rademacher:
    """Independent random signs: the smallest variance of all vectors with independent entries."""

    def draw(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Return one vector per example, ``(B, K)``."""
        return signs(operator.starts(1)[:, 0], generator)

    def variance(self, gram: Tensor) -> Tensor:
        r"""Return the variance of a sample, :math:`2 \sum_{i \ne j} G_{ij}^2`; ``gram`` is ``A Aᵀ``, ``(B, K, K)``."""
        return 2 * (gram.square().sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).square().sum(1))


@dataclass(frozen=True)
class StandardNormal:
    """Independent standard normal numbers: a variance that depends on the eigenvalues alone."""

    def draw(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Return one vector per example, ``(B, K)``."""
        return normal(operator.starts(1)[:, 0], generator)

    def variance(self, gram: Tensor) -> Tensor:
        r"""Return the variance of a sample, :math:`2 \|G\|_F^2`; ``gram`` is ``A Aᵀ``, ``(B, K, K)``."""
        return 2 * gram.square().sum((1, 2))


@dataclass(frozen=True)
class SampledLabels:
    r"""Labels drawn under the model: each sample is a squared score :math:`\|\nabla_x \log p(y|x)\|^2`.

    For one label out of ``K`` the variance of one sample is
    :math:`\sum_y p_y \|\nabla_x \log p(y|x)\|^4 - (\mathrm{tr} F)^2`; relative to the squared trace it grows without
    limit, as :math:`1 / (1 - \max p)`, where the prediction is confident.
    """

    def draw(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Return one vector per example, ``(B, K)``."""
        return operator.labels(generator)


@dataclass(frozen=True)
class Hutchinson:
    r"""Trace of F as the mean of :math:`\|A^\top \epsilon\|^2` over random :math:`\epsilon` with unit covariance.

    Unbiased, at one backward pass per sample. With random signs the relative variance is at most ``2 / num_samples``.

    Reference: Hutchinson (1989), "A stochastic estimator of the trace of the influence matrix".

    Args:
        num_samples: Probes per example.
        probe: :class:`Rademacher`, :class:`StandardNormal` or :class:`SampledLabels`, which state their variances.
    """

    num_samples: int = 16
    probe: Probe = Rademacher()

    def __post_init__(self) -> None:
        check_positive(self, num_samples=self.num_samples)

    def trace(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Average over ``num_samples`` probes: ``(B,)``."""
        if generator is None:
            generator = fixed_generator(operator.starts(1).device)
        squares = [
            operator.adjoint(self.probe.draw(operator, generator)).square().sum(1) for _ in range(self.num_samples)
        ]
        return torch.stack(squares).mean(0)
