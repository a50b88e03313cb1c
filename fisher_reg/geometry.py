r"""Norms of perturbations of the input, and their dual norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fisher_reg.arguments import Argument


class Geometry(Protocol):
    r"""A norm of perturbations :math:`\delta`, ``(B, d)``.

    For a gradient :math:`g` the steepest perturbation is
    :math:`v = \mathrm{argmax}_{\|v\| \le 1} \langle g, v \rangle`, and the dual norm is
    :math:`\|g\|_* = \langle g, v \rangle`.
    """

    def norm(self, perturbation: Tensor) -> Tensor:
        """Return the norm, ``(B, d)`` to ``(B,)``."""

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """Return the dual norm, ``(B, d)`` to ``(B,)``; its derivative at zero is zero."""

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the steepest perturbation ``(B, d)`` of norm 1; zero where the gradient is zero."""

    def typical_entry(self, num_entries: int) -> float:
        """Return the root mean square of the entries of a steepest perturbation without zeros."""


@dataclass(frozen=True)
class L2(Geometry):
    """The Euclidean norm, which is its own dual.

    Example:
        >>> L2().steepest(torch.tensor([[3.0, -4.0]]))
        tensor([[ 0.6000, -0.8000]])
        >>> L2().dual_norm(torch.tensor([[3.0, -4.0]]))
        tensor([5.])
    """

    def norm(self, perturbation: Tensor) -> Tensor:
        """Return the Euclidean norm, ``(B, d)`` to ``(B,)``."""
        length: Tensor = torch.linalg.vector_norm(perturbation, dim=1)
        return length

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """Return the Euclidean norm, ``(B, d)`` to ``(B,)``."""
        return self.norm(gradient)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the unit vector along the gradient."""
        # division by the largest entry first: the squares of a saturated network's gradients underflow
        tiny = torch.finfo(gradient.dtype).tiny
        scaled = gradient / gradient.abs().amax(1, keepdim=True).clamp_min(tiny)
        direction: Tensor = scaled / scaled.norm(dim=1, keepdim=True).clamp_min(tiny)
        return direction

    def typical_entry(self, num_entries: int) -> float:
        """Return ``1 / sqrt(d)``."""
        return 1 / math.sqrt(num_entries)


@dataclass(frozen=True)
class LInf(Geometry):
    r"""The largest entry, :math:`\|\delta\|_\infty`; its dual is :math:`\|g\|_1`, its steepest perturbation the sign.

    Example:
        >>> LInf().steepest(torch.tensor([[3.0, -4.0, 0.0]]))
        tensor([[ 1., -1.,  0.]])
        >>> LInf().dual_norm(torch.tensor([[3.0, -4.0, 0.0]]))
        tensor([7.])
    """

    def norm(self, perturbation: Tensor) -> Tensor:
        """Return the largest absolute entry, ``(B, d)`` to ``(B,)``."""
        return perturbation.abs().amax(1)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """Return the sum of the absolute entries, ``(B, d)`` to ``(B,)``."""
        return gradient.abs().sum(1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the signs of the entries."""
        return gradient.sign()

    def typical_entry(self, num_entries: int) -> float:
        """Return 1."""
        return 1.0


EUCLIDEAN = L2()
GEOMETRY = Argument("geometry", ("L2()", "LInf()"), ("norm", "dual_norm", "steepest", "typical_entry"))
