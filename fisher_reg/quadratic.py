r"""How far the quadratic picture of the divergence holds: :math:`\mathrm{KL} \approx \lambda \epsilon^2 / 2`."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_reg.left_out import present
from fisher_reg.operator import InputFisher

KL_AT_LENGTH = 0.5
"""The divergence, in nats, that the eigenvalue predicts at the length where the ratio is taken.

It is about that from a confident to an undecided prediction between two classes, so that the step is one that matters.
"""


def kl_ratio(fisher: InputFisher, eigenvalue: Tensor, eigenvector: Tensor, left: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p_x \| p_{x + \epsilon v}) / (\lambda \epsilon^2 / 2)` per example, at one forward.

    The length :math:`\epsilon` is where the denominator is :data:`KL_AT_LENGTH`. Of the two directions :math:`\pm v`
    the one is taken in which the entropy of the prediction grows: :math:`dH = -\langle z, d\mu \rangle` for the mean
    :math:`\mu` of the outputs, and :math:`d\mu = \Sigma J v \propto L^\top u` along :math:`v`.

    About 1 where KL is quadratic up to there. Above 1 the prediction moves faster than the eigenvalue says, as it does
    where it is confident. Far below 1 the gradient at the point does not tell what happens around it.

    Args:
        fisher: The operator.
        eigenvalue: :math:`\lambda`, ``(B,)``.
        eigenvector: :math:`v`, ``(B, d)`` or ``(B, *S)``.
        left: :math:`u`, ``(B, K)``.

    Returns:
        ``(B,)``; NaN where the eigenvalue is zero or the moved logits are not finite.
    """
    logits = fisher.logits.detach()
    mean_moves = fisher.likelihood.unwhiten(logits, left)
    entropy_falls = (present(logits) * mean_moves).sum(1) > 0
    sign = 1.0 - 2.0 * entropy_falls.to(logits.dtype)
    length = (2 * KL_AT_LENGTH / eigenvalue).sqrt()
    is_known = (eigenvalue > 0) & length.isfinite()
    step = torch.where(is_known, sign * length, 0.0)
    with torch.no_grad():
        moved = fisher.logits_at(step[:, None] * eigenvector.flatten(1))
        divergence = fisher.likelihood.divergence(logits, moved)
    is_known = is_known & divergence.isfinite()
    return torch.where(is_known, divergence / KL_AT_LENGTH, torch.nan)
