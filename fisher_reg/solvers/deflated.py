"""An operator without the directions that have been found already."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.solvers.linalg import outside
from fisher_reg.solvers.protocols import FactoredOperator


@dataclass(frozen=True)
class Deflated:
    r""":math:`(1 - W^\top W) A` for the orthonormal rows of ``found``: the eigenvalues of F that are not theirs.

    Attributes:
        operator: A.
        found: W, ``(B, n, K)``.
    """

    operator: FactoredOperator
    found: Tensor

    def starts(self, count: int) -> Tensor:
        """Return the start vectors of the operator outside what was found."""
        return torch.stack([outside(start, self.found) for start in self.operator.starts(count).unbind(1)], 1)

    def labels(self, generator: torch.Generator | None) -> Tensor:
        """Return the labels of the operator."""
        return self.operator.labels(generator)

    def apply(self, tangent: Tensor, /, *, exact: bool = False, slope: Tensor | None = None) -> Tensor:
        """Return the product with A, less what was found."""
        return outside(self.operator.apply(tangent, exact=exact, slope=slope), self.found)

    def slope_along(self, cotangent: Tensor, row: Tensor, /) -> Tensor:
        """Return that of the operator."""
        return self.operator.slope_along(outside(cotangent, self.found), row)

    def adjoint(self, cotangent: Tensor, /) -> Tensor:
        """Return the product with the transpose of A of what is left of the vector."""
        return self.operator.adjoint(outside(cotangent, self.found))

    def restrict(self, keep: Tensor, /) -> Deflated | None:
        """Return that of some examples."""
        smaller = self.operator.restrict(keep)
        return None if smaller is None else Deflated(smaller, self.found[keep])
