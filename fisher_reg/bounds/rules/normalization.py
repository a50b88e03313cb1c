"""The bound rules of normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fisher_reg.bounds.operator_norms.attention import layer_norm_tokens
from fisher_reg.bounds.rules.call import Call, layer_of
from fisher_reg.bounds.rules.layer import Gain, Interval, Layer, ScaledGain, diagonal_gain
from fisher_reg.bounds.rules.registry import register_bound_rule, register_layer
from fisher_reg.errors import NoBoundError
from fisher_reg.evaluation.batch_norm import scale_and_shift


def batch_norm_rule(module: _BatchNorm, layer: Layer) -> ScaledGain:
    """Bound a batch norm, which is a diagonal map in evaluation mode."""
    scale = batch_norm_scale(module)
    return diagonal_gain(scale.view(1, -1, *[1] * (layer.output.ndim - 2)), layer)


def batch_norm_scale(module: _BatchNorm) -> Tensor:
    """Return the factor of each channel of a batch norm in evaluation mode, ``(C,)``."""
    if module.running_var is None or module.running_mean is None:
        raise NoBoundError(f"{module} has no running statistics and is not a fixed map in evaluation mode.")
    statistics = module.running_mean.double(), module.running_var.double()
    weight = None if module.weight is None else module.weight.double()
    scale, _ = scale_and_shift(*statistics, weight, None, module.eps)
    return scale


def _layer_norm(module: nn.LayerNorm, layer: Layer) -> ScaledGain:
    return layer_norm_gain(module.weight, module.bias, module.eps, len(module.normalized_shape), layer)


def layer_norm_gain(gamma: Tensor | None, beta: Tensor | None, eps: float, axes: int, layer: Layer) -> ScaledGain:
    r"""Bound a layer norm: its Jacobian is :math:`\Gamma` times a projection, divided by the standard deviation.

    The standard deviation is at least :math:`\sqrt{\epsilon}`. The next layer absorbs the diagonal scaling
    :math:`\Gamma`.

    Args:
        gamma: Weight of the shape of the last ``axes`` axes, or None.
        beta: Bias of the same shape, or None.
        eps: Added to the variance.
        axes: Number of last axes that are normalised together.
        layer: The call.

    Returns:
        The gain, with the range of the output tokens if ``axes`` is 1.

    Raises:
        NoBoundError: Without an ``eps``.
    """
    if eps <= 0 and not layer.is_local:
        raise NoBoundError("A layer norm has no Lipschitz constant without an eps.")
    shape = layer.output.shape[-axes:]
    gamma = torch.ones(shape, dtype=torch.float64, device=layer.output.device) if gamma is None else gamma.double()
    beta = torch.zeros_like(gamma) if beta is None else beta.double()
    norm = _normalisation_norm(lambda entries: entries.flatten(-axes), eps, layer, centred=True)
    gained = diagonal_gain(gamma, Layer(layer.inputs, layer.output, layer.norms))
    tokens = layer_norm_tokens(gamma.detach(), beta.detach()) if axes == 1 else None
    return ScaledGain(norm * gained.norm, tokens, scale=gained.scale)


def _group_norm(module: nn.GroupNorm, layer: Layer) -> ScaledGain:
    gain = group_norm_gain(module.weight, module.eps, module.num_groups, layer)
    return replace(gain, output_range=_group_norm_range(module.weight, module.bias, module.num_groups, layer))


def _group_norm_range(weight: Tensor | None, bias: Tensor | None, num_groups: int, layer: Layer) -> Interval:
    """Return the range of the entries: a normalised group of n entries is a vector of norm at most sqrt(n)."""
    size = math.sqrt(layer.output[0].numel() / num_groups)
    factor = 1.0 if weight is None else float(weight.detach().abs().amax())
    largest = factor * size + (0.0 if bias is None else float(bias.detach().abs().amax()))
    return Interval(-largest, largest)


def _instance_norm(module: _InstanceNorm, layer: Layer) -> ScaledGain:
    if module.track_running_stats:
        return batch_norm_rule(module, layer)  # type: ignore[arg-type]
    if layer.input.ndim != {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}.get(type(module), 0):
        raise NoBoundError(f"{module} has a bound rule for batches only.")
    return group_norm_gain(module.weight, module.eps, layer.input.shape[1], layer)


def group_norm_gain(gamma: Tensor | None, eps: float, num_groups: int, layer: Layer) -> ScaledGain:
    """Bound a group norm, like :func:`layer_norm_gain` for a layer norm; channels are on axis 1."""
    if eps <= 0 and not layer.is_local:
        raise NoBoundError("A group norm has no Lipschitz constant without an eps.")
    norm = _normalisation_norm(lambda entries: entries.reshape(len(entries), num_groups, -1), eps, layer, centred=True)
    if gamma is None:
        return ScaledGain(norm)
    factor = gamma.double().view(1, -1, *[1] * (layer.output.ndim - 2))
    gained = diagonal_gain(factor, Layer(layer.inputs, layer.output, layer.norms))
    return ScaledGain(norm * gained.norm, scale=gained.scale)


def _rms_norm(module: nn.RMSNorm, layer: Layer) -> ScaledGain:
    return rms_norm_gain(module.weight, module.eps, len(module.normalized_shape), layer)


def rms_norm_gain(weight: Tensor | None, eps: float | None, axes: int, layer: Layer) -> ScaledGain:
    """Bound a root-mean-square norm: its Jacobian is ``Gamma (I - y y' / d) / rms``, at most ``Gamma / rms``."""
    eps = torch.finfo(layer.input.dtype).eps if eps is None else eps
    norm = _normalisation_norm(lambda entries: entries.flatten(-axes), eps, layer, centred=False)
    shape = layer.output.shape[-axes:]
    gamma = torch.ones(shape, device=layer.output.device) if weight is None else weight
    gained = diagonal_gain(gamma.double(), Layer(layer.inputs, layer.output, layer.norms))
    tokens = layer_norm_tokens(gamma.double().detach(), torch.zeros_like(gamma).double()) if axes == 1 else None
    return ScaledGain(norm * gained.norm, tokens, scale=gained.scale)


def _normalisation_norm(grouped: Callable[[Tensor], Tensor], eps: float, layer: Layer, *, centred: bool) -> Tensor:
    r"""Return the largest ``1 / sqrt(variance + eps)``, times the norm of the inverse scaling of the input.

    Over a region the norm of the centred entries of a group decreases by at most the norm of their deviation.
    """
    entries = grouped(layer.input.double())
    squares = entries.var(-1, unbiased=False) if centred else entries.square().mean(-1)
    if layer.deviation is not None:
        width = torch.linalg.vector_norm(grouped(layer.deviation.width), dim=-1) / entries.shape[-1] ** 0.5
        squares = (squares.sqrt() - width).clamp_min(0).square()
    elif not layer.is_local:
        squares = squares.new_zeros(1, 1)
    smallest = squares.reshape(len(squares), -1).amin(1)
    smallest = smallest if layer.is_local or layer.deviation is not None else smallest[0]
    norm: Tensor = (smallest + eps).rsqrt() * forgotten(layer.scale)
    return norm


def forgotten(scale: Tensor | None) -> Any:
    """Return the norm of the inverse scaling: the largest ratio of the norm of a vector to that of the scaled one."""
    return 1.0 if scale is None else 1 / scale.amin()


def _functional_batch_norm(call: Call) -> Gain:
    return diagonal_gain(_batch_norm_factor(call), layer_of(call))


def _batch_norm_factor(call: Call) -> Tensor:
    mean, variance, weight = (call.argument(name) for name in ("running_mean", "running_var", "weight"))
    if call.argument("training", False) or mean is None or variance is None:
        raise NoBoundError(f"{call.name} uses the statistics of the batch, which makes examples depend on each other.")
    weight = None if weight is None else weight.double()
    factor, _ = scale_and_shift(mean.double(), variance.double(), weight, None, call.argument("eps", 1e-5))
    shape = (1, -1, *[1] * (call.value.ndim - 2))
    return factor.view(shape)


def _batch_norm_width(call: Call) -> Tensor | None:
    around = call.operands["input"].around
    return None if around is None else around.width * _batch_norm_factor(call).detach().abs()


_functional_batch_norm.width = _batch_norm_width  # type: ignore[attr-defined]


def _functional_layer_norm(call: Call) -> Gain:
    axes = len(call.argument("normalized_shape"))
    eps = call.argument("eps", 1e-5)
    return layer_norm_gain(call.argument("weight"), call.argument("bias"), eps, axes, layer_of(call))


def _functional_group_norm(call: Call) -> Gain:
    eps = call.argument("eps", 1e-5)
    layer, num_groups = layer_of(call), call.argument("num_groups")
    gain = group_norm_gain(call.argument("weight"), eps, num_groups, layer)
    return replace(
        gain, output_range=_group_norm_range(call.argument("weight"), call.argument("bias"), num_groups, layer)
    )


def _native_group_norm(call: Call) -> Gain:
    return group_norm_gain(call.argument("weight"), call.argument("eps"), call.argument("group"), layer_of(call))


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)(batch_norm_rule)
    register_bound_rule(nn.LayerNorm)(_layer_norm)
    register_bound_rule(nn.GroupNorm)(_group_norm)
    register_bound_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)(_instance_norm)
    register_bound_rule(nn.RMSNorm)(_rms_norm)
    register_layer(
        _functional_batch_norm,
        "input running_mean running_var weight bias training momentum eps cudnn_enabled",
        F.batch_norm,
    )
    register_layer(
        _functional_batch_norm,
        "input weight bias running_mean running_var training momentum eps cudnn_enabled",
        "batch_norm",
    )
    register_layer(
        _functional_layer_norm,
        "input normalized_shape weight bias eps cudnn_enable",
        *(F.layer_norm, torch.layer_norm, "layer_norm"),
    )
    register_layer(
        _functional_group_norm,
        "input num_groups weight bias eps cudnn_enabled",
        *(F.group_norm, torch.group_norm, "group_norm"),
    )
    register_layer(
        _functional_batch_norm,
        "input weight bias running_mean running_var momentum eps",
        "_native_batch_norm_legit_no_training",
        first_of_several=True,
    )
    register_layer(
        _functional_layer_norm,
        "input normalized_shape weight bias eps",
        *(torch.native_layer_norm, "native_layer_norm"),
        first_of_several=True,
    )
    register_layer(
        _native_group_norm,
        "input weight bias N C HxW group eps",
        *(torch.native_group_norm, "native_group_norm"),
        first_of_several=True,
    )
