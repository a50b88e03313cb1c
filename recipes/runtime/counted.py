"""Count of the passes of a solver by kind, with their share of the batch and their time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fisher_reg import InputFisher

T = TypeVar("T")

BACKWARD, QUOTIENT, EXACT, FORWARD = "backward pass", "difference quotient", "forward-mode pass", "forward of a part"
IN_FORWARDS = {BACKWARD: 1, QUOTIENT: 1, EXACT: 3, FORWARD: 1}
"""Approximate cost of a pass, to compare counts."""


@dataclass
class Passes:
    """The counts by kind of pass.

    Attributes:
        calls: Number of passes.
        shares: Sum of the shares of the batch in these passes.
        seconds: Duration of the passes.
    """

    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(IN_FORWARDS, 0))
    shares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(IN_FORWARDS, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(IN_FORWARDS, 0.0))

    @property
    def in_forwards(self) -> float:
        """The cost per image in forwards, including the one that created the graph."""
        return 1 + sum(IN_FORWARDS[kind] * share for kind, share in self.shares.items())

    def timed(self, kind: str, share: float, call: Callable[[], T]) -> T:
        """Return the result of a call, which is one pass."""
        begin = time.perf_counter()
        result = call()
        self.seconds[kind] += time.perf_counter() - begin
        self.calls[kind] += 1
        self.shares[kind] += share
        return result


class Counted:
    """An operator that counts its passes.

    Args:
        operator: The operator of the whole batch, or of the remaining examples.
        passes: Stores the counts.
        guess: Start vectors ``(B, n, K)`` instead of those of the operator.
        batch_size: Size of the whole batch; by default that of the operator.
    """

    def __init__(
        self, operator: InputFisher, passes: Passes, guess: Tensor | None = None, batch_size: int | None = None
    ) -> None:
        self.operator = operator
        self.passes = passes
        self.guess = guess
        self.batch_size = batch_size or len(operator.inputs)
        self.share = len(operator.inputs) / self.batch_size

    def starts(self, count: int) -> Tensor:
        """Return the given vectors, for any ``count``, or those of the operator."""
        return self.operator.starts(count) if self.guess is None else self.guess

    def apply(self, tangent: Tensor, *, exact: bool = False, slope: Tensor | None = None) -> Tensor:
        """Count a difference quotient or a forward-mode pass."""
        kind = QUOTIENT if self.operator.quotients and slope is not None and not exact else EXACT
        return self.passes.timed(kind, self.share, lambda: self.operator.apply(tangent, exact=exact, slope=slope))

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Count a backward pass."""
        return self.passes.timed(BACKWARD, self.share, lambda: self.operator.adjoint(cotangent))

    def labels(self, generator: torch.Generator | None) -> Tensor:
        """Return labels; no pass is counted."""
        return self.operator.labels(generator)

    def slope_along(self, cotangent: Tensor, row: Tensor) -> Tensor:
        """Return the slope; no pass is counted."""
        return self.operator.slope_along(cotangent, row)

    def restrict(self, keep: Tensor) -> Counted | None:
        """Count the forward of the remaining examples."""
        share = self.share * len(keep) / len(self.operator.inputs)
        smaller = self.passes.timed(FORWARD, share, lambda: self.operator.restrict(keep))
        if smaller is None:
            return None
        return Counted(smaller, self.passes, None if self.guess is None else self.guess[keep], self.batch_size)
