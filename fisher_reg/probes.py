r"""Random vectors on the output side whose second moment is the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fisher_reg.sampling import normal, signs


class ProbedOperator(Protocol):
    """The methods of an operator that a probe uses."""

    def starts(self, count: int) -> Tensor:
        """At most ``count`` vectors ``(B, count, K)``."""

    def labels(self, generator: torch.Generator | None) -> Tensor:
        """Random ``(B, K)`` with the identity as second moment, from labels drawn under the model."""


class Probe(Protocol):
    """Draws vectors whose second moment is the identity.

    All examples use the same random numbers, so that no estimate depends on the other examples in the batch.
    """

    def draw(self, operator: ProbedOperator, generator: torch.Generator | None) -> Tensor:
        """Return one vector per example, ``(B, K)``."""


@dataclass(frozen=True)
class Rademacher(Probe):
    """Independent random signs: the smallest variance of all vectors with independent entries."""

    def draw(self, operator: ProbedOperator, generator: torch.Generator | None = None) -> Tensor:
        """Return one vector per example, ``(B, K)``."""
        return _alike(signs, operator, generator)

    def variance(self, gram: Tensor) -> Tensor:
        r"""Return the variance of a sample, :math:`2 \sum_{i \ne j} G_{ij}^2`; ``gram`` is ``A Aᵀ``, ``(B, K, K)``."""
        return 2 * (gram.square().sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).square().sum(1))


@dataclass(frozen=True)
class StandardNormal(Probe):
    """Independent standard normal numbers: their variance depends only on the eigenvalues."""

    def draw(self, operator: ProbedOperator, generator: torch.Generator | None = None) -> Tensor:
        """Return one vector per example, ``(B, K)``."""
        return _alike(normal, operator, generator)

    def variance(self, gram: Tensor) -> Tensor:
        r"""Return the variance of a sample, :math:`2 \|G\|_F^2`; ``gram`` is ``A Aᵀ``, ``(B, K, K)``."""
        return 2 * gram.square().sum((1, 2))


@dataclass(frozen=True)
class SampledLabels(Probe):
    r"""Labels drawn under the model: each sample is a squared score :math:`\|\nabla_x \log p(y|x)\|^2`.

    For one label out of ``K`` the variance of one sample is
    :math:`\sum_y p_y \|\nabla_x \log p(y|x)\|^4 - (\mathrm{tr} F)^2`; relative to the squared trace it grows without
    limit, as :math:`1 / (1 - \max p)`, where the prediction is confident.
    """

    def draw(self, operator: ProbedOperator, generator: torch.Generator | None = None) -> Tensor:
        """Return one vector per example, ``(B, K)``."""
        return operator.labels(generator)


def _alike(
    sample: Callable[[Tensor, torch.Generator | None], Tensor],
    operator: ProbedOperator,
    generator: torch.Generator | None,
) -> Tensor:
    like = operator.starts(1)[:, 0]
    return sample(like[0], generator).expand_as(like)
