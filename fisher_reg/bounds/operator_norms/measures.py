"""How the weights of a layer are measured for a bound: never below the true norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fisher_reg.bounds.operator_norms.conv import Geometry, conv_norm, conv_transpose_norm
from fisher_reg.bounds.operator_norms.matrix import linear_norm


@dataclass(frozen=True)
class CertifiedNorms:
    """Operator norms that the true ones never exceed.

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
