r"""The bound rules of functions of the vectors along some axes: norms, directions, variances, softmax functions.

- A norm is 1-Lipschitz. So is the norm of the centred vector; divided by :math:`\sqrt{n - c}` it is the standard
  deviation.
- A direction :math:`v / \max(\|v\|, \epsilon)` has the Jacobian :math:`(I - u u^\top) / \|v\|`, and
  :math:`1 / \epsilon` times the identity below.
- :math:`\log \sum e^{v}` has the gradient p with :math:`\|p\| \le 1`. The Jacobian of the log-softmax is
  :math:`I - \mathbf 1 p^\top`, of norm at most :math:`1 + \sqrt K \|p\|`.
- The norm of the Jacobian of the softmax, :math:`\mathrm{diag}(p) - p p^\top`, is at most 1/2, and at most
  :math:`2 \max p_i (1 - p_i)` by Gershgorin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fisher_reg.bounds.rules.call import Call, Operand, layer_of
from fisher_reg.bounds.rules.extents import POSITIVE, largest_modulus, width_of, worst
from fisher_reg.bounds.rules.layer import Ball, Gain, Interval, Layer
from fisher_reg.bounds.rules.registry import register, register_bound_rule
from fisher_reg.bounds.sensitivity import Sensitivity, log, shifted
from fisher_reg.errors import NoBoundError


def _axes(call: Call, dim: object = None) -> tuple[int, ...]:
    dim = call.argument("dim") if dim is None else dim
    ndim = call.operands["input"].value.ndim
    if isinstance(dim, bool):
        raise NoBoundError(f"{call.name} has a bound rule only with named arguments.")
    if dim is None or dim == []:
        return tuple(range(ndim))
    return tuple(item % ndim for item in (dim if isinstance(dim, Sequence) else (dim,)))


def _norm(call: Call) -> Sensitivity:
    order = _order(call)
    # |v|_p <= |v|_2 for p >= 2, and |v|_p <= n^(1/p - 1/2) |v|_2 for p < 2
    size = call.source.value.numel() / call.value.numel()
    factor = size ** (1 / order - 0.5) if order < 2 else 1.0
    return Sensitivity(shifted(call.sensitivity.plain(), log(factor)), None, POSITIVE)


def _order(call: Call) -> float:
    order = next((call.argument(name) for name in ("p", "ord") if name in call.operands), None)
    order = 2.0 if order is None or order == "fro" else order
    is_matrix = call.function == "linalg_norm" and order != 2.0 and len(_axes(call)) == 2
    if not isinstance(order, int | float) or order < 1 or is_matrix:
        raise NoBoundError(f"{call.name} has a bound rule only for the norms of vectors of order at least 1.")
    return float(order)


def _lengths(values: Tensor, dim: tuple[int, ...], order: float = 2.0) -> Tensor:
    """Return the norms of the vectors along axes, which are kept with length one."""
    found: Tensor = torch.linalg.vector_norm(values, ord=order, dim=dim, keepdim=True)
    return found


def _norm_width(call: Call) -> Tensor | None:
    width = width_of(call.operands["input"])
    if width is None:
        return None
    moved = _lengths(width, _axes(call), _order(call))
    return moved.reshape(call.value.shape)


def shortest_vectors(operand: Operand, call: Call, dim: tuple[int, ...]) -> Tensor:
    """Return lower bounds of the norms of the vectors along axes, with these axes kept; zero if not known."""
    value = operand.value.double()
    lengths = _lengths(value, dim)
    if call.at_example:
        return lengths
    if operand.around is None:
        return torch.zeros_like(lengths)
    moved = _lengths(operand.around.width, dim)
    return (lengths - moved).clamp_min(0)


def _normalize(call: Call) -> Sensitivity:
    if call.argument("p", 2.0) != 2 or call.argument("out") is not None:
        raise NoBoundError(f"{call.name} has a bound rule only for Euclidean norms.")
    source, eps = call.operands["input"], call.argument("eps", 1e-12)
    dim = _axes(call, call.argument("dim", 1))
    lengths = shortest_vectors(source, call, dim).clamp_min(eps)
    size = worst(1 / lengths, source, call)
    if not bool(size.isfinite().all()):
        raise NoBoundError(f"{call.name} has no Lipschitz constant without an eps.")
    one = torch.ones((), dtype=torch.float64)
    known = Ball(one, one) if dim == (source.value.ndim - 1,) else Interval(-1.0, 1.0)
    return Sensitivity(shifted(call.sensitivity.plain(), log(size)), None, known)


def _deviates(call: Call) -> Sensitivity:
    """Bound a standard deviation, a 1-Lipschitz function divided by a root of n."""
    return Sensitivity(shifted(call.sensitivity.plain(), -0.5 * math.log(_freedom(call))), None, POSITIVE)


def _varies(call: Call) -> Sensitivity:
    r"""Bound a variance: for the centred vector c, :math:`\|c\|^2 / m` has the gradient :math:`2 c / m`."""
    source, dim = call.operands["input"], _axes(call)
    length = _centred_length(source, call, dim)
    size = worst(2 * length / _freedom(call), source, call)
    if not bool(size.isfinite().all()):
        raise NoBoundError(f"{call.name} has no global Lipschitz constant: its slope increases with its argument.")
    return Sensitivity(shifted(call.sensitivity.plain(), log(size)), None, POSITIVE)


def _centred_length(source: Operand, call: Call, dim: tuple[int, ...]) -> Tensor:
    value = source.value.double()
    centred = _lengths(value - value.mean(dim, keepdim=True), dim)
    if call.at_example:
        return centred
    anywhere = _lengths(largest_modulus(source, call), dim)
    if source.around is None:
        return anywhere
    return torch.minimum(anywhere, centred + _lengths(source.around.width, dim))


def _freedom(call: Call) -> float:
    """Return the divisor of the sum of centred squares."""
    value = call.operands["input"].value
    count = math.prod(value.shape[axis] for axis in _axes(call))
    correction = call.argument("correction", call.argument("unbiased", True))
    freedom: float = count - (1 if correction is None else float(correction))
    if freedom <= 0:
        raise NoBoundError(f"{call.name} has no degree of freedom to divide by.")
    return freedom


def _variance_width(call: Call) -> Tensor | None:
    source, dim = call.operands["input"], _axes(call)
    if source.around is None:
        return None
    value = source.value.double()
    centred = _lengths(value - value.mean(dim, keepdim=True), dim)
    moved = _lengths(source.around.width, dim)
    is_variance = call.function == "var"
    width = moved * (2 * centred + moved) / _freedom(call) if is_variance else moved / math.sqrt(_freedom(call))
    return width.reshape(call.value.shape)


def _variance_and_mean(call: Call) -> Sensitivity:
    variance = _varies(call) if call.function == "var_mean" else _deviates(call)
    axes = _axes(call)
    count = math.prod(call.operands["input"].value.shape[axis] for axis in axes)
    mean = Sensitivity(shifted(call.sensitivity.plain(), -0.5 * math.log(count)))
    assert variance.log_norm is not None
    assert mean.log_norm is not None
    return Sensitivity(
        torch.logaddexp(*torch.broadcast_tensors(variance.log_norm, mean.log_norm)), parts=(variance, mean)
    )


def _log_sum_exp(call: Call) -> Sensitivity:
    return Sensitivity(call.sensitivity.plain().log_norm)


def _largest_width(call: Call) -> Tensor | None:
    width = width_of(call.operands["input"])
    return None if width is None else width.amax(_axes(call), keepdim=True).reshape(call.value.shape)


def _log_softmax_norm(dim: int, layer: Layer) -> Tensor:
    """Return the norm of ``I - 1 p'``: with the p of the example, or the general bound ``1 + sqrt(K)``."""
    size = layer.input.shape[dim]
    if not layer.is_local:
        return torch.tensor(1 + math.sqrt(size), dtype=torch.float64)
    lengths = torch.linalg.vector_norm(layer.input.double().softmax(dim), dim=dim)
    largest: Tensor = lengths.reshape(len(lengths), -1).amax(1)
    return 1 + math.sqrt(size) * largest


def _log_softmax_module(module: nn.LogSoftmax, layer: Layer) -> Gain:
    return Gain(_log_softmax_norm(_dim(module.dim), layer))


def _log_softmax(call: Call) -> Sensitivity:
    norm = _log_softmax_norm(_dim(call.argument("dim")), layer_of(call))
    return Sensitivity(shifted(call.sensitivity.plain(), log(norm)), None, Interval(-math.inf, 0.0))


def _dim(dim: int | None) -> int:
    if dim is None:
        raise NoBoundError("A softmax has a bound rule only with a given dim.")
    return dim


def softmax_norm(dim: int, layer: Layer) -> Tensor:
    """Return the norm of ``diag(p) - p p'``."""
    if not layer.is_local:
        return torch.tensor(0.5, dtype=torch.float64)
    p = layer.input.double().softmax(dim)
    largest = 2 * (p * (1 - p)).reshape(len(p), -1).amax(1)
    return largest.clamp_max(0.5)


def softmax_range(dim: int, ndim: int) -> Ball | Interval:
    """Return the range of the probabilities: the corners of the simplex have norm 1."""
    one = torch.ones((), dtype=torch.float64)
    return Ball(one, one) if dim % ndim == ndim - 1 else Interval(0.0, 1.0)


def _softmax(call: Call) -> Sensitivity:
    dim = _dim(call.argument("dim"))
    norm = softmax_norm(dim, layer_of(call))
    return Sensitivity(shifted(call.sensitivity.plain(), log(norm)), None, softmax_range(dim, call.value.ndim))


def _softmax_module(module: nn.Module, layer: Layer) -> Gain:
    dim = -3 if isinstance(module, nn.Softmax2d) else _dim(module.dim)  # type: ignore[arg-type]
    return Gain(softmax_norm(dim, layer), softmax_range(dim, layer.input.ndim))


def _softmax_width(call: Call) -> Tensor | None:
    """Return the widths: p_i is largest if its own score is largest and the others are smallest."""
    width = width_of(call.operands["input"])
    if width is None:
        return None
    dim, scores, p = _dim(call.argument("dim")), call.operands["input"].value.double(), call.value.double()
    weight = (scores - scores.amax(dim, keepdim=True)).exp()
    rest = (weight.sum(dim, keepdim=True) - weight).clamp_min(0)
    rise = p.new_tensor(1.0) / (1 + rest / weight * (-2 * _most(width, dim)).exp()) - p
    fall = p - 1 / (1 + rest / weight * (2 * _most(width, dim)).exp())
    moved = torch.maximum(rise, fall).nan_to_num(nan=1.0)
    return torch.minimum(moved, torch.maximum(p, 1 - p)) if bool(moved.isfinite().all()) else torch.maximum(p, 1 - p)


def _most(width: Tensor, dim: int) -> Tensor:
    return width.amax(dim, keepdim=True)


def register_rules() -> None:
    """Register the rules of this family."""
    register(_norm, "input p dim keepdim out dtype", torch.norm)
    register(_norm, "input p dim keepdim dtype out", "norm")
    register(_norm, "input ord dim keepdim dtype", torch.linalg.norm, torch.linalg.vector_norm)
    register(_norm, "input ord dim keepdim dtype", "linalg_norm", "linalg_vector_norm")
    register(_normalize, "input p dim eps out", F.normalize)
    register(_deviates, "input dim unbiased keepdim correction", torch.std, "std")
    register(_varies, "input dim unbiased keepdim correction", torch.var, "var")
    register(_variance_and_mean, "input dim unbiased keepdim correction", torch.var_mean, torch.std_mean)
    register(_variance_and_mean, "input dim unbiased keepdim correction", "var_mean", "std_mean")
    register(_log_sum_exp, "input dim keepdim", torch.logsumexp, "logsumexp")
    register(_log_softmax, "input dim dtype half_to_float _stacklevel", torch.log_softmax, F.log_softmax)
    register(_log_softmax, "input dim dtype half_to_float _stacklevel", "log_softmax", "_log_softmax")
    register(_softmax, "input dim dtype half_to_float _stacklevel", torch.softmax, F.softmax, "softmax", "_softmax")
    register_bound_rule(nn.Softmax, nn.Softmax2d)(_softmax_module)
    register_bound_rule(nn.LogSoftmax)(_log_softmax_module)
    _norm.width = _norm_width  # type: ignore[attr-defined]
    _deviates.width = _varies.width = _variance_width  # type: ignore[attr-defined]
    _log_sum_exp.width = _largest_width  # type: ignore[attr-defined]
    _softmax.width = _softmax_width  # type: ignore[attr-defined]
