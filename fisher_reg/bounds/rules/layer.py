"""What a rule sees of a call, and what it returns."""

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
"""A channel is taken as scaled by at least this share of the largest scale, so that no coordinate is infinite."""


class Norms(Protocol):
    """How the norms of linear layers are computed."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the norm of a matrix ``(m, n)``, a scalar."""

    def convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the norm of a convolution, a scalar."""

    def transposed_convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the norm of the adjoint of a convolution, a scalar."""


@dataclass(frozen=True)
class Gain:
    """What a layer does to perturbations, and what it makes sure of for the next layer.

    Attributes:
        norm: Lipschitz constant of the layer, Euclidean to Euclidean, with respect to all its inputs together; at the
            local level it may be that at each example, ``(B,)``.
        output_range: The range of the output, where the layer bounds it.
        domain: For which inputs the constant holds, where it is not all of them.
        of_one_input: The constant is with respect to the one value that is passed in several places.
    """

    norm: Number
    output_range: Range | None = None
    domain: str | None = None
    of_one_input: bool = False

    def after(self, source: Sensitivity) -> Sensitivity:
        """Return the sensitivity of the output of a layer from that of its input."""
        plain = source.plain()
        return Sensitivity(shifted(plain, log(self.norm)), None, self.output_range)


@dataclass(frozen=True)
class ScaledGain(Gain):
    r"""A gain between scaled coordinates: from ``layer.scale * input`` to ``scale * output``.

    Attributes:
        scale: Positive, broadcastable to the output; None for 1.
    """

    scale: Tensor | None = None

    def after(self, source: Sensitivity) -> Sensitivity:
        """Return the sensitivity of the output from that of the input, both in their coordinates."""
        return Sensitivity(shifted(source, log(self.norm)), self.scale, self.output_range)


@dataclass(frozen=True)
class Deviation:
    """How far a value may be from the one at the example, for all inputs of a region around it.

    Attributes:
        width: Of each entry, of the shape of the value.
        length: Of the whole value of an example in Euclidean norm, ``(B,)`` or ``()``.
    """

    width: Tensor
    length: Tensor


@dataclass(frozen=True)
class Layer:
    """What a rule may know besides the module.

    Attributes:
        inputs: The tensors of the call by parameter name. At the global level only their shapes matter.
        output: What the module returned.
        input_range: The range of the first input, where the layer before bounds it.
        sources: Where each input comes from: the name of the value in the graph, None if it does not depend on the
            network's input.
        is_local: Whether the constant is wanted at the given inputs, one per example, and not over all of them.
        deviation: Of the first input, where the constant is wanted over a region around each example; ``is_local`` is
            false then, and a rule that does not use it returns the constant over all inputs.
        scale: Coordinates of the first input, positive and broadcastable to it, None for 1: a diagonal map before this
            layer was not bounded by itself but is left to this layer.
        output_scale: Coordinates ``(C,)`` that are wanted of a linear layer's output channels, None for 1.
        norms: What computes the norms of weights.
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
        """Return coordinates that vary along one axis of the input only, ``(C,)``: the smallest over the others.

        A smaller scale is a smaller vector, so that what reaches the scaled input bounds it still.
        """
        size = self.input.shape[axis]
        if self.scale is None:
            return torch.ones(size, dtype=torch.float64, device=self.input.device)
        others = [other for other in range(self.input.ndim) if other != axis % self.input.ndim]
        return self.scale.expand(self.input.shape).amin(others) if others else self.scale.expand(self.input.shape)


Rule = Callable[[Any, Layer], "Number | Gain"]
"""From a module and its call to its Lipschitz constant or its gain."""


def largest_of_each(numbers: Tensor) -> Tensor:
    """Return the largest number of each example ``(B,)``, which may have one number only."""
    return numbers.reshape(len(numbers), -1).amax(1)


def diagonal_gain(factor: Tensor, layer: Layer) -> ScaledGain:
    """Bound a multiplication by a change of coordinates: nothing is lost.

    The next layer divides its weight by the new scale, so that its norm is that of the product.

    Args:
        factor: Broadcastable to the output.
        layer: The call.

    Returns:
        The gain 1, in the new coordinates; 0 without any for a factor of zeros.
    """
    size = factor.abs()
    size = size.clamp_min(_SMALLEST * size.amax().detach())
    vanishes = bool(size.amax() == 0)
    if vanishes:
        return ScaledGain(0.0)
    return ScaledGain(1.0, scale=1 / size if layer.scale is None else layer.scale / size)
