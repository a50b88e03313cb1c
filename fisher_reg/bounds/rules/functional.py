"""The bound rules of functions that are the forward of a module with a rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fisher_reg.bounds.operator_norms.conv import Geometry
from fisher_reg.bounds.rules.call import Call, layer_of
from fisher_reg.bounds.rules.identity import drop
from fisher_reg.bounds.rules.layer import Gain, ScaledGain
from fisher_reg.bounds.rules.linear import transposed_gain
from fisher_reg.bounds.rules.normalization import group_norm_gain, rms_norm_gain
from fisher_reg.bounds.rules.per_axis import per_axis
from fisher_reg.bounds.rules.registry import as_module, register, register_layer
from fisher_reg.bounds.sensitivity import Sensitivity, log, shifted
from fisher_reg.errors import NoBoundError


def _transposed_convolution(call: Call) -> Gain:
    weight = call.argument("weight")
    axes = weight.ndim - 2
    if call.source.value.ndim != axes + 2:
        raise NoBoundError(f"{call.name} has a bound rule for batches only.")
    settings = [per_axis(call.argument(*name), axes) for name in (("stride", 1), ("padding", 0), ("dilation", 1))]
    stride, padding, dilation = (item * (axes if len(item) == 1 else 1) for item in settings)
    size = tuple(call.value.shape[2:])
    geometry = Geometry(size, stride, padding, dilation, call.argument("groups", 1))
    return transposed_gain(weight, geometry, layer_of(call))


def _instance_norm(call: Call) -> Gain:
    if not call.argument("use_input_stats", True):
        raise NoBoundError(f"{call.name} uses running statistics; use the module, which has a rule.")
    layer = layer_of(call)
    return group_norm_gain(call.argument("weight"), call.argument("eps", 1e-5), layer.input.shape[1], layer)


def _rms_norm(call: Call) -> Gain:
    axes = len(call.argument("normalized_shape"))
    return rms_norm_gain(call.argument("weight"), call.argument("eps"), axes, layer_of(call))


def _random_relu(call: Call) -> Gain:
    if call.argument("training", False):
        raise NoBoundError(f"{call.name} is also random in evaluation mode; pass training=self.training.")
    mean = (call.argument("lower", 1 / 8) + call.argument("upper", 1 / 3)) / 2
    return ScaledGain(max(1.0, abs(mean)), scale=call.sensitivity.scale)


def _soft_minimum(call: Call) -> Sensitivity:
    return Sensitivity(shifted(call.sensitivity.plain(), log(0.5)))  # a softmax of -x


def register_rules() -> None:
    """Register the rules of this family."""
    average = "input kernel_size stride padding ceil_mode count_include_pad"
    largest = "input kernel_size stride padding dilation ceil_mode return_indices"
    adaptive = "input output_size return_indices"
    register_layer(as_module(nn.AvgPool1d), average, F.avg_pool1d, "avg_pool1d")
    register_layer(as_module(nn.AvgPool3d), f"{average} divisor_override", F.avg_pool3d, "avg_pool3d")
    register_layer(as_module(nn.MaxPool1d), largest, F.max_pool1d, torch.max_pool1d, "max_pool1d")
    register_layer(as_module(nn.MaxPool3d), largest, F.max_pool3d, torch.max_pool3d, "max_pool3d")
    register_layer(as_module(nn.AdaptiveAvgPool3d), "input output_size", F.adaptive_avg_pool3d, "adaptive_avg_pool3d")
    register_layer(as_module(nn.AdaptiveMaxPool1d), adaptive, F.adaptive_max_pool1d)
    register_layer(as_module(nn.AdaptiveMaxPool3d), adaptive, F.adaptive_max_pool3d)
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    names = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    settings = "input weight bias stride padding output_padding groups dilation"
    register_layer(_transposed_convolution, settings, *transposed, *names)
    statistics = "input running_mean running_var weight bias use_input_stats momentum eps cudnn_enabled"
    register_layer(_instance_norm, statistics, F.instance_norm, "instance_norm")
    register_layer(_rms_norm, "input normalized_shape weight eps", F.rms_norm, torch.rms_norm, "rms_norm")
    register_layer(_random_relu, "input lower upper training inplace", F.rrelu, "rrelu")
    register_layer(as_module(nn.Softshrink), "input lambd", F.softshrink, "softshrink")
    register(_soft_minimum, "input dim _stacklevel dtype", F.softmin)
    register(drop, "input p training inplace", F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout)
