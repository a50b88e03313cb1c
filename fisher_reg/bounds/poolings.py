"""The bound rules of layers that move, copy and average pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_reg.bounds.operator_norms.matrix import linear_norm
from fisher_reg.bounds.registry import Layer, Rule, ScaledGain, register_bound_rule
from fisher_reg.errors import NoBoundError


def channel_scale(layer: Layer, axes: int) -> Tensor | None:
    """Return coordinates that are constant over the last ``axes`` axes, broadcastable to input and output."""
    if layer.scale is None:
        return None
    scale = layer.scale.expand(layer.input.shape)
    return scale.amin(tuple(range(-axes, 0)), keepdim=True)


def _max_pool(axes: int, module: Any, layer: Layer) -> ScaledGain:
    scale = channel_scale(layer, axes)
    if layer.is_local and not module.return_indices:
        return ScaledGain(_chosen(axes, module, layer), scale=scale)
    kernel, stride, dilation = (
        _per_axis(value, axes) for value in (module.kernel_size, module.stride, module.dilation)
    )
    # Each output takes one input; an input is taken by at most as many outputs as have a window over it.
    windows = math.prod(
        math.ceil(width / (step // math.gcd(step, gap)))
        for width, step, gap in zip(kernel, stride, dilation, strict=True)
    )
    return ScaledGain(math.sqrt(windows), scale=scale)


def _chosen(axes: int, module: Any, layer: Layer) -> Tensor:
    """Return the root of how often the most popular pixel is the largest of a window, ``(B,)``."""
    pool = (nn.functional.max_pool1d, nn.functional.max_pool2d, nn.functional.max_pool3d)[axes - 1]
    _, indices = pool(
        layer.input,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        ceil_mode=module.ceil_mode,
        return_indices=True,
    )
    planes = layer.input.flatten(-axes)
    counts = torch.zeros_like(planes).scatter_add_(
        -1, indices.flatten(-axes), torch.ones_like(indices.flatten(-axes), dtype=planes.dtype)
    )
    return counts.double().flatten(1).amax(1).sqrt()


def _adaptive_max_pool(axes: int, module: Any, layer: Layer) -> ScaledGain:
    sizes = zip(layer.input.shape[-axes:], layer.output.shape[-axes:], strict=True)
    return ScaledGain(math.sqrt(math.prod(_overlap(*size) for size in sizes)), scale=channel_scale(layer, axes))


def _overlap(before: int, after: int) -> int:
    """Return how many of the windows ``[floor(i n / m), ceil((i + 1) n / m))`` hold the same pixel."""
    windows = [(i * before // after, -(-(i + 1) * before // after)) for i in range(after)]
    return max(sum(start <= pixel < end for start, end in windows) for pixel in range(before))


def _avg_pool(axes: int, module: Any, layer: Layer) -> ScaledGain:
    if getattr(module, "divisor_override", None) is not None:
        raise NoBoundError(f"{module} overrides its divisor; write it as a scaled average pooling.")
    kernel, stride, padding = (_per_axis(value, axes) for value in (module.kernel_size, module.stride, module.padding))
    windows = [
        nn.AvgPool1d(width, step, extra, module.ceil_mode, module.count_include_pad)
        for width, step, extra in zip(kernel, stride, padding, strict=True)
    ]
    return _per_axis_gain(windows, layer)


def _adaptive_avg_pool(axes: int, module: Any, layer: Layer) -> ScaledGain:
    return _per_axis_gain([nn.AdaptiveAvgPool1d(size) for size in layer.output.shape[-axes:]], layer)


POOLING_RULES: list[Rule] = []
"""The rules of pooling layers, which leave channels apart."""

for _axes, _max, _avg, _adaptive_max, _adaptive_avg in (
    (1, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d),
    (2, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d),
    (3, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d),
):
    for _kind, _rule in (
        (_max, _max_pool),
        (_avg, _avg_pool),
        (_adaptive_max, _adaptive_max_pool),
        (_adaptive_avg, _adaptive_avg_pool),
    ):
        POOLING_RULES.append(register_bound_rule(_kind)(partial(_rule, _axes)))


@register_bound_rule(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def _constant_pad(module: Any, layer: Layer) -> ScaledGain:
    return ScaledGain(1.0, scale=channel_scale(layer, len(module.padding) // 2))


@register_bound_rule(
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
    nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
def _copying_pad(module: Any, layer: Layer) -> ScaledGain:
    pads = list(zip(module.padding[::2], module.padding[1::2], strict=True))[::-1]
    mode = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}[type(module).__name__[:-5]]
    return _per_axis_gain([partial(nn.functional.pad, pad=pad, mode=mode) for pad in pads], layer)


@register_bound_rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def _upsample(module: nn.Upsample, layer: Layer) -> ScaledGain:
    factors = None if module.recompute_scale_factor else module.scale_factor
    return interpolation_gain(module.mode, module.align_corners, layer, factors=factors)


def interpolation_gain(
    mode: str, align_corners: bool | None, layer: Layer, *, factors: float | Sequence[float] | None = None
) -> ScaledGain:
    """Bound an interpolation to the size of the output, which is one linear map per axis.

    Args:
        mode: That of :func:`torch.nn.functional.interpolate`.
        align_corners: Likewise.
        layer: The call.
        factors: Of each axis, where they were given: they say where the outputs lie, which the sizes only round.

    Returns:
        The gain.

    Raises:
        NoBoundError: For a mode without a rule.
    """
    one_axis = {"bilinear": "linear", "trilinear": "linear", "bicubic": "bicubic"}.get(mode, mode)
    if one_axis not in ("nearest", "nearest-exact", "linear", "area"):
        raise NoBoundError(f"Interpolation by {mode!r} has no bound rule; nearest, linear and area have one.")
    sizes = layer.output.shape[2:]
    axis = partial(nn.functional.interpolate, mode=one_axis, align_corners=align_corners)
    if factors is None:
        return _per_axis_gain([partial(axis, size=size) for size in sizes], layer)
    factors = [factors] * len(sizes) if isinstance(factors, int | float) else factors
    return _per_axis_gain([partial(axis, scale_factor=factor) for factor in factors], layer)


@register_bound_rule(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
def _moves_pixels(module: nn.Module, layer: Layer) -> ScaledGain:
    return ScaledGain(1.0, scale=None if layer.scale is None else module(layer.scale.expand(layer.input.shape)))


def _per_axis_gain(maps: Sequence[Callable[[Tensor], Tensor]], layer: Layer) -> ScaledGain:
    """Bound a Kronecker product over the last axes by its factors ``(B, 1, n) -> (B, 1, m)``: the norms multiply."""
    axes = len(maps)
    norms = [_norm_of_axis(factor, size) for factor, size in zip(maps, layer.input.shape[-axes:], strict=True)]
    return ScaledGain(math.prod(norms), scale=channel_scale(layer, axes))


def _norm_of_axis(factor: Callable[[Tensor], Tensor], size: int) -> float:
    return float(linear_norm(factor(torch.eye(size, dtype=torch.float64)[:, None])[:, 0]))


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)
