"""The bound rules of interpolation, and of pixels that become channels and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F  # noqa: N812
from torch import nn

from fisher_reg.bounds.rules.call import Call, layer_of
from fisher_reg.bounds.rules.layer import Gain, Layer, ScaledGain
from fisher_reg.bounds.rules.per_axis import per_axis_gain
from fisher_reg.bounds.rules.registry import register, register_bound_rule, register_layer
from fisher_reg.bounds.rules.shapes import move_entries, moved_module
from fisher_reg.errors import NoBoundError


def _upsample_module(module: nn.Upsample, layer: Layer) -> ScaledGain:
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
        return per_axis_gain([partial(axis, size=size) for size in sizes], layer)
    factors = [factors] * len(sizes) if isinstance(factors, int | float) else factors
    return per_axis_gain([partial(axis, scale_factor=factor) for factor in factors], layer)


def _interpolate(call: Call) -> Gain:
    if call.argument("antialias", False):
        raise NoBoundError(f"{call.name} has no bound rule with antialias.")
    factors = None if call.argument("recompute_scale_factor") else call.argument("scale_factor")
    mode = call.argument("mode", "nearest")
    return interpolation_gain(mode, call.argument("align_corners"), layer_of(call), factors=factors)


def _upsample(mode: str) -> Callable[[Call], Gain]:
    """Return the rule of an operator that is an interpolation of one mode."""
    return lambda call: interpolation_gain(
        mode, call.argument("align_corners"), layer_of(call), factors=call.argument("scale_factors")
    )


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)(_upsample_module)
    register_bound_rule(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)(moved_module)
    for mode, names in (
        ("linear", ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")),
        ("nearest", ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")),
    ):
        register_layer(_upsample(mode), "input output_size align_corners scale_factors", *names)
    register_layer(
        _interpolate, "input size scale_factor mode align_corners recompute_scale_factor antialias", F.interpolate
    )
    register(move_entries, None, F.pixel_shuffle, F.pixel_unshuffle, "pixel_shuffle", "pixel_unshuffle")
