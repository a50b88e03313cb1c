"""The bound rules of normalisation layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fisher_reg.bounds.operator_norms.attention import layer_norm_tokens
from fisher_reg.bounds.rules.call import Call, layer_of
from fisher_reg.bounds.rules.layer import Gain, Layer, ScaledGain, diagonal_gain
from fisher_reg.bounds.rules.registry import register_bound_rule, register_layer
from fisher_reg.errors import NoBoundError
from fisher_reg.evaluation.batch_norm import scale_and_shift


def batch_norm_rule(module: _BatchNorm, layer: Layer) -> ScaledGain:
    """In evaluation it is a diagonal map."""
    scale = batch_norm_scale(module)
    return diagonal_gain(scale.view(1, -1, *[1] * (layer.output.ndim - 2)), layer)


def batch_norm_scale(module: _BatchNorm) -> Tensor:
    """Return what an evaluating batch norm multiplies each channel by, ``(C,)``."""
    if module.running_var is None or module.running_mean is None:
        raise NoBoundError(f"{module} keeps no running statistics and is not a fixed map in evaluation.")
    statistics = module.running_mean.double(), module.running_var.double()
    weight = None if module.weight is None else module.weight.double()
    scale, _ = scale_and_shift(*statistics, weight, None, module.eps)
    return scale


def _layer_norm(module: nn.LayerNorm, layer: Layer) -> ScaledGain:
    return layer_norm_gain(module.weight, module.bias, module.eps, len(module.normalized_shape), layer)


def layer_norm_gain(gamma: Tensor | None, beta: Tensor | None, eps: float, axes: int, layer: Layer) -> ScaledGain:
    r"""Bound a layer norm: its Jacobian is :math:`\Gamma` times a projection over the standard deviation.

    The deviation is at least :math:`\sqrt{\epsilon}`. :math:`\Gamma` is left to the next layer.

    Args:
        gamma: Weight of the shape of the last ``axes`` axes, or None.
        beta: Bias, likewise.
        eps: What is added to the variance.
        axes: How many last axes are normalised together.
        layer: The call.

    Returns:
        The gain, with the range of the output tokens where ``axes`` is 1.

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
    return group_norm_gain(module.weight, module.eps, module.num_groups, layer)


def _instance_norm(module: _InstanceNorm, layer: Layer) -> ScaledGain:
    if module.track_running_stats:
        return batch_norm_rule(module, layer)  # type: ignore[arg-type]
    if layer.input.ndim != {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}.get(type(module), 0):
        raise NoBoundError(f"{module} has a bound rule for batches only.")
    return group_norm_gain(module.weight, module.eps, layer.input.shape[1], layer)


def group_norm_gain(gamma: Tensor | None, eps: float, num_groups: int, layer: Layer) -> ScaledGain:
    """Bound a group norm as :func:`layer_norm_gain` does a layer norm; channels are on axis 1."""
    if eps <= 0 and not layer.is_local:
        raise NoBoundError("A group norm has no Lipschitz constant without an eps.")
    norm = _normalisation_norm(lambda entries: entries.reshape(len(entries), num_groups, -1), eps, layer, centred=True)
    if gamma is None:
        return ScaledGain(norm)
    factor = gamma.double().view(1, -1, *[1] * (layer.output.ndim - 2))
    gained = diagonal_gain(factor, Layer(layer.inputs, layer.output, layer.norms))
    return ScaledGain(norm * gained.norm, scale=gained.scale)


def _rms_norm(module: nn.RMSNorm, layer: Layer) -> ScaledGain:
    # The Jacobian is Gamma (I - y y' / d) / rms, of norm at most 1 / rms before Gamma.
    eps = torch.finfo(layer.input.dtype).eps if module.eps is None else module.eps
    axes = len(module.normalized_shape)
    norm = _normalisation_norm(lambda entries: entries.flatten(-axes), eps, layer, centred=False)
    shape = layer.output.shape[-axes:]
    gamma = torch.ones(shape, device=layer.output.device) if module.weight is None else module.weight
    gained = diagonal_gain(gamma.double(), Layer(layer.inputs, layer.output, layer.norms))
    tokens = layer_norm_tokens(gamma.double().detach(), torch.zeros_like(gamma).double()) if axes == 1 else None
    return ScaledGain(norm * gained.norm, tokens, scale=gained.scale)


def _normalisation_norm(grouped: Callable[[Tensor], Tensor], eps: float, layer: Layer, *, centred: bool) -> Tensor:
    r"""Return ``1 / sqrt(variance + eps)`` at its largest, after the coordinates of the input.

    Over a region the centred entries of a group are a vector whose length shrinks by at most that of the deviation.
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
    """Return how much longer a vector can be than in its scaled coordinates."""
    return 1.0 if scale is None else 1 / scale.amin()


def _functional_batch_norm(call: Call) -> Gain:
    mean, variance, weight = (call.argument(name) for name in ("running_mean", "running_var", "weight"))
    if call.argument("training", False) or mean is None or variance is None:
        raise NoBoundError(f"{call.name} normalises with the statistics of the batch, which couples the examples.")
    weight = None if weight is None else weight.double()
    factor, _ = scale_and_shift(mean.double(), variance.double(), weight, None, call.argument("eps", 1e-5))
    shape = (1, -1, *[1] * (call.value.ndim - 2))
    return diagonal_gain(factor.view(shape), layer_of(call))


def _functional_layer_norm(call: Call) -> Gain:
    axes = len(call.argument("normalized_shape"))
    eps = call.argument("eps", 1e-5)
    return layer_norm_gain(call.argument("weight"), call.argument("bias"), eps, axes, layer_of(call))


def _functional_group_norm(call: Call) -> Gain:
    eps = call.argument("eps", 1e-5)
    return group_norm_gain(call.argument("weight"), eps, call.argument("num_groups"), layer_of(call))


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
