"""The Jacobians of the values of a network at the examples, with a cache of their norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

_ROUNDING = 1e-9
"""Relative excess of a spectral norm, far above the rounding of float64."""


class Tangents(Mapping[fx.Node, Tensor]):
    """The Jacobians of the values at the examples, ``(B, d, *S)`` each, with a cache of their norms.

    Args:
        jacobians: By node; empty if they are not known.
    """

    def __init__(self, jacobians: Mapping[fx.Node, Tensor]) -> None:
        self._jacobians = jacobians
        self._norms: dict[tuple[fx.Node, bytes], Tensor] = {}
        self._row_norms: dict[fx.Node, Tensor] = {}

    def __getitem__(self, node: fx.Node) -> Tensor:
        return self._jacobians[node]

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self._jacobians)

    def __len__(self) -> int:
        return len(self._jacobians)

    def row_norms(self, node: fx.Node) -> Tensor:
        """Return the norms of the rows of the Jacobian, in the shape of the value."""
        if node not in self._row_norms:
            self._row_norms[node] = torch.linalg.vector_norm(self._jacobians[node], dim=1)
        return self._row_norms[node]

    def log_norm(self, node: fx.Node, weights: Tensor | None) -> Tensor:
        """Return the logs of the spectral norms of the Jacobians with weighted rows, ``(B,)``."""
        key = node, b"" if weights is None else weights.detach().cpu().contiguous().numpy().tobytes()
        if key not in self._norms:
            self._norms[key] = _log_norm(self._jacobians[node], weights)
        return self._norms[key]


def _log_norm(tangents: Tensor, weights: Tensor | None) -> Tensor:
    """Return the logs of the spectral norms of Jacobians ``(B, d, *S)`` with weighted rows, ``(B,)``."""
    matrix = tangents if weights is None else tangents * weights.detach().expand(tangents[:, 0].shape)[:, None]
    flat = matrix.reshape(*matrix.shape[:2], -1)
    gram = flat @ flat.mT if flat.shape[1] <= flat.shape[2] else flat.mT @ flat
    largest: Tensor = torch.linalg.eigvalsh(gram)[:, -1]
    return 0.5 * (largest.clamp_min(0) * (1 + _ROUNDING)).log()
