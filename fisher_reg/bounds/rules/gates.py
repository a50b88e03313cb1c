r"""The bound rules of gated linear units, local response norms and power poolings.

- GLU: the outputs :math:`a\, \sigma(b)` have the gradient :math:`(\sigma(b), a \sigma'(b))`, of norm at most
  :math:`\sqrt{1 + a^2 / 16}`.
- Local response norm, :math:`y_i = x_i D_i^{-\beta}` with :math:`D_i = k + \tfrac\alpha n \sum_j x_j^2` over n
  neighbours: :math:`dy_i = D_i^{-\beta} dx_i - \tfrac{2 \alpha \beta}{n} x_i D_i^{-\beta - 1} \sum_j x_j dx_j`. Since
  :math:`\tfrac\alpha n |x_i| (\sum_j x_j^2)^{1/2} \le D_i`, the norm of a row of the second part is at most
  :math:`2 \beta k^{-\beta}`, and no entry is in more than n rows.
- Pooling with an even power p: the norm of the gradient of an :math:`\ell_p` norm is at most 1; windows may overlap.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import nn

from fisher_reg.bounds.rules.call import Call, layer_of
from fisher_reg.bounds.rules.layer import Gain, Layer
from fisher_reg.bounds.rules.per_axis import per_axis
from fisher_reg.bounds.rules.registry import as_module, register_bound_rule, register_layer
from fisher_reg.errors import NoBoundError


def _glu_module(module: nn.GLU, layer: Layer) -> Gain:
    return glu_gain(module.dim, layer)


def glu_gain(dim: int, layer: Layer) -> Gain:
    """Bound ``a * sigmoid(b)`` of the two halves of an axis."""
    first, second = layer.input.double().chunk(2, dim)
    if layer.is_local:
        gate = second.sigmoid()
        lengths = (gate.square() + (first * gate * (1 - gate)).square()).sqrt()
        return Gain(lengths.reshape(len(lengths), -1).amax(1))
    if layer.deviation is None:
        raise NoBoundError("A gated linear unit has no global Lipschitz constant on an unbounded domain.")
    largest = first.abs() + layer.deviation.width.chunk(2, dim)[0]
    return Gain((1 + largest.square() / 16).sqrt().reshape(len(largest), -1).amax(1))


def _glu(call: Call) -> Gain:
    return glu_gain(call.argument("dim", -1), layer_of(call))


def _local_response_norm(module: nn.LocalResponseNorm, layer: Layer) -> Gain:
    if module.k <= 0 or module.alpha < 0 or module.beta < 0:
        raise NoBoundError(f"{module} has a bound rule only for k > 0 and without negative settings.")
    return Gain(module.k**-module.beta * (1 + 2 * module.beta * math.sqrt(module.size)))


def _lp_pool(axes: int, module: Any, layer: Layer) -> Gain:
    order = float(module.norm_type)
    if not (order.is_integer() and order % 2 == 0 and order > 0) or module.ceil_mode:
        raise NoBoundError(f"{module} has a bound rule only for even powers and whole windows.")
    kernel = per_axis(module.kernel_size, axes)
    stride = kernel if module.stride is None else per_axis(module.stride, axes)
    windows = math.prod(math.ceil(width / step) for width, step in zip(kernel, stride, strict=True))
    return Gain(math.sqrt(windows))


def _lp_pool_1d(module: nn.LPPool1d, layer: Layer) -> Gain:
    return _lp_pool(1, module, layer)


def _lp_pool_2d(module: nn.LPPool2d, layer: Layer) -> Gain:
    return _lp_pool(2, module, layer)


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(nn.GLU)(_glu_module)
    register_bound_rule(nn.LocalResponseNorm)(_local_response_norm)
    register_bound_rule(nn.LPPool1d)(_lp_pool_1d)
    register_bound_rule(nn.LPPool2d)(_lp_pool_2d)
    register_layer(_glu, "input dim", F.glu, "glu")
    register_layer(as_module(nn.LocalResponseNorm), "input size alpha beta k", F.local_response_norm)
    register_layer(as_module(nn.LPPool1d), "input norm_type kernel_size stride ceil_mode", F.lp_pool1d)
    register_layer(as_module(nn.LPPool2d), "input norm_type kernel_size stride ceil_mode", F.lp_pool2d)
