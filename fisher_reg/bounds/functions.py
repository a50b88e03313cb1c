"""The bound rules of functions and tensor methods, by what the graph calls.

A rule sees a call with its arguments under their names; an argument that it does not name is refused, and so is every
function without a rule. ATen operators, which :func:`torch.export` leaves, are found by the name of their method.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from fisher_reg.bounds.attention import dot_product_attention_gains
from fisher_reg.bounds.calls import Call, FunctionRule, Operand, Reach, as_double, log, log_sum, name_of, side_by_side
from fisher_reg.bounds.conv import Geometry
from fisher_reg.bounds.linears import conv_gain, linear_gain
from fisher_reg.bounds.normalizations import diagonal_gain, group_norm_gain, layer_norm_gain
from fisher_reg.bounds.poolings import interpolation_gain
from fisher_reg.bounds.registry import Ball, Gain, Layer, ScaledGain, find_rule
from fisher_reg.errors import NoBoundError

FUNCTION_RULES: dict[Any, FunctionRule] = {}
"""From what the graph calls, a function or the name of a method, to its rule."""


def find_function_rule(target: Any) -> FunctionRule | None:
    """Return the rule of a function, the name of a method, or an ATen operator."""
    if isinstance(target, torch._ops.OpOverload):
        return FUNCTION_RULES.get(name_of(target)) if target.namespace == "aten" else None
    if target in FUNCTION_RULES:
        return FUNCTION_RULES[target]
    module = getattr(target, "__module__", "") or ""
    return FUNCTION_RULES.get(name_of(target)) if module.startswith("torchvision.ops") else None


def adds(node: fx.Node) -> bool:
    """Say whether the node is a sum or a difference."""
    rule = find_function_rule(node.target) if node.op in ("call_function", "call_method") else None
    return rule is not None and rule.apply is _sum


def moves(node: fx.Node) -> bool:
    """Say whether the node moves entries without a change."""
    rule = find_function_rule(node.target) if node.op in ("call_function", "call_method") else None
    return rule is not None and rule.apply in (_moves, _same)


def activation_module(target: Any) -> nn.Module | None:
    """Return the module form of an activation function with its default settings."""
    return nn.ReLU() if target in (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_") else None


def passes_channels(target: Any) -> bool:
    """Say whether the function leaves each channel where it is and apart from the others."""
    rule = find_function_rule(target)
    return rule is not None and (
        rule.is_layer and rule.apply.__name__ == "as_module" or rule.apply in (_same, _dropout)
    )


def layer_of(call: Call) -> Layer:
    """Return the call as the call of a layer of one input."""
    reach = call.reach
    return Layer(
        {"input": call.source.value},
        call.value,
        call.norms,
        reach.range,
        is_local=call.is_local,
        scale=reach.scale,
    )


def _same(call: Call) -> Reach:
    return call.reach


def _flips(call: Call) -> Reach:
    return replace(call.reach, range=None)


def _moves(call: Call) -> Reach:
    """Entries are moved or dropped, each is used once at most."""
    reach = call.reach
    moved = None if reach.scale is None else call.again(reach.scale.expand(call.source.value.shape))
    kept = _kept_range(call, reach)
    if isinstance(call.value, list | tuple):
        scales = [None] * len(call.value) if moved is None else list(moved)
        parts = tuple(Reach(reach.log_norm, scale, kept) for scale in scales)
        return Reach(reach.log_norm, parts=parts)
    return Reach(reach.log_norm, moved, kept)


def _kept_range(call: Call, reach: Reach) -> Ball | None:
    """Return the range if each vector along the last axis is still a part of one that it speaks of."""
    if not isinstance(reach.range, Ball):
        return None
    value = call.source.value
    owner = torch.arange(value[..., 0].numel(), device=value.device).view(value.shape[:-1])[..., None]
    moved = call.again(owner.expand(value.shape))
    parts = moved if isinstance(moved, list | tuple) else (moved,)
    return reach.range if all(bool((part == part[..., :1]).all()) for part in parts) else None


def _dropout(call: Call) -> Reach:
    if call.argument("training", call.argument("train")) is not False:
        raise NoBoundError(f"{call.name} drops also in evaluation; pass training=self.training.")
    return call.reach


def _index(call: Call) -> Reach:
    source, index = call.operands["input"], call.operands["index"].value
    parts = source.reach if isinstance(source.reach, tuple) else source.reach.parts
    if parts:
        part: Reach = parts[index]
        return part
    assert isinstance(source.reach, Reach)
    if isinstance(source.value, list | tuple):
        return source.reach  # the outputs of a module, of which only the first is ever taken
    indices = index if isinstance(index, tuple) else (index,)
    if not all(item is None or item is Ellipsis or isinstance(item, int | slice) for item in indices):
        raise NoBoundError(f"{call.name} is indexed with a list or tensor, which may repeat elements.")
    return _moves(call)


def _copies(call: Call) -> Reach:
    reach = call.reach
    scale = None if reach.scale is None else call.again(reach.scale.expand(call.source.value.shape))
    return Reach(_shifted(reach, 0.5 * log(call.copies)), scale)


def _shifted(reach: Reach, log_factor: Tensor | float) -> Tensor:
    assert reach.log_norm is not None
    return reach.log_norm + log_factor


def _sum(call: Call) -> Reach:
    if call.argument("alpha", 1) != 1:
        raise NoBoundError(f"{call.name} is called with a factor; write it as a product.")
    terms = [_broadcast(operand, call.value) for operand in call.operands.values() if not operand.is_constant]
    if len(terms) == 1:
        return terms[0]
    scales = [term.scale for term in terms if term.scale is not None]
    scale = None
    if scales:  # the smaller coordinates: no term gets longer in them
        ones = [torch.ones((), dtype=torch.float64, device=call.value.device)] * (len(terms) - len(scales))
        scale = torch.stack([item.expand(call.value.shape) for item in (*scales, *ones)]).amin(0)
    return Reach(log_sum([term.within(scale) for term in terms]), scale)


def _broadcast(operand: Operand, value: Tensor) -> Reach:
    assert isinstance(operand.reach, Reach)
    return replace(
        operand.reach, log_norm=_shifted(operand.reach, 0.5 * log(value.numel() / operand.value.numel())), range=None
    )


def _multiply(call: Call) -> Reach:
    operands = [item for item in call.operands.values() if isinstance(item.value, Tensor) and not item.is_constant]
    if call.is_local and len(operands) == 2:
        return _product_at(call, *operands)
    source = call.source
    (factor,) = (operand.value for operand in call.operands.values() if operand is not source)
    return _scaled(call, as_double(factor))


def _product_at(call: Call, first: Operand, second: Operand) -> Reach:
    """At the example the product rule holds: ``d(a b) = b da + a db``."""
    sizes = [item.value.double().abs().flatten(1).amax(1) for item in (second, first)]
    terms = [_broadcast(item, call.value).plain() for item in (first, second)]
    return Reach(log_sum([_shifted(term, log(size)) for term, size in zip(terms, sizes, strict=True)]))


def _divide(call: Call) -> Reach:
    if call.source is not call.operands["input"]:
        raise NoBoundError(f"{call.name} divides by a value that depends on the input: no global constant.")
    return _scaled(call, 1 / as_double(call.argument("other")))


def _scaled(call: Call, factor: Tensor) -> Reach:
    reach = _broadcast(call.source, call.value)
    ball = call.reach.range
    factor = factor.to(call.value.device)
    if factor.numel() == 1:
        size = factor.abs().reshape(())
        kept = Ball(ball.radius * size, ball.norm * size) if isinstance(ball, Ball) and call.copies == 1 else None
        return Reach(_shifted(reach, log(size)), reach.scale, kept)
    layer = replace(layer_of(call), scale=reach.scale)
    return (
        Reach(reach.log_norm, reach.scale).after(diagonal_gain(factor, layer))
        if factor.any()
        else Reach(_shifted(reach, log(0.0)))
    )


def _concatenate(call: Call) -> Reach:
    tensors = call.operands["tensors"]
    if not isinstance(tensors.value, list | tuple):
        raise NoBoundError(f"{call.name} takes a list of tensors.")
    reaches = tensors.reach if isinstance(tensors.reach, tuple) else tensors.reach.parts
    varying = [reach for reach in reaches if reach.log_norm is not None]
    scale = None
    if any(reach.scale is not None for reach in varying):
        ones = [torch.ones((), dtype=torch.float64, device=item.device) for item in tensors.value]
        pieces = zip(reaches, tensors.value, ones, strict=True)
        scale = call.again(
            [(one if reach.scale is None else reach.scale).expand(item.shape) for reach, item, one in pieces]
        )
    return Reach(side_by_side([reach.log_norm for reach in varying if reach.log_norm is not None]), scale)


def _reduce(call: Call, log_factor: Tensor) -> Reach:
    reach = call.reach
    dims, keepdim = call.argument("dim"), call.argument("keepdim", False)
    dims = tuple(range(call.source.value.ndim)) if dims is None else dims
    scale = None if reach.scale is None else reach.scale.expand(call.source.value.shape).amin(dims, keepdim=keepdim)
    return Reach(_shifted(reach, log_factor), scale)


def _mean(call: Call) -> Reach:
    return _reduce(call, 0.5 * log(call.copies))


def _total(call: Call) -> Reach:
    return _reduce(call, -0.5 * log(call.copies))


def _largest(call: Call) -> Reach:
    # Each output takes one entry, or shares equal ones out; the windows are disjoint.
    return _reduce(call, torch.zeros(()).double())


def _softmax(call: Call) -> Reach:
    # diag(p) - p p' has norm 1/2 at most.
    return Reach(_shifted(call.reach.plain(), log(0.5)))


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
    variance = call.argument("running_var")
    if call.argument("training", False) or variance is None:
        raise NoBoundError(f"{call.name} normalises with the statistics of the batch, which couples the examples.")
    factor = (variance.double() + call.argument("eps", 1e-5)).rsqrt()
    if call.argument("weight") is not None:
        factor = factor * call.argument("weight").double()
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
    return interpolation_gain(call.argument("mode", "nearest"), call.argument("align_corners"), layer_of(call))


def _pad(call: Call) -> Reach:
    if call.argument("mode", "constant") != "constant":
        raise NoBoundError(f"{call.name} pads with copies; use a padding module, which has a rule.")
    reach = call.reach
    if reach.scale is None:
        return Reach(reach.log_norm)
    widths = list(call.argument("pad"))
    padded = F.pad(reach.scale.expand(call.source.value.shape), widths, value=float(reach.scale.amax()))
    return Reach(reach.log_norm, padded)


def _attention(call: Call) -> Reach:
    query, key, value = (call.operands[name] for name in ("query", "key", "value"))
    if call.argument("dropout_p", 0.0) != 0:
        raise NoBoundError(f"{call.name} drops in evaluation.")
    call.argument("attn_mask")
    reaches = [item.reach for item in (query, key, value) if isinstance(item.reach, Reach)]
    balls = [reach.range for reach in reaches if isinstance(reach.range, Ball)]
    if len(balls) < 3:
        raise NoBoundError(
            "Dot-product attention has no global Lipschitz constant on an unbounded domain, and no layer norm and "
            "linear layer stand right before this one to bound it. Only pre-norm attention has a global bound."
        )
    scale = call.argument("scale")
    scale = query.value.shape[-1] ** -0.5 if scale is None else scale
    gains = dot_product_attention_gains(query.value.shape[-2], scale, *balls)
    sides = zip(reaches, (gains.query, gains.key, gains.value), strict=True)
    return Reach(log_sum([_shifted(reach.plain(), log(gain)) for reach, gain in sides]))


def _as_module(build: Callable[..., nn.Module]) -> Callable[[Call], Gain]:
    """Reuse the rule of the module that a functional call is the forward of; its settings are the other arguments."""

    def as_module(call: Call) -> Gain:
        settings = {key: item.value for key, item in call.operands.items() if key not in ("input", "inplace")}
        settings = {key: item for key, item in settings.items() if not (key == "stride" and item == [])}
        module = build(**settings)
        found = find_rule(module)
        if found is None:
            raise NoBoundError(f"{call.name} has no rule for its module form {module}.")
        gain = found(module, layer_of(call))
        return gain if isinstance(gain, Gain) else Gain(gain)

    return as_module


def _prelu(call: Call) -> Gain:
    return ScaledGain(call.argument("weight").double().abs().amax().clamp_min(1.0), scale=call.reach.scale)


def _register(
    apply: Callable[[Call], Reach] | Callable[[Call], Gain], names: str | None, *targets: Any, is_layer: bool = False
) -> None:
    rule = FunctionRule(apply, None if names is None else tuple(names.split()), is_layer)
    FUNCTION_RULES.update(dict.fromkeys(targets, rule))


_register_layer = partial(_register, is_layer=True)

_register(_sum, "input other", operator.add, operator.iadd, operator.sub, operator.isub)
_register(_sum, "input other alpha", torch.add, torch.sub, "add", "add_", "sub", "sub_")
_register(_multiply, "input other", operator.mul, operator.imul, torch.mul, "mul", "mul_")
_register(_divide, "input other", operator.truediv, operator.itruediv, torch.div, "div", "div_")
_register(_flips, "input", operator.neg, torch.neg, "neg", torch.abs, "abs")
_register(_same, "input", "float", "double", "alias", "lift_fresh_copy", "detach", "detach_", torch.clone)
_register(_same, "input dtype device layout memory_format", "to", "_to_copy", "clone", "contiguous", "type_as")
_register(_concatenate, "tensors dim", torch.cat, torch.concat, torch.stack, "cat", "stack", "concat")
_register(_mean, "input dim keepdim", torch.mean, "mean")
_register(_total, "input dim keepdim", torch.sum, "sum")
_register(_largest, "input dim keepdim", torch.amax, torch.amin, "amax", "amin")
_register(_copies, None, "expand", "expand_as", "repeat")
_register(_index, "input index", operator.getitem)
_register(_moves, None, torch.flatten, "flatten", torch.reshape, torch.permute, "reshape", "view", "permute")
_register(_moves, None, torch.transpose, "transpose", torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze", "t")
_register(_moves, None, torch.select, "select", "slice", torch.chunk, "chunk", torch.split, "split", "split_with_sizes")
_register(_moves, None, torch.unbind, "unbind", torch.roll, "roll", torch.flip, "flip", "narrow", torch.narrow)
_register(_moves, None, F.pixel_shuffle, F.pixel_unshuffle, "unflatten", "_unsafe_view", "swapaxes", torch.swapaxes)
_register(_dropout, "input p training inplace", F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
_register(_dropout, "input p mode training", "stochastic_depth")
_register(_dropout, "input p train", "dropout", "feature_dropout")
_register(_softmax, "input dim dtype half_to_float _stacklevel", torch.softmax, F.softmax, "softmax", "_softmax")
_register_layer(_linear, "input weight bias", F.linear, "linear")
_register_layer(
    _convolution,
    "input weight bias stride padding dilation groups",
    *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, "conv1d", "conv2d", "conv3d"),
)
_register_layer(
    _batch_norm, "input running_mean running_var weight bias training momentum eps cudnn_enabled", F.batch_norm
)
_register_layer(
    _batch_norm, "input weight bias running_mean running_var training momentum eps cudnn_enabled", "batch_norm"
)
_register_layer(
    _layer_norm, "input normalized_shape weight bias eps cudnn_enable", F.layer_norm, torch.layer_norm, "layer_norm"
)
_register_layer(
    _group_norm, "input num_groups weight bias eps cudnn_enabled", F.group_norm, torch.group_norm, "group_norm"
)
_register_layer(
    _interpolate, "input size scale_factor mode align_corners recompute_scale_factor antialias", F.interpolate
)
_register(_pad, "input pad mode value", F.pad, "constant_pad_nd", "pad")
_register(
    _attention,
    "query key value attn_mask dropout_p is_causal scale enable_gqa",
    *(F.scaled_dot_product_attention, "scaled_dot_product_attention"),
)
_register_layer(_prelu, "input weight", F.prelu, torch.prelu, "prelu")
_register_layer(_as_module(nn.ReLU), "input inplace", F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_register_layer(_as_module(nn.ReLU6), "input inplace", F.relu6, "relu6")
_register_layer(_as_module(nn.Hardtanh), "input min_val max_val inplace", F.hardtanh, "hardtanh", "hardtanh_")
_register_layer(_as_module(nn.ELU), "input alpha inplace", F.elu)
_register_layer(_as_module(nn.CELU), "input alpha inplace", F.celu)
_register_layer(_as_module(nn.SELU), "input inplace", F.selu)
_register_layer(_as_module(nn.GELU), "input approximate", F.gelu, "gelu")
_register_layer(_as_module(nn.SiLU), "input inplace", F.silu, "silu", "silu_")
_register_layer(_as_module(nn.Mish), "input inplace", F.mish, "mish")
_register_layer(_as_module(nn.Hardswish), "input inplace", F.hardswish, "hardswish", "hardswish_")
_register_layer(_as_module(nn.Hardsigmoid), "input inplace", F.hardsigmoid, "hardsigmoid")
_register_layer(_as_module(nn.LeakyReLU), "input negative_slope inplace", F.leaky_relu, "leaky_relu", "leaky_relu_")
_register_layer(_as_module(nn.Softplus), "input beta threshold", F.softplus, "softplus")
_register_layer(_as_module(nn.Softsign), "input", F.softsign)
_register_layer(_as_module(nn.LogSigmoid), "input", F.logsigmoid, "log_sigmoid")
_register_layer(_as_module(nn.Tanhshrink), "input", F.tanhshrink)
_register_layer(_as_module(nn.Tanh), "input", torch.tanh, F.tanh, "tanh", "tanh_")
_register_layer(_as_module(nn.Sigmoid), "input", torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_")
_register_layer(_as_module(nn.AdaptiveAvgPool2d), "input output_size", F.adaptive_avg_pool2d, "adaptive_avg_pool2d")
_register_layer(_as_module(nn.AdaptiveAvgPool1d), "input output_size", F.adaptive_avg_pool1d, "adaptive_avg_pool1d")
_register_layer(_as_module(nn.AdaptiveMaxPool2d), "input output_size return_indices", F.adaptive_max_pool2d)
_register_layer(
    _as_module(nn.AvgPool2d),
    "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    *(F.avg_pool2d, "avg_pool2d"),
)
_register_layer(
    _as_module(nn.MaxPool2d),
    "input kernel_size stride padding dilation ceil_mode",
    *(F.max_pool2d, "max_pool2d"),
)
