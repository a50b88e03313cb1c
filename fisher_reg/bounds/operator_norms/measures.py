"""The norms of weights that a bound uses: upper bounds of the true norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fisher_reg.bounds.operator_norms.conv import Geometry, conv_norm, conv_transpose_norm
from fisher_reg.bounds.operator_norms.matrix import linear_norm


@dataclass(frozen=True)
class CertifiedNorms:
    """Upper bounds of operator norms.

    Args:
        dense: Whether a convolution on a small image may be bounded by its matrix.
    """

    dense: bool = True

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the spectral norm."""
        return linear_norm(weight)

    def convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return an upper bound of the operator norm."""
        return conv_norm(weight, geometry, dense=self.dense)

    def transposed_convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return an upper bound of the operator norm."""
        return conv_transpose_norm(weight, geometry, dense=self.dense)


class KnownNorms:
    """A cache of norms, for a search that needs the norm of the same weight several times.

    Args:
        norms: Computes the norms.
    """

    def __init__(self, norms: CertifiedNorms) -> None:
        self.norms = norms
        self._known: dict[tuple[object, ...], Tensor] = {}

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the spectral norm."""
        return self._found(("matrix", *_content(weight)), lambda: self.norms.matrix(weight))

    def convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return an upper bound of the operator norm."""
        key = ("convolution", geometry, *_content(weight))
        return self._found(key, lambda: self.norms.convolution(weight, geometry))

    def transposed_convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return an upper bound of the operator norm."""
        key = ("transposed", geometry, *_content(weight))
        return self._found(key, lambda: self.norms.transposed_convolution(weight, geometry))

    def _found(self, key: tuple[object, ...], compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            self._known[key] = compute().detach()
        return self._known[key]


def _content(weight: Tensor) -> tuple[object, ...]:
    """Return a key made of the entries, since a scaled weight is a new tensor each time."""
    return tuple(weight.shape), weight.detach().cpu().contiguous().numpy().tobytes()
