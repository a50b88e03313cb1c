"""An operator projected onto the orthogonal complement of known left singular vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.solvers.linalg import outside
from fisher_reg.solvers.protocols import FactoredOperator


@dataclass(frozen=True)
class Deflated:
    r""":math:`(1 - W^\top W) A` for orthonormal rows W: its matrix has the remaining eigenvalues of F.

    Attributes:
        operator: A.
        found: W, ``(B, n, K)``.
    """

    operator: FactoredOperator
    found: Tensor

    def starts(self, count: int) -> Tensor:
        """Return the start vectors of the operator, projected onto the complement of W."""
        return torch.stack([outside(start, self.found) for start in self.operator.starts(count).unbind(1)], 1)

    def labels(self, generator: torch.Generator | None) -> Tensor:
        """Return the labels of the operator."""
        return self.operator.labels(generator)

    def apply(self, tangent: Tensor, /, *, exact: bool = False, slope: Tensor | None = None) -> Tensor:
        r"""Return :math:`(1 - W^\top W) A v`."""
        return outside(self.operator.apply(tangent, exact=exact, slope=slope), self.found)

    def slope_along(self, cotangent: Tensor, row: Tensor, /) -> Tensor:
        """Return the slope of the operator along the projected vector."""
        return self.operator.slope_along(outside(cotangent, self.found), row)

    def adjoint(self, cotangent: Tensor, /) -> Tensor:
        r"""Return :math:`A^\top (1 - W^\top W) u`."""
        return self.operator.adjoint(outside(cotangent, self.found))

    def restrict(self, keep: Tensor, /) -> Deflated | None:
        """Return the operator of the examples at ``keep``."""
        smaller = self.operator.restrict(keep)
        return None if smaller is None else Deflated(smaller, self.found[keep])
