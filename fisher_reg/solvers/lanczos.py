"""The default solver: a few passes, for any number of classes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_reg.solvers.deflated import Deflated
from fisher_reg.solvers.interval import RandomStart, check_probability
from fisher_reg.solvers.linalg import check_positive, inner_products, outside, unit
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.result import EigenResult, Solver
from fisher_reg.solvers.search import Plan, random_source, search
from fisher_reg.solvers.space import Space


@dataclass(frozen=True)
class Lanczos(Solver):
    r"""Golub-Kahan bidiagonalisation of ``A`` from the sum of a guess and a random vector.

    The guess is the whitened contrast of the two likeliest classes. The top eigenvector may belong to another class.
    The random part has a component along it for every network and input, except with the ``failure_probability``. The
    iteration stops when the interval of the largest eigenvalue (:meth:`fisher_reg.EigenResult.interval`) is as narrow
    as ``tolerance`` and the residual as small as ``rtol``; only then does an example count as converged. Otherwise its
    ``converged`` is false after ``num_steps``.

    Costs at most ``num_starts + num_steps`` backward and ``num_steps + 1`` forward-mode passes, for any ``K``; on
    trained networks with ten classes about four backward passes and four forwards. Examples that have converged are
    removed from the batch once they are half of it.

    References: Golub, Kahan (1965), "Calculating the singular values and pseudo-inverse of a matrix"; for the random
    part those of :mod:`fisher_reg.solvers.interval`.

    Args:
        num_steps: Largest number of vectors that are added to the start; at least 1.
        num_starts: Number of candidate vectors (whitened contrasts and indicators of the likeliest classes), at most
            ``K``. The guess is their top Ritz vector; more than one candidate cost a backward pass each.
        rtol: Residual, relative to the eigenvalue, at which an example may stop. The error of the eigenvalue is of the
            order of its square. Below 1e-2 all derivatives are exact.
        tolerance: Relative width of the interval at which an example may stop.
        failure_probability: That of the interval, per example, over the draw of the random vector.
        is_exact: Whether forward-mode derivatives are always exact. Otherwise they may be difference quotients with a
            measured error, which cost one forward each. These suffice for the eigenvalue and for ``converged``, but
            prove nothing, so that :meth:`fisher_reg.EigenResult.interval` needs exact derivatives.

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
        """Return the largest eigenpair of each operator; ``generator`` draws the random vector."""
        guess, num_matvecs = operator.starts(self.num_starts), 0
        if guess.shape[1] > 1:
            guess, num_matvecs = Space.of(operator, guess).ritz(1).left, guess.shape[1]
        result = search(operator, guess[:, 0], self._plan(), generator)
        return replace(result, num_matvecs=result.num_matvecs + num_matvecs)

    def eigenpairs(
        self, operator: FactoredOperator, num_eigenpairs: int, generator: torch.Generator | None = None
    ) -> EigenResult:
        """Return the largest eigenpairs, with multiplicity; fields have axes ``(B, num_eigenpairs)``.

        The pairs are computed one after the other, each orthogonal to the pairs before it. Each costs as much as
        :meth:`solve`. A pair counts as converged only if all pairs before it have converged too.
        """
        # earlier pairs depend on earlier random vectors, so each search draws a new, independent one
        generator = random_source(generator)
        starts = operator.starts(num_eigenpairs)
        found, results = starts[:, :0], list[EigenResult]()
        for i in range(num_eigenpairs):
            deflated = Deflated(operator, found)
            results.append(search(deflated, outside(starts[:, i], found), self._plan(), generator))
            found = torch.cat([found, unit(outside(results[-1].left_singular_vector, found))[:, None]], 1)
        return _joined(results, found)

    def _plan(self) -> Plan:
        return Plan(
            solver=self,
            num_steps=self.num_steps,
            rtol=self.rtol,
            tolerance=self.tolerance,
            failure_probability=self.failure_probability,
            is_exact=self.is_exact,
        )


def _joined(results: list[EigenResult], left: Tensor) -> EigenResult:
    """Return the Ritz pairs of the span of the eigenvectors that were found."""

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(result, name) for result in results], 1)

    rows = stacked("eigenvector") * stacked("eigenvalue").sqrt()[:, :, None]
    ritz = Space(left, rows, inner_products(rows, rows)).ritz(len(results))
    # y = sum_i c_i u_i has a residual of at most sum_i |c_i| times that of u_i
    weights = (ritz.left @ left.mT).abs()
    value = ritz.value.to(rows.dtype)
    return EigenResult(
        eigenvalue=value,
        eigenvector=unit(ritz.row),
        left_singular_vector=ritz.left,
        residual=(weights @ stacked("residual")[:, :, None]).squeeze(2),
        converged=stacked("converged").long().cumprod(1).bool(),
        ritz_values=value,
        num_steps=stacked("num_steps").sum(1),
        num_matvecs=sum(result.num_matvecs for result in results),
        solver=results[0].solver,
        residual_is_exact=results[0].residual_is_exact,
        rounding=stacked("rounding").amax(1),
        random_start=RandomStart.none(len(rows)),
        search_space=left,
    )
