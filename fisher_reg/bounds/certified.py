"""The two ways to measure the weights of a layer: certified, and cheap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.bounds.conv import Geometry, conv_norm, conv_transpose_norm, linear_norm


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


@dataclass(frozen=True)
class SchattenNorms:
    """Fourth roots of sums of fourth powers of singular values: no bounds, but cheap and smooth, to choose coordinates.

    A convolution is taken as the matrix of its kernel.
    """

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the Schatten-4 norm."""
        flat = weight.flatten(1)
        gram = flat @ flat.mT if flat.shape[0] < flat.shape[1] else flat.mT @ flat
        square: Tensor = torch.linalg.vector_norm(gram)
        return square.sqrt()

    def convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the Schatten-4 norm of the flattened kernel."""
        return self.matrix(weight)

    def transposed_convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the Schatten-4 norm of the flattened kernel."""
        return self.matrix(weight)
