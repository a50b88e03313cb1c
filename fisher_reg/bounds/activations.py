"""The bound rules of activations: their largest slope, over all numbers or at the example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fisher_reg.bounds.registry import Layer, ScaledGain, find_rule, register_bound_rule
from fisher_reg.errors import NoBoundError

GELU_SLOPE = 0.5 * (1 + math.erf(1.0)) + math.sqrt(2) * math.exp(-1.0) / math.sqrt(2 * math.pi)
"""Largest slope of ``x Phi(x)``, at ``x = sqrt(2)`` where its second derivative ``(2 - x^2) phi(x)`` vanishes."""

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def _celu(module: nn.CELU) -> float:
    if module.alpha < 0:
        raise NoBoundError(f"{module} has an unbounded slope.")
    return 1.0


def _prelu(module: nn.PReLU) -> Tensor:
    return module.weight.abs().amax().clamp_min(1.0)


def _softplus(module: nn.Softplus) -> float:
    if module.beta * module.threshold < 0:
        raise NoBoundError(f"{module} jumps at a negative threshold.")
    return 1.0  # a sigmoid; the jump at the threshold is a change of slope below it


SLOPES: dict[type[nn.Module], Callable[[Any], float | Tensor]] = {
    nn.ReLU: lambda module: 1.0,
    nn.ReLU6: lambda module: 1.0,
    nn.Hardtanh: lambda module: 1.0,
    nn.LeakyReLU: lambda module: max(1.0, abs(module.negative_slope)),
    nn.PReLU: _prelu,
    nn.RReLU: lambda module: max(1.0, abs(module.lower + module.upper) / 2),  # in evaluation the mean slope
    nn.ELU: lambda module: max(1.0, abs(module.alpha)),  # alpha at 0-
    nn.CELU: _celu,
    nn.SELU: lambda module: _SELU_SCALE * _SELU_ALPHA,  # at 0-
    # The tanh form differs from x Phi(x) by less than 1e-3 in slope.
    nn.GELU: lambda module: GELU_SLOPE + (1e-3 if module.approximate == "tanh" else 0.0),
    nn.SiLU: lambda module: 1.09984,  # sigma(x) (1 + x (1 - sigma(x))) at x = 2.39936, rounded up
    nn.Mish: lambda module: 1.0885,  # at x = 1.4906, rounded up
    nn.Hardswish: lambda module: 1.5,  # (2 x + 3) / 6 at x = 3
    nn.Hardsigmoid: lambda module: 0.1666667,  # 1/6, which torch rounds up
    nn.Tanh: lambda module: 1.0,
    nn.Sigmoid: lambda module: 0.25,
    nn.Softplus: _softplus,
    nn.Softsign: lambda module: 1.0,
    nn.LogSigmoid: lambda module: 1.0,
    nn.Tanhshrink: lambda module: 1.0,
    nn.Softshrink: lambda module: 1.0,
}
"""Largest slope over all numbers, by module type."""


LOWEST_SLOPES: dict[type[nn.Module], float] = {
    nn.ReLU: 0.0,
    nn.ReLU6: 0.0,
    nn.Hardtanh: 0.0,
    nn.Tanh: 0.0,
    nn.Sigmoid: 0.0,
    nn.Softplus: 0.0,
    nn.GELU: 1 - GELU_SLOPE - 1e-3,  # x Phi(x) has the slope 1 - s at -x where it has s at x
    nn.SiLU: 1 - 1.09984,  # likewise
}
"""Smallest slope over all numbers, where it is above minus the largest."""


def slope_range(module: nn.Module) -> tuple[float, float] | None:
    """Return the smallest and the largest slope of an activation, None for another module or an unknown one."""
    kind = type(module)
    if find_rule(module) is not activation_gain or kind not in LOWEST_SLOPES:
        return None
    return LOWEST_SLOPES[kind], float(SLOPES[kind](module))


def activation_gain(module: nn.Module, layer: Layer) -> ScaledGain:
    """Return the largest slope; coordinates pass, since a diagonal Jacobian commutes with them.

    A one-per-channel parameter is taken at its largest.
    """
    largest = next(slope for kind, slope in SLOPES.items() if isinstance(module, kind))(module)
    return ScaledGain(_slope_at(module, layer.input) if layer.is_local else largest, scale=layer.scale)


register_bound_rule(*SLOPES)(activation_gain)


def _slope_at(module: nn.Module, hidden: Tensor) -> Tensor:
    with torch.enable_grad():
        point = hidden.detach().clone().requires_grad_()
        (slopes,) = torch.autograd.grad(module(point * 1.0).sum(), point)  # the copy may be overwritten in place
    return slopes.abs().flatten(1).amax(1)
