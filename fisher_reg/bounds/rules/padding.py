"""The bound rules of padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import nn

from fisher_reg.bounds.operator_norms.ranges import Ball, Interval, Range, Tokens, ball_of, largest_entry
from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.copies import copy_entries
from fisher_reg.bounds.rules.layer import Layer, ScaledGain
from fisher_reg.bounds.rules.per_axis import channel_scale, per_axis_gain
from fisher_reg.bounds.rules.registry import layer_name, register, register_bound_rule
from fisher_reg.bounds.sensitivity import Sensitivity


def _constant_pad(module: Any, layer: Layer) -> ScaledGain:
    return ScaledGain(1.0, scale=channel_scale(layer, len(module.padding) // 2))


def _copying_pad(module: Any, layer: Layer) -> ScaledGain:
    pads = list(zip(module.padding[::2], module.padding[1::2], strict=True))[::-1]
    mode = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}[layer_name(module)[:-5]]
    return per_axis_gain([partial(nn.functional.pad, pad=pad, mode=mode) for pad in pads], layer)


def _pad(call: Call) -> Sensitivity:
    if call.argument("mode", "constant") != "constant":
        return copy_entries(call)
    sensitivity = call.sensitivity
    widths = list(call.argument("pad"))
    known = _padded_range(call, widths)
    if sensitivity.scale is None:
        return Sensitivity(sensitivity.log_norm, range=known)
    padded = F.pad(
        sensitivity.scale.expand(call.source.value.shape), widths, value=float(sensitivity.scale.detach().amax())
    )
    return Sensitivity(sensitivity.log_norm, padded, known)


def _padded_range(call: Call, widths: list[int]) -> Range | None:
    """Return the range with zeros added; the distance of a zero vector from the centre is the norm of the centre."""
    known = call.sensitivity.range
    if known is None or not any(widths):
        return known
    if call.argument("value") not in (None, 0):
        return None
    if isinstance(known, Interval):
        return Interval(min(known.low, 0.0), max(known.high, 0.0))
    ball = ball_of(known) if isinstance(known, Tokens) else known
    if any(widths[:2]) or ball.columns is not None:
        return Interval(-largest_entry(known), largest_entry(known))
    return Ball(ball.norm, ball.norm)


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)(_constant_pad)
    register_bound_rule(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)(_constant_pad)
    register_bound_rule(
        nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
        nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
    )(_copying_pad)  # fmt: skip
    register(_pad, "input pad mode value", F.pad, "constant_pad_nd", "pad")
