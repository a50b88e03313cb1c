"""The bound rules of activations: their largest slope, over all numbers or at the example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.extents import POSITIVE
from fisher_reg.bounds.rules.layer import Gain, Interval, Layer, ScaledGain, largest_of_each
from fisher_reg.bounds.rules.registry import as_module, find_rule, register_bound_rule, register_layer
from fisher_reg.bounds.rules.slopes import GELU_SLOPE, slopes_at, slopes_within
from fisher_reg.bounds.sensitivity import as_double
from fisher_reg.errors import NoBoundError

_SMALLEST_THRESHOLD = 15.0
"""For larger thresholds the jump of a softplus is smaller than the rounding of its value in float32."""

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def _celu(module: nn.CELU) -> float:
    if module.alpha < 0:
        raise NoBoundError(f"{module} has an unbounded slope.")
    return 1.0


def _prelu(module: nn.PReLU) -> Tensor:
    return module.weight.abs().amax().clamp_min(1.0)


def _softplus(module: nn.Softplus) -> float:
    # where beta x exceeds the threshold t, torch returns x: the value jumps by log1p(exp(-t)) / beta
    if not (module.threshold >= _SMALLEST_THRESHOLD and module.beta != 0):
        raise NoBoundError(
            f"{module} jumps at its threshold and is not continuous in the input; choose a threshold of at least "
            f"{_SMALLEST_THRESHOLD:.0f} (the default is 20)."
        )
    return 1.0  # the slope is a sigmoid


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
    # the slope of the tanh form differs from that of x Phi(x) by less than 1e-3
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
    nn.GELU: 1 - GELU_SLOPE - 1e-3,  # if the slope of x Phi(x) is s at x, it is 1 - s at -x
    nn.SiLU: 1 - 1.09984,  # the same symmetry
}
"""Smallest slope over all numbers, if it is larger than minus the largest slope."""


RANGES: dict[type[nn.Module], Callable[[Any], Interval]] = {
    nn.ReLU: lambda module: POSITIVE,
    nn.ReLU6: lambda module: Interval(0.0, 6.0),
    nn.Hardtanh: lambda module: Interval(module.min_val, module.max_val),
    nn.Hardsigmoid: lambda module: Interval(0.0, 1.0),
    nn.Tanh: lambda module: Interval(-1.0, 1.0),
    nn.Sigmoid: lambda module: Interval(0.0, 1.0),
    nn.Softplus: lambda module: POSITIVE if module.beta > 0 else Interval(-math.inf, math.inf),
    nn.Softsign: lambda module: Interval(-1.0, 1.0),
    nn.LogSigmoid: lambda module: Interval(-math.inf, 0.0),
}
"""Range of the values of an activation."""


def slope_range(module: nn.Module) -> tuple[float, float] | None:
    """Return the smallest and the largest slope of an activation; None for other modules."""
    kind = type(module)
    if find_rule(module) is not activation_gain or kind not in LOWEST_SLOPES:
        return None
    return LOWEST_SLOPES[kind], float(SLOPES[kind](module))


def activation_gain(module: nn.Module, layer: Layer) -> ScaledGain:
    """Return the largest slope; the scaling is unchanged, since a diagonal Jacobian commutes with it.

    For a parameter per channel it is the largest over the channels.
    """
    largest = next(slope for kind, slope in SLOPES.items() if isinstance(module, kind))(module)
    known = next((found(module) for kind, found in RANGES.items() if isinstance(module, kind)), None)
    if layer.is_local:
        return ScaledGain(largest_of_each(slopes_at(module, layer.input).abs()), known, scale=layer.scale)
    within = None
    if layer.deviation is not None:
        within = slopes_within(module, layer.input, layer.deviation.width)
    if within is None:
        return ScaledGain(largest, known, scale=layer.scale)
    steepest = largest_of_each(torch.maximum(within[0].abs(), within[1].abs()))
    return ScaledGain(
        steepest.nan_to_num(nan=math.inf).clamp_max(as_double(largest).to(steepest)), known, scale=layer.scale
    )


def activation_module(target: Any) -> nn.Module | None:
    """Return the module form of an activation function with its default settings."""
    return nn.ReLU() if target in (F.relu, torch.relu, "relu") else None


def _functional_prelu(call: Call) -> Gain:
    return ScaledGain(call.argument("weight").double().abs().amax().clamp_min(1.0), scale=call.sensitivity.scale)


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(*SLOPES)(activation_gain)
    register_layer(_functional_prelu, "input weight", F.prelu, torch.prelu, "prelu")
    register_layer(as_module(nn.ReLU), "input inplace", F.relu, torch.relu, "relu")
    register_layer(as_module(nn.ReLU6), "input inplace", F.relu6, "relu6")
    register_layer(as_module(nn.Hardtanh), "input min_val max_val inplace", F.hardtanh, "hardtanh")
    register_layer(as_module(nn.ELU), "input alpha inplace", F.elu, "elu")
    register_layer(as_module(nn.CELU), "input alpha inplace", F.celu, "celu")
    register_layer(as_module(nn.SELU), "input inplace", F.selu, "selu")
    register_layer(as_module(nn.GELU), "input approximate", F.gelu, "gelu")
    register_layer(as_module(nn.SiLU), "input inplace", F.silu, "silu")
    register_layer(as_module(nn.Mish), "input inplace", F.mish, "mish")
    register_layer(as_module(nn.Hardswish), "input inplace", F.hardswish, "hardswish")
    register_layer(as_module(nn.Hardsigmoid), "input inplace", F.hardsigmoid, "hardsigmoid")
    register_layer(as_module(nn.LeakyReLU), "input negative_slope inplace", F.leaky_relu, "leaky_relu")
    register_layer(as_module(nn.Softplus), "input beta threshold", F.softplus, "softplus")
    register_layer(as_module(nn.Softsign), "input", F.softsign)
    register_layer(as_module(nn.LogSigmoid), "input", F.logsigmoid, "log_sigmoid")
    register_layer(as_module(nn.Tanhshrink), "input", F.tanhshrink)
    register_layer(as_module(nn.Tanh), "input", torch.tanh, F.tanh, "tanh")
    register_layer(as_module(nn.Sigmoid), "input", torch.sigmoid, F.sigmoid, "sigmoid")
