r"""Logits of :math:`-\infty`: classes that are left out, with a probability of zero.

Such a logit needs care only where it would meet another infinity, in a difference or in a product with zero. These
functions are all that is needed: everything else is right as it stands, since
:math:`\exp(-\infty) = 0` with a derivative of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def present(logits: Tensor) -> Tensor:
    r"""Return the logits ``(B, K)`` with zero in place of :math:`-\infty`, for sums over the classes that are there."""
    return torch.where(logits.isneginf(), 0.0, logits)


def change(logits: Tensor, moved: Tensor) -> Tensor:
    """Return ``moved - logits`` ``(B, K)``: zero for a class that ``logits`` leave out, whatever it moves to."""
    is_left_out = logits.isneginf()
    return torch.where(is_left_out, 0.0, moved) - torch.where(is_left_out, 0.0, logits)


def magnitude(logits: Tensor) -> Tensor:
    """Return the largest absolute value of the finite logits of each example: ``(B, K)`` to ``(B,)``."""
    return present(logits.detach()).abs().amax(1)
