"""Where the vectors along the last axis of a value lie, if that is known."""

from __future__ import annotations

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
