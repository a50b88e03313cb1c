"""The bound rules of interpolation, and of pixel shuffling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

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
    mode: str,
    align_corners: bool | None,
    layer: Layer,
    *,
    factors: float | Sequence[float] | None = None,
    antialias: bool = False,
) -> ScaledGain:
    """Bound an interpolation to the size of the output, which is one linear map per axis.

    Args:
        mode: That of :func:`torch.nn.functional.interpolate`.
        align_corners: That of :func:`torch.nn.functional.interpolate`.
        layer: The call.
        antialias: That of :func:`torch.nn.functional.interpolate`.
        factors: Scale factors of each axis, if given: they determine the exact positions of the outputs.

    Returns:
        The gain.

    Raises:
        NoBoundError: For a mode without a rule.
    """
    one_axis = {"bilinear": "linear", "trilinear": "linear", "bicubic": "bicubic"}.get(mode, mode)
    if one_axis not in ("nearest", "nearest-exact", "linear", "area", "bicubic"):
        raise NoBoundError(f"Interpolation by {mode!r} has no bound rule.")
    sizes = layer.output.shape[2:]
    axis = partial(_interpolated_axis, mode=one_axis, align_corners=align_corners, antialias=antialias)
    if factors is None:
        return per_axis_gain([partial(axis, size=size) for size in sizes], layer)
    factors = [factors] * len(sizes) if isinstance(factors, int | float) else factors
    return per_axis_gain([partial(axis, scale_factor=factor) for factor in factors], layer)


def _interpolated_axis(
    rows: Tensor,
    *,
    mode: str,
    align_corners: bool | None,
    antialias: bool,
    size: int | None = None,
    scale_factor: float | None = None,
) -> Tensor:
    """Interpolate rows ``(B, 1, n)``; torch has bicubic and antialiased interpolation only for planes."""
    if mode != "bicubic" and not antialias:
        return F.interpolate(rows, size, scale_factor, mode, align_corners)
    plane = "bilinear" if mode == "linear" else mode
    sizes = None if size is None else (size, 1)
    factors = None if scale_factor is None else (scale_factor, 1.0)
    planes = F.interpolate(rows[..., None], sizes, factors, plane, align_corners, antialias=antialias)
    return planes[..., 0]


def _interpolate(call: Call) -> Gain:
    factors = None if call.argument("recompute_scale_factor") else call.argument("scale_factor")
    mode = call.argument("mode", "nearest")
    return interpolation_gain(
        mode,
        call.argument("align_corners"),
        layer_of(call),
        factors=factors,
        antialias=call.argument("antialias", False),
    )


def _upsample(mode: str, antialias: bool = False) -> Callable[[Call], Gain]:
    """Return the rule of an operator for one interpolation mode."""
    return lambda call: interpolation_gain(
        mode, call.argument("align_corners"), layer_of(call), factors=_factors(call), antialias=antialias
    )


def _factors(call: Call) -> Any:
    """Return the factors of each axis, or None; operators have them as one or as several arguments."""
    together = call.argument("scale_factors")
    apart = [call.argument(name) for name in ("scales", "scales_d", "scales_h", "scales_w") if name in call.operands]
    apart = [item for item in apart if item is not None]
    return apart if together is None and apart else together


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)(_upsample_module)
    register_bound_rule(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)(moved_module)
    for mode, names in (
        ("linear", ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")),
        ("bicubic", ("upsample_bicubic2d",)),
        ("nearest", ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")),
    ):
        names_of = "input output_size align_corners scale_factors scales scales_d scales_h scales_w"
        register_layer(_upsample(mode), names_of, *names)
    register_layer(_upsample("bicubic", True), names_of, "_upsample_bicubic2d_aa")
    register_layer(_upsample("linear", True), names_of, "_upsample_bilinear2d_aa")
    register_layer(
        _interpolate, "input size scale_factor mode align_corners recompute_scale_factor antialias", F.interpolate
    )
    register(move_entries, None, F.pixel_shuffle, F.pixel_unshuffle, "pixel_shuffle", "pixel_unshuffle")
