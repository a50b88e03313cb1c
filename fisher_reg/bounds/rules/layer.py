"""The argument and the result of a bound rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fisher_reg.bounds.operator_norms.conv import Geometry
from fisher_reg.bounds.operator_norms.ranges import Ball, Interval, Range, Tokens
from fisher_reg.bounds.sensitivity import Number, Sensitivity, log, shifted

__all__ = [
    "Ball",
    "Deviation",
    "Gain",
    "Interval",
    "Layer",
    "Norms",
    "Number",
    "Rule",
    "ScaledGain",
    "Tokens",
    "diagonal_gain",
    "largest_of_each",
]

_SMALLEST = 1e-12
"""Smallest scale of a channel relative to the largest scale, so that no inverse scale is infinite."""


class Norms(Protocol):
    """Computes the norms of linear layers."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the norm of a matrix ``(m, n)``, a scalar."""

    def convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the norm of a convolution, a scalar."""

    def transposed_convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the norm of the adjoint of a convolution, a scalar."""


@dataclass(frozen=True)
class Gain:
    """The Lipschitz constant of a layer, with facts about its output.

    Attributes:
        norm: Lipschitz constant of the layer for Euclidean norms, with respect to all its inputs together; for a local
            bound it may be that at each example, ``(B,)``.
        output_range: The range of the output, if the layer bounds it.
        domain: Description of the inputs for which the constant holds; None for all.
        of_one_input: Whether the constant is with respect to one value that is passed as several arguments.
    """

    norm: Number
    output_range: Range | None = None
    domain: str | None = None
    of_one_input: bool = False

    def after(self, source: Sensitivity) -> Sensitivity:
        """Return the sensitivity of the output of a layer, given that of its input."""
        plain = source.plain()
        return Sensitivity(shifted(plain, log(self.norm)), None, self.output_range)


@dataclass(frozen=True)
class ScaledGain(Gain):
    r"""A gain between scaled values: from ``layer.scale * input`` to ``scale * output``.

    Attributes:
        scale: Diagonal scaling, positive, broadcastable to the output; None for 1.
    """

    scale: Tensor | None = None

    def after(self, source: Sensitivity) -> Sensitivity:
        """Return the sensitivity of the output, given that of the input, both with their scalings."""
        return Sensitivity(shifted(source, log(self.norm)), self.scale, self.output_range)


@dataclass(frozen=True)
class Deviation:
    """Bounds of the deviation of a value from that at the example, for all inputs of a region around it.

    Attributes:
        width: Bound of the deviation of each entry, in the shape of the value.
        length: Bound of the Euclidean norm of the deviation, ``(B,)`` or ``()``.
    """

    width: Tensor
    length: Tensor


@dataclass(frozen=True)
class Layer:
    """The call of a module, as an argument of its rule.

    Attributes:
        inputs: The tensors of the call by parameter name. For a global bound only their shapes matter.
        output: The output of the module.
        input_range: The range of the first input, if a previous layer bounds it.
        sources: For each input the name of its value in the graph; None if it does not depend on the network's input.
        is_local: Whether the constant is that at the given inputs, one per example, instead of over all inputs.
        deviation: The deviation of the first input, if the constant is that over a region around each example. Then
            ``is_local`` is false, and a rule that does not use the deviation returns the constant over all inputs.
        scale: Diagonal scaling of the first input, positive and broadcastable to it; None for 1. It comes from a
            diagonal map before this layer, which this layer absorbs.
        output_scale: Requested scaling ``(C,)`` of the output channels of a linear layer; None for 1.
        norms: Computes the norms of weights.
    """

    inputs: Mapping[str, Tensor]
    output: Any
    norms: Norms
    input_range: Range | None = None
    sources: Mapping[str, str | None] = field(default_factory=dict)
    is_local: bool = False
    deviation: Deviation | None = None
    scale: Tensor | None = None
    output_scale: Tensor | None = None

    @property
    def input(self) -> Tensor:
        """The first input."""
        return next(iter(self.inputs.values()))

    def scale_along(self, axis: int) -> Tensor:
        """Return a scaling that varies only along one axis of the input, ``(C,)``: the smallest over the others.

        With a smaller scaling the scaled input is smaller, so that its bound still holds.
        """
        size = self.input.shape[axis]
        if self.scale is None:
            return torch.ones(size, dtype=torch.float64, device=self.input.device)
        others = [other for other in range(self.input.ndim) if other != axis % self.input.ndim]
        return self.scale.expand(self.input.shape).amin(others) if others else self.scale.expand(self.input.shape)


Rule = Callable[[Any, Layer], "Number | Gain"]
"""From a module and its call to its Lipschitz constant or its gain."""


def largest_of_each(numbers: Tensor) -> Tensor:
    """Return the largest number of each example ``(B,)``; an example may have only one number."""
    return numbers.reshape(len(numbers), -1).amax(1)


def diagonal_gain(factor: Tensor, layer: Layer) -> ScaledGain:
    """Bound a multiplication by a diagonal scaling, which the next layer absorbs.

    The next layer divides its weight by the scale, so that its norm is that of the product.

    Args:
        factor: Broadcastable to the output.
        layer: The call.

    Returns:
        The gain 1 with the new scaling; the gain 0 without a scaling for a factor of zeros.
    """
    size = factor.abs()
    size = size.clamp_min(_SMALLEST * size.amax().detach())
    vanishes = bool(size.amax() == 0)
    if vanishes:
        return ScaledGain(0.0)
    return ScaledGain(1.0, scale=1 / size if layer.scale is None else layer.scale / size)
