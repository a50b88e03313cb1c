r"""A categorical distribution that does not saturate: every prediction is rescaled to the same margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisher_reg.divergence import categorical_divergence
from fisher_reg.errors import NoBoundError
from fisher_reg.left_out import change, present
from fisher_reg.likelihood import Categorical, Likelihood


@dataclass(frozen=True)
class MarginTempered(Likelihood):
    r"""One label out of ``K`` at a temperature per example: :math:`p = \mathrm{softmax}(z / T)`.

    :math:`T = (z_{(1)} - z_{(2)}) / \text{margin}` puts the two largest logits ``margin`` apart, so that
    :math:`\tilde\lambda`, the largest eigenvalue of :math:`J^\top \Sigma(z / T) J / T^2`, does not change when all
    logits are multiplied by a number. The Fisher eigenvalue of :class:`Categorical` does: a confident network has a
    small one, although adversarial examples are as near. With two classes at distance
    :math:`r = (z_1 - z_2) / \|\nabla (z_1 - z_2)\|` from the linearised boundary,
    :math:`\tilde\lambda = p_1 p_2\,\text{margin}^2 / r^2`.

    The unit is nats of the tempered prediction per squared input unit. Where the two largest logits are equal the
    prediction has no margin, and :math:`\tilde\lambda` is as large as the precision allows. Classes that a mask rules
    out, by a large negative logit or by :math:`-\infty`, have no influence.

    Args:
        margin: Difference of the two largest logits over ``T``.

    Raises:
        ValueError: If ``margin`` is not positive.

    Example:
        >>> from fisher_reg import fisher_spectral_norm
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0]])  # p (1 - p) / r^2 with p = sigmoid(1), at distances 1 and 2
        >>> fisher_spectral_norm(lambda x: 1000 * x @ weight.T, x, likelihood=MarginTempered()).eigenvalue
        tensor([0.1966, 0.0492])
    """

    margin: float = 1.0
    min_outputs: ClassVar[int] = 2
    shift_invariant: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"MarginTempered needs a positive margin; got {self.margin}.")

    def whiten(self, logits: Tensor, tangent: Tensor) -> Tensor:
        """Apply the factor of :class:`Categorical` at the tempered logits to a tempered tangent ``(B, K)``."""
        temperature = self._temperature(logits)
        return Categorical().whiten(_tempered(logits, temperature), tangent / temperature)

    def unwhiten(self, logits: Tensor, cotangent: Tensor) -> Tensor:
        """Apply the transpose of that factor, ``(B, K)`` to ``(B, K)``."""
        temperature = self._temperature(logits)
        return Categorical().unwhiten(_tempered(logits, temperature), cotangent) / temperature

    def contrast(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        r"""Contrast the two most probable classes, with weight :math:`p_1 p_2 / T^2`."""
        temperature = self._temperature(logits)
        direction, weight = Categorical().contrast(_tempered(logits, temperature))
        return direction, weight / temperature.squeeze(1).square()

    def divergence(self, logits: Tensor, moved: Tensor) -> Tensor:
        """Return the divergence ``(B,)`` of the predictions, both at the temperature of ``logits``."""
        temperature = self._temperature(logits)
        first = logits.amax(1, keepdim=True)
        is_far = _is_far(logits - first, temperature) & _is_far(moved - first, temperature)
        before, after = (_over(z - first, temperature, is_far) for z in (logits, moved))
        return categorical_divergence(before, after, change(logits, moved) / temperature)

    def candidates(self, logits: Tensor, count: int) -> Tensor:
        """Return the directions of :class:`Categorical`; the temperature does not change their order."""
        return Categorical().candidates(logits, count)

    def labels(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw labels under the tempered prediction, ``(B, K)``."""
        return Categorical().labels(_tempered(logits, self._temperature(logits)), generator)

    def largest_curvature(self, rows: Tensor | None = None) -> Tensor:
        """Raise an error: the curvature grows without bound where two logits are equal.

        Raises:
            NoBoundError: Always.
        """
        raise NoBoundError(
            "MarginTempered has no bound over all inputs, since it grows without limit towards the decision boundary. "
            "Bound likelihood=Categorical(), or take local_fisher_bound at given inputs."
        )

    def curvature_at(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the value of :class:`Categorical` at the tempered logits over the squared temperature, ``(B,)``."""
        precise = logits.double()
        temperature = self._temperature(precise)
        return Categorical().curvature_at(_tempered(precise, temperature), rows) / temperature.squeeze(1).square()

    def _temperature(self, logits: Tensor) -> Tensor:
        """Return ``(B, 1)``: positive, also where the two largest logits are equal; one where there is one class.

        The other logits have no influence: they may be large negative numbers of classes that a mask rules out.
        """
        first, second = logits.topk(2, dim=1).values.split(1, dim=1)
        numbers = torch.finfo(logits.dtype)
        size = torch.maximum(first.detach().abs(), present(second.detach()).abs())
        # equal logits: the rounding error of their difference; two zeros: small enough that 1 / T^2 does not overflow
        smallest = torch.where(size > 0, (numbers.eps * size).clamp_min(numbers.tiny), numbers.tiny**0.375)
        gap = torch.where(second.isneginf(), 1.0, first - second)
        return torch.maximum(gap, smallest) / self.margin


_FAR = 1e4  # a tempered logit that is this far below the largest one has the probability zero in any precision


def _tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return :math:`(z - z_{(1)}) / T` ``(B, K)``, minus infinity where the quotient might overflow."""
    offset = logits - logits.amax(1, keepdim=True)
    return _over(offset, temperature, _is_far(offset, temperature))


def _is_far(offset: Tensor, temperature: Tensor) -> Tensor:
    return offset < -_FAR * temperature


def _over(offset: Tensor, temperature: Tensor, is_far: Tensor) -> Tensor:
    return torch.where(is_far, -torch.inf, torch.where(is_far, 0.0, offset) / temperature)
