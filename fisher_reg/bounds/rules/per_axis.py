"""Maps that act on each spatial axis and each channel separately."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisher_reg.bounds.operator_norms.matrix import linear_norm
from fisher_reg.bounds.rules.layer import Layer, ScaledGain


def channel_scale(layer: Layer, axes: int) -> Tensor | None:
    """Return a scaling that is constant over the last ``axes`` axes, broadcastable to input and output."""
    if layer.scale is None:
        return None
    scale = layer.scale.expand(layer.input.shape)
    return scale.amin(tuple(range(-axes, 0)), keepdim=True)


def per_axis_gain(maps: Sequence[Callable[[Tensor], Tensor]], layer: Layer) -> ScaledGain:
    """Bound a Kronecker product over the last axes: the norms of its factors ``(B, 1, n) -> (B, 1, m)`` multiply."""
    axes = len(maps)
    norms = [_norm_of_axis(factor, size) for factor, size in zip(maps, layer.input.shape[-axes:], strict=True)]
    return ScaledGain(math.prod(norms), scale=channel_scale(layer, axes))


def _norm_of_axis(factor: Callable[[Tensor], Tensor], size: int) -> float:
    return float(linear_norm(factor(torch.eye(size, dtype=torch.float64)[:, None])[:, 0]))


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return a setting for each axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)
