"""The default solver: a few passes, whatever the number of classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisher_reg.solvers.interval import check_probability
from fisher_reg.solvers.linalg import check_positive
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.result import EigenResult, Solver, leading
from fisher_reg.solvers.search import Plan, search


@dataclass(frozen=True)
class Lanczos(Solver):
    r"""Rayleigh-Ritz on a growing subspace of outputs; for one start this is Golub-Kahan bidiagonalisation of ``A``.

    The space begins with ``num_starts`` vectors, whitened contrasts and indicators of the likeliest classes, and grows
    by the residual of its best vector until that is small. A class outside the starts may then have been overlooked.
    Therefore a random vector, orthogonal to the space, takes Lanczos steps of its own, at least one, until the interval
    of the largest eigenvalue is narrow at the ``failure_probability`` (:meth:`fisher_reg.EigenResult.interval`); what
    they find joins the space. An example counts as converged only then. One that has not converged within ``num_steps``
    says so.

    Costs ``num_starts + num_steps`` backward and ``num_steps + 1`` forward-mode passes at most, whatever ``K``; on
    trained networks with ten classes about 5 backward passes and 3 forwards. An example that has converged drops out of
    the batch.

    References: Golub, Kahan (1965), "Calculating the singular values and pseudo-inverse of a matrix"; Morgan, Scott
    (1986), "Generalizations of Davidson's method", for spaces that grow by residuals.

    Args:
        num_steps: Largest number of vectors that are added to the starts; at least 1.
        num_starts: Vectors to begin with, at most ``K`` of them are used. One gives the narrowest interval, since what
            the space leaves out is then known for all of its vectors.
        rtol: Residual, relative to the eigenvalue, up to which the space grows by residuals. The error of the
            eigenvalue is of the order of its square. Below 1e-2 all derivatives are exact.
        tolerance: Relative width of the interval at which an example stops and counts as converged.
        failure_probability: Of that interval, per example, over the draw of the random vector.
        is_exact: Whether forward-mode derivatives are always exact. They may otherwise be difference quotients with a
            measured error, which cost one forward each: good enough for the eigenvalue and for ``converged``, but no
            proof, so that :meth:`fisher_reg.EigenResult.interval` asks for exact ones.

    Raises:
        ValueError: If a count is below 1, or ``failure_probability`` is not strictly between 0 and 1.
    """

    num_steps: int = 10
    num_starts: int = 1
    rtol: float = 5e-2
    tolerance: float = 0.05
    failure_probability: float = 0.02
    is_exact: bool = False

    def __post_init__(self) -> None:
        check_positive(self, num_steps=self.num_steps, num_starts=self.num_starts)
        check_probability("failure_probability of Lanczos", self.failure_probability)

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Return the largest eigenpair of each operator; ``generator`` draws the random vectors."""
        return leading(self.eigenpairs(operator, 1, generator))

    def eigenpairs(
        self, operator: FactoredOperator, num_eigenpairs: int, generator: torch.Generator | None = None
    ) -> EigenResult:
        """Return the largest eigenpairs, the fields with axes ``(B, num_eigenpairs)``.

        Each step costs one pass per eigenpair, forward and backward; an example stops when all of its pairs have
        reached ``rtol`` and the random vector has found nothing larger.
        """
        plan = Plan(
            solver=self,
            num_steps=self.num_steps,
            rtol=self.rtol,
            tolerance=self.tolerance,
            failure_probability=self.failure_probability,
            is_exact=self.is_exact,
            num_eigenpairs=num_eigenpairs,
        )
        return search(operator, operator.starts(max(self.num_starts, num_eigenpairs)), plan, generator)
