"""What an estimate by queries returns, and why an example may have none."""

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
    r"""Largest eigenvalue of the input-space Fisher matrix by queries alone, with its uncertainty.

    Attributes:
        eigenvalue: ``(B,)``, in nats per squared input unit; NaN where ``reason`` says why there is no number.
        standard_error: ``(B,)``, in the same unit; NaN where the estimator has none.
        bias_bound: ``(B,)``. What the expectation may exceed the truth by, at most, before the correction; NaN where
            the estimator is biased low.
        trace: ``(B,)``. The mean squared length of the quotients less that of their mean: unbiased for
            :math:`\mathrm{tr} F` of a function that is linear over the step. NaN where ``eigenvalue`` is.
        step: ``(B,)``. Length of the steps per unit of direction, in input units.
        num_queries: Questions that were asked about each example, exactly. A question is one call of ``predict``, or
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
    """Spends queries on an estimate."""

    @property
    def num_questions(self) -> int:
        """Questions per example, exactly."""

    def check(self, questions: Questions) -> None:
        """Refuse, before any query, bounds that leave no room for the steps."""

    def estimate(self, service: Service, questions: Questions, generator: torch.Generator) -> BlackBoxResult:
        """Return the estimate, where ``service.roots`` answers ``g`` ``(B, K)``."""


def warn_of_missing(reasons: tuple[str, ...]) -> None:
    """Warn of the examples without a number: how many for each reason, and what to do."""
    counts = Counter(reason for reason in reasons if reason)
    if counts:
        found = [f"{count} of {len(reasons)} because {why}. {_REMEDIES[why]}" for why, count in counts.items()]
        warnings.warn(" ".join(["The eigenvalue is NaN at", *found]), UserWarning, stacklevel=3)
