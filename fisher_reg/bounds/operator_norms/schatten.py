"""Cheap and smooth norms of weights, only for the choice of diagonal scalings; they are no upper bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.bounds.operator_norms.conv import Geometry


@dataclass(frozen=True)
class SchattenNorms:
    """Schatten-4 norms, fourth roots of sums of fourth powers of singular values: cheap and smooth, but no bounds.

    A convolution is replaced by the matrix of its flattened kernel.
    """

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the Schatten-4 norm."""
        flat = weight.flatten(1)
        gram = flat @ flat.mT if flat.shape[0] < flat.shape[1] else flat.mT @ flat
        square: Tensor = torch.linalg.vector_norm(gram)  # ||W W^T||_F = (sum sigma_i^4)^(1/2)
        return square.sqrt()

    def convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the Schatten-4 norm of the flattened kernel."""
        return self.matrix(weight)

    def transposed_convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the Schatten-4 norm of the flattened kernel."""
        return self.matrix(weight)
