"""Cheap and smooth sizes of weights, to choose coordinates by; they certify nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.bounds.operator_norms.conv import Geometry


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
