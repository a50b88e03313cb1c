"""Search spaces of a batch, and their Ritz vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.solvers.linalg import inner_products, new_direction, symmetric_eigen
from fisher_reg.solvers.protocols import FactoredOperator


@dataclass(frozen=True)
class Space:
    """Search spaces of a batch.

    Attributes:
        left: W, orthonormal rows ``(B, m, K)``; zero if a vector had no component outside the space.
        rows: ``W A``, ``(B, m, d)``.
        gram: ``H = W A Aᵀ Wᵀ``, the projection of ``G``, ``(B, m, m)`` in double precision.
    """

    left: Tensor
    rows: Tensor
    gram: Tensor

    @classmethod
    def of(cls, operator: FactoredOperator, vectors: Tensor) -> Space:
        """Return the spans of ``vectors`` ``(B, n, K)``: ``n`` backward passes."""
        nothing = vectors.new_empty(len(vectors), 0, 0)
        return cls(vectors[:, :0], nothing, nothing.double()).extended(operator, vectors)

    def extended(self, operator: FactoredOperator, vectors: Tensor) -> Space:
        """Orthonormalise ``vectors`` ``(B, n, K)`` and add them: one backward pass each."""
        left, rows, gram = self.left, self.rows, self.gram
        for vector in vectors.unbind(1):
            direction = new_direction(vector, left)
            row = operator.adjoint(direction)[:, None]  # r_m = A^T u_m
            left = torch.cat([left, direction[:, None]], 1)
            rows = torch.cat([rows, row], 1) if rows.numel() else row
            products = inner_products(rows, row)  # H_{im} = r_i^T r_m
            gram = torch.cat([torch.cat([gram, products[:, :-1]], 2), products.mT], 1)
        return Space(left, rows, gram)

    def ritz(self, num_eigenpairs: int) -> Ritz:
        """Return the Ritz vectors of the largest Ritz values."""
        values, vectors = symmetric_eigen(self.gram)  # H s_i = theta_i s_i
        if vectors.shape[1] < num_eigenpairs:
            raise ValueError(f"A space of {vectors.shape[1]} vectors has no {num_eigenpairs} eigenpairs.")
        top = vectors[:, :, -num_eigenpairs:].flip(2).mT.to(self.left.dtype)
        return Ritz(
            left=top @ self.left,  # y_i = W^T s_i
            row=top @ self.rows,
            all_values=values.flip(1).clamp_min(0),
        )


@dataclass(frozen=True)
class Ritz:
    """Ritz vectors of a batch of spaces.

    Attributes:
        left: Those of the largest Ritz values, ``(B, k, K)``.
        row: ``left A``, ``(B, k, d)``.
        all_values: The Ritz values ``(B, m)``, descending, in double precision.
    """

    left: Tensor
    row: Tensor
    all_values: Tensor

    @property
    def value(self) -> Tensor:
        """The largest Ritz values ``(B, k)``, in double precision."""
        return self.all_values[:, : self.left.shape[1]]
