"""Where the entries of a value, or its vectors along the last axis, lie, if that is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    r"""All vectors along the last axis lie in :math:`\{\gamma \odot y + \beta : \|y\| \le r\}`."""

    gamma: Tensor
    beta: Tensor
    radius: float


@dataclass(frozen=True)
class Ball:
    """All vectors ``v`` along the last axis have ``|v - c| <= radius`` for one ``c``, and ``|v| <= norm``.

    Where the vectors are parts of such, ``columns``, of the shape of the value, says which entries of ``c`` they meet.
    """

    radius: Tensor
    norm: Tensor
    columns: Tensor | None = None

    @property
    def of_tokens(self) -> Ball:
        """The same where the vectors along the axis before the last share their centre, else with the centre 0."""
        shared = self.columns is None or bool((self.columns == self.columns[..., :1, :]).all())
        return self if shared else Ball(self.norm, self.norm)


@dataclass(frozen=True)
class Interval:
    """All entries lie between two ends, which may be infinite."""

    low: float
    high: float


Range = Tokens | Ball | Interval


def largest_entry(known: Range | None) -> float:
    """Return how large an entry can be in modulus, infinity where that is not known."""
    if isinstance(known, Interval):
        return max(abs(known.low), abs(known.high))
    if isinstance(known, Tokens):
        return float((known.beta.detach().abs() + known.gamma.detach().abs() * known.radius).amax())
    return math.inf if known is None else float(known.norm)


def largest_length(known: Range | None, size: int) -> float:
    """Return how long a vector of ``size`` entries along the last axis can be, infinity where that is not known."""
    if isinstance(known, Ball):
        return float(known.norm)
    if isinstance(known, Tokens):
        ball = ball_of(known)
        return float(ball.norm)
    return math.sqrt(size) * largest_entry(known)


def ball_of(tokens: Tokens) -> Ball:
    """Return a ball that holds the tokens, around their bias."""
    radius = tokens.gamma.detach().double().abs().amax() * tokens.radius
    return Ball(radius, radius + tokens.beta.detach().double().norm())
