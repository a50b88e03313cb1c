"""The estimator of the paper's code: the largest Rayleigh quotient of random directions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fisher_reg.probes import Probe, StandardNormal
from fisher_reg.sampling import fixed_generator
from fisher_reg.solvers.linalg import check_positive, unit
from fisher_reg.solvers.pair import eigenpair_along
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.result import EigenResult, Solver


@dataclass(frozen=True)
class HutchinsonMax(Solver):
    r"""The largest of ``num_samples`` random Rayleigh quotients of :math:`A A^\top`, as in the code of the paper.

    Biased low, and more so for larger ``K``: the squared component of a random direction along the top eigenvector is
    :math:`1/K` on average. For comparison only; :class:`Lanczos` is accurate at a fraction of the passes. No result
    counts as converged, since nothing bounds the error.

    Args:
        num_samples: Number of random directions, the same for all examples; one backward pass each.
        probe: :class:`fisher_reg.StandardNormal` as in the paper, or another.
        rtol: No effect; kept for older code.
    """

    num_samples: int = 100
    probe: Probe = StandardNormal()
    rtol: float = 5e-2

    def __post_init__(self) -> None:
        check_positive(self, num_samples=self.num_samples)

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Return the random direction of the largest Rayleigh quotient, with its residual."""
        like = operator.starts(1)[:, 0]
        if generator is None:
            generator = fixed_generator()
        best, value = torch.zeros_like(like), like.new_full((len(like), 1), -1.0)
        for _ in range(self.num_samples):
            direction = unit(self.probe.draw(operator, generator))
            quotient = operator.adjoint(direction).square().sum(1, keepdim=True)  # u^T A A^T u = ||A^T u||^2
            best = torch.where(quotient > value, direction, best)
            value = torch.maximum(quotient, value)
        result = eigenpair_along(operator, best, self, is_exact=True)
        return replace(result, num_matvecs=result.num_matvecs + self.num_samples)
