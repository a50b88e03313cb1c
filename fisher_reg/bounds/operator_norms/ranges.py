"""Ranges of the entries of a value, or of its vectors along the last axis."""

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

    If the vectors are parts of such vectors, ``columns``, of the shape of the value, holds the indices of their entries
    in ``c``.
    """

    radius: Tensor
    norm: Tensor
    columns: Tensor | None = None

    @property
    def of_tokens(self) -> Ball:
        """The same ball if the vectors along the axis before the last share their centre, else one with centre 0."""
        shared = self.columns is None or bool((self.columns == self.columns[..., :1, :]).all())
        return self if shared else Ball(self.norm, self.norm)


@dataclass(frozen=True)
class Interval:
    """All entries lie between two ends, which may be infinite."""

    low: float
    high: float


Range = Tokens | Ball | Interval


def largest_entry(known: Range | None) -> float:
    """Return a bound of the modulus of the entries; infinity if it is not known."""
    if isinstance(known, Interval):
        return max(abs(known.low), abs(known.high))
    if isinstance(known, Tokens):
        return float((known.beta.detach().abs() + known.gamma.detach().abs() * known.radius).amax())
    return math.inf if known is None else float(known.norm)


def largest_length(known: Range | None, size: int) -> float:
    """Return a bound of the norm of vectors of ``size`` entries along the last axis; infinity if it is not known."""
    if isinstance(known, Ball):
        return float(known.norm)
    if isinstance(known, Tokens):
        ball = ball_of(known)
        return float(ball.norm)
    return math.sqrt(size) * largest_entry(known)


def ball_of(tokens: Tokens) -> Ball:
    """Return a ball that contains the tokens, around their bias."""
    # |gamma * y| <= max|gamma| r, and |x| <= max|gamma| r + |beta|
    radius = tokens.gamma.detach().double().abs().amax() * tokens.radius
    return Ball(radius, radius + tokens.beta.detach().double().norm())
