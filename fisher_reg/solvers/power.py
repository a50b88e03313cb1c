"""The power method: the white-box method of the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_reg.solvers.interval import check_probability
from fisher_reg.solvers.linalg import check_finite, check_positive, unit
from fisher_reg.solvers.pair import eigenpair_along
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.result import EigenResult, Solver
from fisher_reg.solvers.search import Plan, search


@dataclass(frozen=True)
class PowerIteration(Solver):
    """Power method with ``A Aᵀ``: the white-box method of the paper without its ``K x K`` matrix, for comparison.

    The limit is checked by at most ``num_probe_steps`` steps of :class:`Lanczos`, which alone needs fewer passes. If
    they find a larger eigenvalue, that one is the result.

    Args:
        max_iterations: Largest number of multiplications.
        rtol: Residual, relative to the eigenvalue, at which the iteration stops.
        tolerance: Relative width of the interval at which an example counts as converged.
        failure_probability: That of the interval.
        num_probe_steps: Largest number of steps of the check.
    """

    max_iterations: int = 100
    rtol: float = 5e-2
    tolerance: float = 0.05
    failure_probability: float = 0.02
    num_probe_steps: int = 8

    def __post_init__(self) -> None:
        check_positive(self, max_iterations=self.max_iterations, num_probe_steps=self.num_probe_steps)
        check_probability("failure_probability of PowerIteration", self.failure_probability)

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Iterate until all examples have converged or the limit is reached, then check the result."""
        vector, num_steps, num_matvecs = self._iterate(operator)
        power = eigenpair_along(operator, vector, self, is_exact=False)
        half = 0.5 * self.tolerance
        plan = Plan(
            solver=self,
            num_steps=self.num_probe_steps,
            rtol=self.rtol,
            tolerance=half,
            failure_probability=self.failure_probability,
        )
        check = search(operator, vector, plan, generator)
        # the upper end is at most (1 + half) check.eigenvalue, and must be at most (1 + tolerance) times the result
        is_low = check.eigenvalue > (1 + self.tolerance) / (1 + half) * power.eigenvalue
        is_small = power.residual <= self.rtol * power.eigenvalue
        return replace(
            check,
            eigenvalue=torch.where(is_low, check.eigenvalue, power.eigenvalue),
            eigenvector=torch.where(is_low[:, None], check.eigenvector, power.eigenvector),
            left_singular_vector=torch.where(is_low[:, None], check.left_singular_vector, power.left_singular_vector),
            residual=torch.where(is_low, check.residual, power.residual),
            converged=check.converged & (is_low | is_small),
            num_steps=check.num_steps + num_steps.to(check.num_steps),
            num_matvecs=check.num_matvecs + power.num_matvecs + num_matvecs,
        )

    def _iterate(self, operator: FactoredOperator) -> tuple[Tensor, Tensor, int]:
        """Return unit vectors ``(B, K)``, the number of multiplications of each ``(B,)``, and the number of passes."""
        u = unit(operator.starts(1)[:, 0])
        num_steps, num_matvecs = torch.zeros(len(u), dtype=torch.long, device=u.device), 0
        is_done = torch.zeros(len(u), dtype=torch.bool, device=u.device)
        for _ in range(self.max_iterations):
            row = operator.adjoint(u)  # A^T u = sqrt(theta) v
            image = operator.apply(unit(row), slope=operator.slope_along(u, row))
            check_finite(image)
            num_matvecs += 2
            # ||A A^T u - theta u|| <= rtol theta, with A A^T u = sqrt(theta) A v
            root = row.double().norm(dim=1, keepdim=True)
            is_done = is_done | ((image - root * u).norm(dim=1) <= self.rtol * root.squeeze(1))
            num_steps = num_steps + ~is_done
            u = torch.where(is_done[:, None], u, unit(image))  # u <- A A^T u / ||A A^T u||
            if bool(is_done.all()):
                break
        return u, num_steps, num_matvecs
