"""All eigenvalues, from the dense matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.solvers.interval import RandomStart
from fisher_reg.solvers.linalg import beyond_rank, dense_rows, inner_products, unit
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.result import EigenResult, Solver, TraceEstimator, leading
from fisher_reg.solvers.space import Space


@dataclass(frozen=True)
class Exact(Solver, TraceEstimator):
    r"""Eigenvalues of the ``K x K`` Gram matrix ``A Aᵀ``: ``K + 1`` backward passes, ``K d`` numbers per example.

    Exact up to rounding, and the cheapest solver for few classes. The last pass is one more VJP with the top
    eigenvector, which measures the rounding error of the passes. If that error is not small relative to the
    eigenvalue, the example does not count as converged.

    Args:
        rtol: Residual and rounding, relative to the eigenvalue, up to which a result counts as converged.
    """

    rtol: float = 1e-3

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Solve the dense eigenvalue problem; ``generator`` is not used."""
        return leading(self.eigenpairs(operator, 1))

    def eigenpairs(
        self, operator: FactoredOperator, num_eigenpairs: int, generator: torch.Generator | None = None
    ) -> EigenResult:
        """Return the largest eigenpairs, with multiplicity; fields have axes ``(B, num_eigenpairs)``.

        Pairs beyond the rank are zero.
        """
        rows = dense_rows(operator)
        count, num_outputs = len(rows), rows.shape[1]
        left = torch.eye(num_outputs, dtype=rows.dtype, device=rows.device).expand(count, -1, -1)
        space = Space(left, rows, inner_products(rows, rows))
        ritz = space.ritz(num_eigenpairs)
        again = operator.adjoint(ritz.left[:, 0])
        # eta: one sample of the rounding error of A^T u_1, times a safety factor
        eta = 3 * (again - ritz.row[:, 0]).double().norm(dim=1)
        eta = eta + 4 * torch.finfo(rows.dtype).eps * ritz.value[:, 0].sqrt()
        is_zero = beyond_rank(ritz.value, eta, num_outputs)
        value = ritz.value.masked_fill(is_zero, 0.0)
        product = inner_products(ritz.row, rows)
        residual = (product - value[:, :, None] * ritz.left).norm(dim=2)  # ||A A^T u_i - theta_i u_i||
        sensible = torch.isfinite(value.to(rows.dtype)) & ((value.to(rows.dtype) > 0) | (value == 0))
        wide = 2 * eta[:, None] * value.sqrt() <= self.rtol * value  # |(sqrt(theta) + eta)^2 - theta|, to first order
        return EigenResult(
            eigenvalue=value.to(rows.dtype),
            eigenvector=unit(ritz.row).masked_fill(is_zero[:, :, None], 0.0),
            left_singular_vector=ritz.left,
            residual=residual.to(rows.dtype),
            converged=((residual <= self.rtol * value) & wide & sensible) | is_zero,
            ritz_values=ritz.all_values.to(rows.dtype),
            couplings=torch.zeros_like(ritz.all_values).to(rows.dtype),
            num_steps=torch.zeros(count, dtype=torch.long, device=rows.device),
            num_matvecs=num_outputs + 1,
            solver=self,
            residual_is_exact=True,
            rounding=eta.to(rows.dtype),
            random_start=RandomStart.nothing_left(ritz.all_values),
            search_space=rows.new_zeros(count, 0, num_outputs),
        )

    def trace(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Return the squared Frobenius norm of ``A``, ``(B,)``."""
        rows = dense_rows(operator)
        total: Tensor = rows.double().square().sum((1, 2)).to(rows)
        return total
