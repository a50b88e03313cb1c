"""The result of an estimate by queries, and the reasons for which an example may have none."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fisher_reg.blackbox.questions import Questions
from fisher_reg.blackbox.service import Service
from fisher_reg.printing import examples, spread, table

CONSTANT = "no answer differs from the one at the input"
UNRESOLVED = "the answers do not resolve the step"
CLIPPED = "steps that leave the range of the input change nothing: the service clips or rounds its inputs"

_REMEDIES = {
    CONSTANT: "The probabilities are labels or round to 0 and 1 there: ask for probabilities in more digits.",
    UNRESOLVED: "Difference quotients at several steps disagree, as they do where the service rounds its inputs or "
    "answers, returns labels, or is a step function such as a forest: ask for float32 on both sides. If "
    "it clips its inputs, pass bounds=(low, high). Near kinks of the network, add a little noise to the inputs.",
    CLIPPED: "If it clips, pass the range of the inputs, such as bounds=(0, 1); if it rounds, ask for float32.",
}


@dataclass(frozen=True)
class BlackBoxResult:
    r"""Largest eigenvalue of the input-space Fisher matrix, from queries only, with its uncertainty.

    Attributes:
        eigenvalue: ``(B,)``, in nats per squared input unit; NaN where ``reason`` is not empty.
        standard_error: ``(B,)``, in the same unit; NaN if the estimator has none.
        bias_bound: ``(B,)``. Upper bound of the bias before the correction; NaN if the estimator is biased low.
        trace: ``(B,)``. The variance of the quotients, summed over their entries: unbiased for :math:`\mathrm{tr} F` if
            the function is linear over the step. NaN where ``eigenvalue`` is.
        step: ``(B,)``. Length of the steps per unit of direction, in input units.
        num_queries: Exact number of queries per example. A query is one call of ``predict``, or
            ``ceil(B / max_batch_size)`` calls.
        reason: ``B`` texts: why the eigenvalue is NaN, empty where it is a number.
    """

    eigenvalue: Tensor
    standard_error: Tensor
    bias_bound: Tensor
    trace: Tensor
    step: Tensor
    num_queries: int
    reason: tuple[str, ...]

    def __repr__(self) -> str:
        missing = int(self.eigenvalue.isnan().sum())
        return (
            f"BlackBoxResult({examples(len(self.eigenvalue))}: eigenvalue {spread(self.eigenvalue)}; "
            f"{missing} without a number; {self.num_queries} queries each)"
        )

    def __str__(self) -> str:
        columns = {"λ": self.eigenvalue, "standard error": self.standard_error, "trace": self.trace, "step": self.step}
        reasons = [f"example {i}: NaN, since {why}" for i, why in enumerate(self.reason) if why]
        return table(f"Largest eigenvalue λ of F by {self.num_queries} queries each", columns, "\n".join(reasons[:8]))


class BlackBoxEstimator(Protocol):
    """Computes an estimate from queries."""

    @property
    def num_questions(self) -> int:
        """Exact number of queries per example."""

    def check(self, questions: Questions) -> None:
        """Check, before any query, that the steps fit into the bounds."""

    def estimate(self, service: Service, questions: Questions, generator: torch.Generator) -> BlackBoxResult:
        """Return the estimate; ``service.roots`` returns ``g`` ``(B, K)``."""


def warn_of_missing(reasons: tuple[str, ...]) -> None:
    """Warn about the examples without a number: their count for each reason, and the remedy."""
    counts = Counter(reason for reason in reasons if reason)
    if counts:
        found = [f"{count} of {len(reasons)} because {why}. {_REMEDIES[why]}" for why, count in counts.items()]
        warnings.warn(" ".join(["The eigenvalue is NaN at", *found]), UserWarning, stacklevel=3)
