"""The bound rules of torch's own layers, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fisher_reg.bounds.attention import layer_norm_tokens, self_attention_lipschitz
from fisher_reg.bounds.conv import conv_norm, linear_norm
from fisher_reg.bounds.registry import Gain, Layer, find_rule, register_bound_rule
from fisher_reg.errors import NoBoundError

GELU_SLOPE = 0.5 * (1 + math.erf(1.0)) + math.sqrt(2) * math.exp(-1.0) / math.sqrt(2 * math.pi)
"""Largest slope of ``x Phi(x)``, at ``x = sqrt(2)`` where its second derivative ``(2 - x^2) phi(x)`` vanishes."""


@register_bound_rule(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)
def _keeps_length(module: nn.Module, layer: Layer) -> Gain:
    return Gain(1.0, layer.tokens if isinstance(module, nn.Identity | nn.Dropout) else None)


@register_bound_rule(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.ELU, nn.CELU, nn.Softplus, nn.Softsign)
def _slope_at_most_one(module: nn.Module, layer: Layer) -> float:
    # ELU's slope at 0- is alpha; CELU's is 1 for alpha > 0; Softplus' is a sigmoid.
    if isinstance(module, nn.CELU) and module.alpha < 0:
        raise NoBoundError(f"{module} has an unbounded slope.")
    return max(1.0, abs(module.alpha)) if isinstance(module, nn.ELU) else 1.0


@register_bound_rule(nn.LeakyReLU)
def _leaky_relu(module: nn.LeakyReLU, layer: Layer) -> float:
    return max(1.0, abs(module.negative_slope))


@register_bound_rule(nn.Sigmoid)
def _sigmoid(module: nn.Sigmoid, layer: Layer) -> float:
    return 0.25


@register_bound_rule(nn.GELU)
def _gelu(module: nn.GELU, layer: Layer) -> float:
    # The tanh form differs from x Phi(x) by less than 1e-3 in slope.
    return GELU_SLOPE + (1e-3 if module.approximate == "tanh" else 0.0)


@register_bound_rule(nn.SiLU)
def _silu(module: nn.SiLU, layer: Layer) -> float:
    return 1.09984  # sigma(x) (1 + x (1 - sigma(x))) at x = 2.39936, rounded up


@register_bound_rule(nn.Hardswish)
def _hardswish(module: nn.Hardswish, layer: Layer) -> float:
    return 1.5  # (2 x + 3) / 6 at x = 3


@register_bound_rule(nn.Linear)
def _linear(module: nn.Linear, layer: Layer) -> float:
    return linear_norm(layer.transform(module.weight))


@register_bound_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv(module: _ConvNd, layer: Layer) -> float:
    if module.padding_mode != "zeros":
        raise NoBoundError(f"{module} pads with {module.padding_mode!r}; only zero padding has a rule.")
    weight, axes = layer.transform(module.weight), len(module.kernel_size)
    return conv_norm(weight, tuple(layer.output.shape[-axes:]), module.stride, module.dilation, module.groups)


@register_bound_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(module: _BatchNorm, layer: Layer) -> float:
    return float(batch_norm_scale(module).abs().max())  # a diagonal map, where no linear layer could absorb it


@register_bound_rule(nn.LayerNorm)
def _layer_norm(module: nn.LayerNorm, layer: Layer) -> Gain:
    # Its Jacobian is diag(gamma) times a projection over the standard deviation, which is at least sqrt(eps).
    if module.eps == 0:
        raise NoBoundError(f"{module} has no Lipschitz constant without an eps.")
    ones = torch.ones(math.prod(module.normalized_shape), device=layer.output.device)
    gamma = ones if module.weight is None else module.weight.detach().flatten()
    beta = torch.zeros_like(gamma) if module.bias is None else module.bias.detach().flatten()
    tokens = layer_norm_tokens(gamma, beta) if len(module.normalized_shape) == 1 else None
    return Gain(float(gamma.abs().max()) / math.sqrt(module.eps), tokens)


@register_bound_rule(nn.MultiheadAttention)
def _attention(module: nn.MultiheadAttention, layer: Layer) -> Gain:
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise NoBoundError("Only attention with one packed projection and no added keys has a bound rule.")
    queries = layer.sources["query"]
    varying = {name for name, source in layer.sources.items() if source is not None}
    if varying != {"query", "key", "value"} or any(layer.sources[name] != queries for name in varying):
        raise NoBoundError("Only self-attention, of one value with itself and constant masks, has a bound rule.")
    if layer.tokens is None:
        raise NoBoundError(
            "Dot-product attention has no global Lipschitz constant on an unbounded domain, and no layer norm stands "
            "right before this one to bound it. Only pre-norm attention has a global bound."
        )
    num_tokens = layer.input.shape[1 if module.batch_first else 0]
    norm = self_attention_lipschitz(
        module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.num_heads, num_tokens, layer.tokens
    )
    domain = "attention: the range of the layer norm before it, which no input leaves"
    return Gain(norm, domain=domain, of_one_input=True)


def _max_pool(axes: int, module: Any, layer: Layer) -> float:
    kernel, stride, dilation = (
        _per_axis(value, axes) for value in (module.kernel_size, module.stride, module.dilation)
    )
    # Each output takes one input; an input is taken by at most as many outputs as have a window over it.
    return math.sqrt(
        math.prod(
            math.ceil(width / (step // math.gcd(step, gap)))
            for width, step, gap in zip(kernel, stride, dilation, strict=True)
        )
    )


def _avg_pool(axes: int, module: Any, layer: Layer) -> float:
    if getattr(module, "divisor_override", None) is not None:
        raise NoBoundError(f"{module} overrides its divisor; write it as a scaled average pooling.")
    kernel, stride, padding = (_per_axis(value, axes) for value in (module.kernel_size, module.stride, module.padding))
    windows = [
        nn.AvgPool1d(width, step, extra, module.ceil_mode, module.count_include_pad)
        for width, step, extra in zip(kernel, stride, padding, strict=True)
    ]
    sizes = layer.input.shape[-axes:]
    return math.prod(_norm_of_axis(window, size) for window, size in zip(windows, sizes, strict=True))


def _adaptive_avg_pool(axes: int, module: Any, layer: Layer) -> float:
    sizes = zip(layer.input.shape[-axes:], layer.output.shape[-axes:], strict=True)
    return math.prod(_norm_of_axis(nn.AdaptiveAvgPool1d(after), before) for before, after in sizes)


for _axes, _max, _avg, _adaptive in (
    (1, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d),
    (2, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    (3, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d),
):
    register_bound_rule(_max)(partial(_max_pool, _axes))
    register_bound_rule(_avg)(partial(_avg_pool, _axes))
    register_bound_rule(_adaptive)(partial(_adaptive_avg_pool, _axes))


def absorbs(linear: nn.Module, batch_norm: nn.Module, ndim: int) -> bool:
    """Say whether the two are one linear layer with scaled output channels, by the rules of this file."""
    # ndim is that of the value between them: a batch norm after a linear layer on tokens scales the tokens
    channels_first = find_rule(linear) is _conv or (find_rule(linear) is _linear and ndim == 2)
    return channels_first and find_rule(batch_norm) is _batch_norm


def batch_norm_scale(module: _BatchNorm) -> Tensor:
    """Return what an evaluating batch norm multiplies each channel by, ``(C,)``."""
    if module.running_var is None:
        raise NoBoundError(f"{module} keeps no running statistics and is not a fixed map in evaluation.")
    scale = (module.running_var.double() + module.eps).rsqrt()
    return scale if module.weight is None else scale * module.weight.detach().double()


def _norm_of_axis(pooling: nn.Module, size: int) -> float:
    """Average pooling is a Kronecker product over its axes; return the norm of one factor, from its matrix."""
    matrix = pooling(torch.eye(size, dtype=torch.float64)[:, None])[:, 0]
    return linear_norm(matrix)


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)
