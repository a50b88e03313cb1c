"""The black-box estimator of the paper's code: the largest of random directional quotients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisher_reg.blackbox.questions import Questions
from fisher_reg.blackbox.result import BlackBoxResult
from fisher_reg.blackbox.service import Service
from fisher_reg.blackbox.sketch import check_budget


@dataclass(frozen=True)
class BlackBoxMax:
    r"""The largest of random directional quotients :math:`v^\top F v`, unit ``v``, as in the code of the paper.

    Of the order :math:`\mathrm{tr} F / d`: too low by a factor of a thousand for images. For comparison only;
    :class:`BlackBox` is accurate with the same number of queries. It has no self-check: constant predictions give
    zero.

    Args:
        num_queries: Number of queries per example, two per direction; with an odd number one is not used.
        step: Length of the central differences, in input units.
    """

    num_queries: int = 200
    step: float = 1e-3

    def __post_init__(self) -> None:
        check_budget(self, self.num_queries, self.step)

    @property
    def num_questions(self) -> int:
        """Number of queries per example."""
        return self.num_queries // 2 * 2

    def check(self, questions: Questions) -> None:
        """Raise an error for bounds that are too narrow for the steps."""
        largest = float(questions.largest_step().min())
        if self.step > largest:
            raise ValueError(f"BlackBoxMax(step={self.step}) leaves the bounds; pass at most {largest:.3g}.")

    def estimate(self, service: Service, questions: Questions, generator: torch.Generator) -> BlackBoxResult:
        """Return the largest quotient."""
        size = questions.inputs.new_full((len(questions.inputs),), self.step)
        quotients = []
        for _ in range(self.num_questions // 2):
            direction = questions.unit_direction(generator)
            ahead = service.roots(questions.around(size, size, direction))
            behind = service.roots(questions.around(size, -size, direction))
            # v' F v = |J_g v|^2 with J_g v = (g(x + h v) - g(x - h v)) / (2 h)
            quotients.append(((ahead - behind) / (2 * self.step)).square().sum(1))
        values = torch.stack(quotients).to(size)
        return BlackBoxResult(
            eigenvalue=values.amax(0),
            standard_error=torch.full_like(size, torch.nan),
            bias_bound=torch.full_like(size, torch.nan),
            trace=values.mean(0) * questions.inputs[0].numel(),  # tr F = d E[v' F v]
            step=size,
            num_queries=self.num_questions,
            reason=("",) * len(size),
        )
