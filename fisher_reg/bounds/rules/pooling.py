"""The bound rules of pooling layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fisher_reg.bounds.rules.layer import Layer, Rule, ScaledGain
from fisher_reg.bounds.rules.per_axis import channel_scale, per_axis, per_axis_gain
from fisher_reg.bounds.rules.registry import as_module, register_bound_rule, register_layer
from fisher_reg.errors import NoBoundError


def _max_pool(axes: int, module: Any, layer: Layer) -> ScaledGain:
    scale = channel_scale(layer, axes)
    if layer.is_local and not module.return_indices:
        return ScaledGain(_chosen(axes, module, layer), scale=scale)
    kernel, stride, dilation = (per_axis(value, axes) for value in (module.kernel_size, module.stride, module.dilation))
    # each output is one input; an input is used by at most the outputs whose windows contain it
    windows = math.prod(
        math.ceil(width / (step // math.gcd(step, gap)))
        for width, step, gap in zip(kernel, stride, dilation, strict=True)
    )
    return ScaledGain(math.sqrt(windows), scale=scale)


def _chosen(axes: int, module: Any, layer: Layer) -> Tensor:
    """Return sqrt(c), where c is the largest number of windows that have the same pixel as maximum, ``(B,)``."""
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
    """Return the largest number of windows ``[floor(i n / m), ceil((i + 1) n / m))`` that contain the same pixel."""
    windows = [(i * before // after, -(-(i + 1) * before // after)) for i in range(after)]
    return max(sum(start <= pixel < end for start, end in windows) for pixel in range(before))


def _avg_pool(axes: int, module: Any, layer: Layer) -> ScaledGain:
    if getattr(module, "divisor_override", None) is not None:
        raise NoBoundError(f"{module} overrides its divisor; write it as a scaled average pooling.")
    kernel, stride, padding = (per_axis(value, axes) for value in (module.kernel_size, module.stride, module.padding))
    windows = [
        nn.AvgPool1d(width, step, extra, module.ceil_mode, module.count_include_pad)
        for width, step, extra in zip(kernel, stride, padding, strict=True)
    ]
    return per_axis_gain(windows, layer)


def _adaptive_avg_pool(axes: int, module: Any, layer: Layer) -> ScaledGain:
    return per_axis_gain([nn.AdaptiveAvgPool1d(size) for size in layer.output.shape[-axes:]], layer)


_MODULE_RULES: dict[type[nn.Module], Rule] = {
    kind: partial(rule, axes)
    for axes, kinds in (
        (1, (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d)),
        (2, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)),
        (3, (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d)),
    )
    for kind, rule in zip(kinds, (_max_pool, _avg_pool, _adaptive_max_pool, _adaptive_avg_pool), strict=True)
}

MAX_RULES: list[Rule] = [rule for kind, rule in _MODULE_RULES.items() if "Max" in kind.__name__]
AVERAGE_RULES: list[Rule] = [rule for kind, rule in _MODULE_RULES.items() if "Avg" in kind.__name__]
POOLING_RULES: list[Rule] = list(_MODULE_RULES.values())
"""The rules of pooling layers, which act on each channel separately."""


def register_rules() -> None:
    """Register the rules of this family."""
    for kind, rule in _MODULE_RULES.items():
        register_bound_rule(kind)(rule)
    register_layer(as_module(nn.AdaptiveAvgPool2d), "input output_size", F.adaptive_avg_pool2d, "adaptive_avg_pool2d")
    register_layer(as_module(nn.AdaptiveAvgPool1d), "input output_size", F.adaptive_avg_pool1d, "adaptive_avg_pool1d")
    register_layer(as_module(nn.AdaptiveMaxPool2d), "input output_size return_indices", F.adaptive_max_pool2d)
    register_layer(
        as_module(nn.AvgPool2d),
        "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
        *(F.avg_pool2d, "avg_pool2d"),
    )
    register_layer(
        as_module(nn.MaxPool2d),
        "input kernel_size stride padding dilation ceil_mode return_indices",
        *(F.max_pool2d, "max_pool2d"),
    )
    register_layer(
        as_module(nn.MaxPool2d),
        "input kernel_size stride padding dilation ceil_mode",
        "max_pool2d_with_indices",
        first_of_several=True,
    )
