r"""Trace of :math:`F = A^\top A`: exact on the search space of a solver, and random probes on its complement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.arguments import PROBE, SOLVER
from fisher_reg.probes import Probe, Rademacher
from fisher_reg.sampling import fixed_generator
from fisher_reg.solvers import EigenResult, FactoredOperator, Lanczos, Solver, TraceEstimator
from fisher_reg.solvers.linalg import check_positive, outside


@dataclass(frozen=True)
class Hutchinson(TraceEstimator):
    r"""Trace of F: exact on the search space of a solver, by random probes :math:`\epsilon` on its complement.

    .. math:: \mathrm{tr} F = \sum_i \theta_i + \mathrm{E} \|A^\top (I - W^\top W)\, \epsilon\|^2

    with the Ritz values :math:`\theta_i` of the search space :math:`W`. Unbiased, since :math:`\epsilon` is independent
    of the space, and never below the largest Ritz value. Only the trace on the complement is sampled: on trained
    networks a few per cent of the whole. All examples use the same probes.

    Costs ``num_samples`` backward passes in addition to those of the solver.

    References: Hutchinson (1989), "A stochastic estimator of the trace of the influence matrix"; Meyer, Musco, Musco,
    Woodruff (2021), "Hutch++", for the space.

    Args:
        num_samples: Probes per example.
        probe: :class:`Rademacher`, :class:`StandardNormal` or :class:`SampledLabels`, which state the variances of a
            sample without a search space.
        solver: Solver that gives the search space; None for no search space, so that the whole trace is sampled. With
            exact derivatives the estimate of an example depends on the rest of the batch only by round-off.
    """

    num_samples: int = 8
    probe: Probe = Rademacher()
    solver: Solver | None = Lanczos(is_exact=True)

    def __post_init__(self) -> None:
        PROBE.check(self.probe, self)
        SOLVER.check(self.solver, self)
        check_positive(self, num_samples=self.num_samples)

    def trace(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Solve, and sample the rest: ``(B,)``."""
        if self.solver is None:
            return self._sampled(operator, None, generator)
        return self.trace_beside(operator, self.solver.solve(operator, generator), generator)

    def trace_beside(
        self, operator: FactoredOperator, result: EigenResult, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the trace, sampled only outside the search space of ``result``, which is of the same operator.

        Returns:
            ``(B,)``; without a pass if the space is complete, as that of :class:`fisher_reg.Exact`.
        """
        known = result.known_trace
        space = result.search_space
        if space.shape[1] == 0:
            return known
        return known + self._sampled(operator, space, generator)

    def _sampled(self, operator: FactoredOperator, space: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            generator = fixed_generator(_SEED)
        total = 0.0 * operator.starts(1)[:, 0, 0]
        for _ in range(self.num_samples):
            epsilon = self.probe.draw(operator, generator)
            if space is not None:
                epsilon = outside(epsilon, space)
            total = total + operator.adjoint(epsilon).square().sum(1)
        return total / self.num_samples


_SEED = 7919_2026_0002  # the solver's random vectors, which shape the search space, have another
