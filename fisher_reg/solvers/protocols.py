r"""The input of a solver: a batch of matrices :math:`F = A^\top A`, given by products with ``A`` and ``Aᵀ`` only."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self


class FactoredOperator(Protocol):
    """A batch of linear maps ``A``, each ``(K, d)``."""

    def starts(self, count: int) -> Tensor:
        """At most ``count`` start vectors ``(B, count, K)``, the most promising one first."""

    def labels(self, generator: torch.Generator | None) -> Tensor:
        """Random ``(B, K)`` with the identity as second moment, from labels drawn under the model."""

    def apply(self, tangent: Tensor, /, *, exact: bool = False, slope: Tensor | None = None) -> Tensor:
        """``A v``, ``(B, d)`` to ``(B, K)``; given a ``slope`` and not ``exact``, it may be a difference quotient."""

    def slope_along(self, cotangent: Tensor, row: Tensor, /) -> Tensor:
        """Rate of change of the logits along ``row = Aᵀ u``, ``(B,)``: it sets the step of a difference quotient."""

    def adjoint(self, cotangent: Tensor, /) -> Tensor:
        """``Aᵀ u``, ``(B, K)`` to ``(B, d)``, exact up to rounding."""

    def restrict(self, keep: Tensor, /) -> Self | None:
        """Return the operators at the indices ``keep`` ``(b,)``, or None if only the whole batch can be applied."""
