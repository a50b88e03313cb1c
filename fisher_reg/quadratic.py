r"""Accuracy of the quadratic approximation of the divergence, :math:`\mathrm{KL} \approx \lambda \epsilon^2 / 2`."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_reg.left_out import present
from fisher_reg.operator import InputFisher

LARGEST_KL = 0.1
"""Predicted divergence in nats at the chosen step: enough to change a prediction that is not confident."""

LARGEST_STEP = 0.05
"""Share of the norm of the input minus its mean: a usual size of an attack, about 0.5 for 32 x 32 pixels."""


def kl_ratio(fisher: InputFisher, eigenvalue: Tensor, eigenvector: Tensor, left: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p_x \| p_{x + \epsilon v}) / (\lambda \epsilon^2 / 2)` per example, at one forward.

    :math:`\epsilon` is the length at which the denominator is :data:`LARGEST_KL`, but at most :data:`LARGEST_STEP`. Of
    the two directions :math:`\pm v` the one in which the entropy of the prediction grows is used:
    :math:`dH = -\langle z, d\mu \rangle` for the mean :math:`\mu` of the outputs, and
    :math:`d\mu = \Sigma J v \propto L^\top u` along :math:`v`.

    Args:
        fisher: The operator.
        eigenvalue: :math:`\lambda`, ``(B,)``.
        eigenvector: :math:`v`, ``(B, d)`` or ``(B, *S)``.
        left: :math:`u`, ``(B, K)``.

    Returns:
        ``(B,)``; NaN where the eigenvalue is zero or the perturbed logits are not finite.
    """
    logits, v = fisher.logits.detach(), eigenvector.flatten(1)
    # the entropy decreases along v where <z, d mu> > 0
    sign = 1.0 - 2.0 * ((present(logits) * fisher.likelihood.unwhiten(logits, left)).sum(1) > 0).to(logits)
    length = torch.minimum((2 * LARGEST_KL / eigenvalue).sqrt(), _largest_step(fisher, v))
    is_known = (eigenvalue > 0) & length.isfinite()
    with torch.no_grad():
        moved = fisher.logits_at(torch.where(is_known, sign * length, 0.0)[:, None] * v)
        divergence = fisher.likelihood.divergence(logits, moved)
    quadratic = eigenvalue * length.square() / 2
    return torch.where(is_known & divergence.isfinite(), divergence / quadratic, torch.nan)


def _largest_step(fisher: InputFisher, v: Tensor) -> Tensor:
    """Return the largest step along ``v`` ``(B,)``; infinite for a constant input."""
    x = fisher.inputs.detach().flatten(1)
    size = (x - x.mean(1, keepdim=True)).norm(dim=1)
    per_step = fisher.in_input_units(v).flatten(1).norm(dim=1)
    return torch.where(size > 0, LARGEST_STEP * size / per_step, torch.inf)
