"""The Rayleigh quotient of a given vector, with its residual."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_reg.solvers.linalg import check_finite, unit
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.result import EigenResult, Solver


def eigenpair_along(operator: FactoredOperator, u: Tensor, solver: Solver, *, is_exact: bool) -> EigenResult:
    r"""Return :math:`\theta = \|A^\top u\|^2` of unit vectors ``u``: one backward pass and one product with A.

    This says nothing about larger eigenvalues, so that no example counts as converged.

    Args:
        operator: A.
        u: ``(B, K)``.
        solver: The solver to name in the result.
        is_exact: Whether the residual must be exact up to rounding; else it may come from a difference quotient.

    Returns:
        The eigenpair with its residual.
    """
    row = operator.adjoint(u)
    check_finite(row)
    image = operator.apply(unit(row), exact=is_exact, slope=operator.slope_along(u, row))
    check_finite(image)
    root = row.double().norm(dim=1)
    theta = root.square()  # theta = ||A^T u||^2
    value = theta.to(row.dtype)
    # A A^T u = sqrt(theta) A v, so that ||A A^T u - theta u|| = sqrt(theta) ||A v - sqrt(theta) u||
    residual = root * (image.double() - root[:, None] * u.double()).norm(dim=1)
    return EigenResult(
        eigenvalue=value,
        eigenvector=unit(row),
        left_singular_vector=u,
        residual=residual.to(row.dtype),
        converged=torch.zeros_like(value, dtype=torch.bool),
        ritz_values=value[:, None],
        couplings=residual.to(row.dtype)[:, None],
        num_steps=torch.zeros_like(value, dtype=torch.long),
        num_matvecs=2,
        solver=solver,
        residual_is_exact=is_exact,
    )
