"""The bound rules of linear maps and convolutions, with the diagonal maps around them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fisher_reg.bounds.operator_norms.conv import Geometry
from fisher_reg.bounds.rules.call import Call, Operand, layer_of
from fisher_reg.bounds.rules.layer import Ball, Gain, Layer, ScaledGain, Tokens
from fisher_reg.bounds.rules.registry import find_rule, register_bound_rule, register_layer
from fisher_reg.errors import NoBoundError


def linear_rule(module: nn.Linear, layer: Layer) -> ScaledGain:
    """Bound a linear layer by :func:`linear_gain`."""
    return linear_gain(module.weight, module.bias, layer)


def linear_gain(weight: Tensor, bias: Tensor | None, layer: Layer) -> ScaledGain:
    """Bound a linear map of the last axis, from its scaled input to its output with the requested scaling.

    Args:
        weight: ``(out, in)``.
        bias: ``(out,)`` or None; it only shifts the range.
        layer: The call.

    Returns:
        The gain, with the range of the output if that of the input is known.
    """
    scaled = in_coordinates(weight, layer.scale_along(-1), layer.output_scale)
    norm = layer.norms.matrix(scaled)
    return ScaledGain(norm, _image(weight, bias, layer), scale=layer.output_scale)


def in_coordinates(weight: Tensor, input_scale: Tensor, output_scale: Tensor | None) -> Tensor:
    """Return ``diag(output_scale) weight diag(1 / input_scale)`` in double precision; channels on axes 0 and 1."""
    rest = [1] * (weight.ndim - 2)
    scaled = weight.double() / input_scale.view(1, -1, *rest)
    return scaled if output_scale is None else scaled * output_scale.view(-1, 1, *rest)


def _image(weight: Tensor, bias: Tensor | None, layer: Layer) -> Ball | None:
    if isinstance(layer.input_range, Ball) and layer.input_range.columns is None:
        norm = layer.norms.matrix(weight.double())
        shift = 0.0 if bias is None else bias.double().norm()
        return Ball(norm * layer.input_range.radius, norm * layer.input_range.norm + shift)
    if not isinstance(layer.input_range, Tokens):
        return None
    tokens, matrix = layer.input_range, weight.double()
    centre = matrix @ tokens.beta.double() + (0.0 if bias is None else bias.double())
    radius = layer.norms.matrix(matrix * tokens.gamma.double()) * tokens.radius
    return Ball(radius, radius + centre.norm())


def conv_rule(module: _ConvNd, layer: Layer) -> ScaledGain:
    """Bound a convolution by :func:`conv_gain`."""
    if layer.input.ndim != len(module.kernel_size) + 2:
        raise NoBoundError(f"{module} has a bound rule for batches only.")
    size = tuple(layer.input.shape[2:])
    return conv_gain(module.weight, Geometry.of(module, size), layer)


def conv_gain(weight: Tensor, geometry: Geometry, layer: Layer) -> ScaledGain:
    """Bound a convolution, like :func:`linear_gain` for a linear map.

    Args:
        weight: ``(out, in / groups, *kernel)``.
        geometry: Sizes and settings of the convolution.
        layer: The call.

    Returns:
        The gain.
    """
    channels = layer.scale_along(1)
    groups, per_group = geometry.groups, weight.shape[1]
    # the kernel of group g acts on the input channels g per_group, ...
    inputs = channels.view(groups, 1, per_group).expand(-1, weight.shape[0] // groups, -1).reshape(-1, per_group)
    rest = [1] * (weight.ndim - 2)
    scaled = weight.double() / inputs.view(*inputs.shape, *rest)
    if layer.output_scale is None:
        return ScaledGain(layer.norms.convolution(scaled, geometry))
    scaled = scaled * layer.output_scale.view(-1, 1, *rest)
    return ScaledGain(layer.norms.convolution(scaled, geometry), scale=layer.output_scale.view(1, -1, *rest))


def _transposed_conv(module: _ConvTransposeNd, layer: Layer) -> ScaledGain:
    if layer.input.ndim != len(module.kernel_size) + 2:
        raise NoBoundError(f"{module} has a bound rule for batches only.")
    # the adjoint is the convolution from the size of the output to that of the input
    size = tuple(layer.output.shape[2:])
    padding = tuple(int(amount) for amount in module.padding)
    return transposed_gain(module.weight, Geometry(size, module.stride, padding, module.dilation, module.groups), layer)


def transposed_gain(weight: Tensor, geometry: Geometry, layer: Layer) -> ScaledGain:
    """Bound a transposed convolution, like :func:`conv_gain` for a convolution."""
    channels = layer.scale_along(1)
    rest = [1] * (weight.ndim - 2)
    norm = layer.norms.transposed_convolution(weight.double() / channels.view(-1, 1, *rest), geometry)
    return ScaledGain(norm)


def scales_outputs(module: nn.Module, ndim: int) -> bool:
    """Return whether scaling axis 1 of the output scales the rows of the weight; false for channels on a later axis."""
    rule = find_rule(module)
    return rule is conv_rule or (rule is linear_rule and ndim == 2)


def _linear(call: Call) -> Gain:
    return linear_gain(call.argument("weight"), call.argument("bias"), layer_of(call))


def product_with(call: Call, left: Operand, right: Operand) -> Gain:
    """Bound ``x @ W``, a linear map of the last axis, or ``A @ x``, one of the axis before the last."""
    source = call.source
    sensitivity = call.sensitivity
    layer = Layer({"input": source.value}, call.value, call.norms, sensitivity.range, scale=sensitivity.scale)
    matrix, is_left = (right if source is left else left).value.double(), source is left
    if is_left and matrix.ndim == 2 and source.value.ndim >= 2:
        return linear_gain(matrix.mT, None, layer)
    if is_left and matrix.ndim == 1:
        return replace(linear_gain(matrix[None], None, layer), output_range=None)
    if matrix.ndim == 1:
        matrix = matrix[None]
    shorter = source.value.shape[-1] if is_left or source.value.ndim == 1 else source.value.shape[-2]
    longer = matrix.shape[-1] if is_left else matrix.shape[-2]
    copies = call.value.numel() * shorter / (longer * source.value.numel())  # more than one if it is broadcast
    norms = [call.norms.matrix(item) for item in matrix.reshape(-1, *matrix.shape[-2:])]
    return Gain(torch.stack(norms).amax() * math.sqrt(copies))


def _convolution(call: Call) -> Gain:
    weight = call.argument("weight")
    axes = weight.ndim - 2
    if call.source.value.ndim != axes + 2:
        raise NoBoundError(f"{call.name} has a bound rule for batches only.")
    padding = call.argument("padding", 0)
    if isinstance(padding, str) and padding != "valid":
        raise NoBoundError(f"{call.name} has padding given by name; pass the number of pixels.")
    stride, amount, dilation = (
        (item,) * axes if isinstance(item, int) else tuple(item) * (axes if len(item) == 1 else 1)
        for item in (call.argument("stride", 1), 0 if padding == "valid" else padding, call.argument("dilation", 1))
    )
    size = tuple(call.source.value.shape[2:])
    geometry = Geometry(size, stride, amount, dilation, call.argument("groups", 1))
    return conv_gain(weight, geometry, layer_of(call))


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(nn.Linear)(linear_rule)
    register_bound_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)(conv_rule)
    register_bound_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)(_transposed_conv)
    register_layer(_linear, "input weight bias", F.linear, "linear")
    register_layer(
        _convolution,
        "input weight bias stride padding dilation groups",
        *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, "conv1d", "conv2d", "conv3d"),
    )
