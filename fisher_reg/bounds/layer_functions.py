"""The bound rules of layers in their functional form: the rules of the modules, with the weights as arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fisher_reg.bounds.calls import Call, Reach, log, log_sum
from fisher_reg.bounds.functions import layer_of, register, shifted
from fisher_reg.bounds.linears import conv_gain, linear_gain
from fisher_reg.bounds.normalizations import diagonal_gain, group_norm_gain, layer_norm_gain
from fisher_reg.bounds.operator_norms.attention import dot_product_attention_gains
from fisher_reg.bounds.operator_norms.conv import Geometry
from fisher_reg.bounds.poolings import interpolation_gain
from fisher_reg.bounds.registry import Ball, Gain, ScaledGain, find_rule
from fisher_reg.errors import NoBoundError
from fisher_reg.evaluation.batch_norm import scale_and_shift


def activation_module(target: Any) -> nn.Module | None:
    """Return the module form of an activation function with its default settings."""
    return nn.ReLU() if target in (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_") else None


def _linear(call: Call) -> Gain:
    return linear_gain(call.argument("weight"), call.argument("bias"), layer_of(call))


def _convolution(call: Call) -> Gain:
    weight = call.argument("weight")
    axes = weight.ndim - 2
    if call.source.value.ndim != axes + 2:
        raise NoBoundError(f"{call.name} has a bound rule for batches only.")
    padding = call.argument("padding", 0)
    if isinstance(padding, str) and padding != "valid":
        raise NoBoundError(f"{call.name} pads by a word; give the number of pixels.")
    stride, amount, dilation = (
        (item,) * axes if isinstance(item, int) else tuple(item) * (axes if len(item) == 1 else 1)
        for item in (call.argument("stride", 1), 0 if padding == "valid" else padding, call.argument("dilation", 1))
    )
    size = tuple(call.source.value.shape[2:])
    geometry = Geometry(size, stride, amount, dilation, call.argument("groups", 1))
    return conv_gain(weight, geometry, layer_of(call))


def _batch_norm(call: Call) -> Gain:
    mean, variance, weight = (call.argument(name) for name in ("running_mean", "running_var", "weight"))
    if call.argument("training", False) or mean is None or variance is None:
        raise NoBoundError(f"{call.name} normalises with the statistics of the batch, which couples the examples.")
    weight = None if weight is None else weight.double()
    factor, _ = scale_and_shift(mean.double(), variance.double(), weight, None, call.argument("eps", 1e-5))
    shape = (1, -1, *[1] * (call.value.ndim - 2))
    return diagonal_gain(factor.view(shape), layer_of(call))


def _layer_norm(call: Call) -> Gain:
    axes = len(call.argument("normalized_shape"))
    eps = call.argument("eps", 1e-5)
    return layer_norm_gain(call.argument("weight"), call.argument("bias"), eps, axes, layer_of(call))


def _group_norm(call: Call) -> Gain:
    eps = call.argument("eps", 1e-5)
    return group_norm_gain(call.argument("weight"), eps, call.argument("num_groups"), layer_of(call))


def _interpolate(call: Call) -> Gain:
    if call.argument("antialias", False):
        raise NoBoundError(f"{call.name} has no bound rule with antialias.")
    factors = None if call.argument("recompute_scale_factor") else call.argument("scale_factor")
    mode = call.argument("mode", "nearest")
    return interpolation_gain(mode, call.argument("align_corners"), layer_of(call), factors=factors)


def _attention(call: Call) -> Reach:
    query, key, value = (call.operands[name] for name in ("query", "key", "value"))
    if call.argument("dropout_p", 0.0) != 0:
        raise NoBoundError(f"{call.name} drops in evaluation.")
    if call.argument("enable_gqa", False):
        raise NoBoundError(f"{call.name} shares keys between heads, which has no bound rule.")
    call.argument("attn_mask")
    reaches = [item.reach for item in (query, key, value) if isinstance(item.reach, Reach)]
    balls = [reach.range.of_tokens for reach in reaches if isinstance(reach.range, Ball)]
    if len(balls) < 3:
        raise NoBoundError(
            "Dot-product attention has no global Lipschitz constant on an unbounded domain, and no layer norm and "
            "linear layer stand right before this one to bound it. Only pre-norm attention has a global bound."
        )
    scale = call.argument("scale")
    scale = query.value.shape[-1] ** -0.5 if scale is None else scale
    gains = dot_product_attention_gains(query.value.shape[-2], scale, *balls)
    sides = zip(reaches, (gains.query, gains.key, gains.value), strict=True)
    return Reach(log_sum([shifted(reach.plain(), log(gain)) for reach, gain in sides]))


def _as_module(build: Callable[..., nn.Module]) -> Callable[[Call], Gain]:
    """Reuse the rule of the module that a functional call is the forward of; its settings are the other arguments."""

    def as_module(call: Call) -> Gain:
        if not isinstance(call.value, torch.Tensor):
            raise NoBoundError(f"{call.name} returns more than the pooled values.")
        settings = {key: item.value for key, item in call.operands.items() if key not in ("input", "inplace")}
        settings = {key: item for key, item in settings.items() if not (key == "stride" and item == [])}
        module = build(**settings)
        found = find_rule(module)
        if found is None:
            raise NoBoundError(f"{call.name} has no rule for its module form {module}.")
        gain = found(module, layer_of(call))
        return gain if isinstance(gain, Gain) else Gain(gain)

    return as_module


def _upsample(mode: str) -> Callable[[Call], Gain]:
    """Return the rule of an operator that is an interpolation of one mode."""
    return lambda call: interpolation_gain(
        mode, call.argument("align_corners"), layer_of(call), factors=call.argument("scale_factors")
    )


def _prelu(call: Call) -> Gain:
    return ScaledGain(call.argument("weight").double().abs().amax().clamp_min(1.0), scale=call.reach.scale)


register_layer = partial(register, is_layer=True)

for _mode, _names in (
    ("linear", ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")),
    ("nearest", ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")),
):
    register_layer(_upsample(_mode), "input output_size align_corners scale_factors", *_names)

register_layer(_linear, "input weight bias", F.linear, "linear")
register_layer(
    _convolution,
    "input weight bias stride padding dilation groups",
    *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, "conv1d", "conv2d", "conv3d"),
)
register_layer(
    _batch_norm, "input running_mean running_var weight bias training momentum eps cudnn_enabled", F.batch_norm
)
register_layer(
    _batch_norm, "input weight bias running_mean running_var training momentum eps cudnn_enabled", "batch_norm"
)
register_layer(
    _layer_norm, "input normalized_shape weight bias eps cudnn_enable", F.layer_norm, torch.layer_norm, "layer_norm"
)
register_layer(
    _group_norm, "input num_groups weight bias eps cudnn_enabled", F.group_norm, torch.group_norm, "group_norm"
)
register_layer(
    _interpolate, "input size scale_factor mode align_corners recompute_scale_factor antialias", F.interpolate
)
register_layer(_prelu, "input weight", F.prelu, torch.prelu, "prelu")
register_layer(_as_module(nn.ReLU), "input inplace", F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
register_layer(_as_module(nn.ReLU6), "input inplace", F.relu6, "relu6")
register_layer(_as_module(nn.Hardtanh), "input min_val max_val inplace", F.hardtanh, "hardtanh", "hardtanh_")
register_layer(_as_module(nn.ELU), "input alpha inplace", F.elu, "elu", "elu_")
register_layer(_as_module(nn.CELU), "input alpha inplace", F.celu, "celu")
register_layer(_as_module(nn.SELU), "input inplace", F.selu, "selu")
register_layer(_as_module(nn.GELU), "input approximate", F.gelu, "gelu")
register_layer(_as_module(nn.SiLU), "input inplace", F.silu, "silu", "silu_")
register_layer(_as_module(nn.Mish), "input inplace", F.mish, "mish")
register_layer(_as_module(nn.Hardswish), "input inplace", F.hardswish, "hardswish", "hardswish_")
register_layer(_as_module(nn.Hardsigmoid), "input inplace", F.hardsigmoid, "hardsigmoid")
register_layer(_as_module(nn.LeakyReLU), "input negative_slope inplace", F.leaky_relu, "leaky_relu", "leaky_relu_")
register_layer(_as_module(nn.Softplus), "input beta threshold", F.softplus, "softplus")
register_layer(_as_module(nn.Softsign), "input", F.softsign)
register_layer(_as_module(nn.LogSigmoid), "input", F.logsigmoid, "log_sigmoid")
register_layer(_as_module(nn.Tanhshrink), "input", F.tanhshrink)
register_layer(_as_module(nn.Tanh), "input", torch.tanh, F.tanh, "tanh", "tanh_")
register_layer(_as_module(nn.Sigmoid), "input", torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_")
register_layer(_as_module(nn.AdaptiveAvgPool2d), "input output_size", F.adaptive_avg_pool2d, "adaptive_avg_pool2d")
register_layer(_as_module(nn.AdaptiveAvgPool1d), "input output_size", F.adaptive_avg_pool1d, "adaptive_avg_pool1d")
register_layer(_as_module(nn.AdaptiveMaxPool2d), "input output_size return_indices", F.adaptive_max_pool2d)
register_layer(
    _as_module(nn.AvgPool2d),
    "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    *(F.avg_pool2d, "avg_pool2d"),
)
register_layer(
    _as_module(nn.MaxPool2d),
    "input kernel_size stride padding dilation ceil_mode return_indices",
    *(F.max_pool2d, "max_pool2d"),
)
register(
    _attention,
    "query key value attn_mask dropout_p is_causal scale enable_gqa",
    *(F.scaled_dot_product_attention, "scaled_dot_product_attention"),
)
