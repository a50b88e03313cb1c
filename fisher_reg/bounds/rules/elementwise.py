r"""The bound rules of functions of one number, by the largest slope over the range of the argument.

The range is one point at the example, an interval over a region, and over all inputs the range that the previous layers
ensure: a variance is not negative, so that :math:`\sqrt{v + \epsilon}` has a slope of at most
:math:`1 / (2 \sqrt\epsilon)`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_reg.bounds.rules.call import Call, Operand
from fisher_reg.bounds.rules.extents import extent, width_of, worst
from fisher_reg.bounds.rules.layer import Gain, Interval, ScaledGain
from fisher_reg.bounds.rules.registry import register, register_layer
from fisher_reg.bounds.sensitivity import Sensitivity, log, log_sum, shifted
from fisher_reg.errors import NoBoundError


@dataclass(frozen=True)
class Curve:
    """A function of one number that is monotone on each side of zero.

    Attributes:
        steepest: From the ends of intervals to the largest modulus of the slope between them; infinite outside the
            domain of the function.
        values: The function.
        range: The range of its values.
        pole: Whether it has a pole at zero, so that it is unbounded on an interval around zero.
    """

    steepest: Callable[[Tensor, Tensor], Tensor]
    values: Callable[[Tensor], Tensor]
    range: Interval | None = None
    pole: bool = False


def _where_positive(slope: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the slope at the lower end, for a function of positive numbers with a decreasing slope."""
    return lambda low, high: torch.where(low > 0, slope(low.clamp_min(1e-300)), torch.inf)


def _power(exponent: float) -> Curve:
    """Return ``x ** p``, of slope ``|p| |x|^(p - 1)``."""
    whole = float(exponent).is_integer()

    def steepest(low: Tensor, high: Tensor) -> Tensor:
        largest = torch.maximum(low.abs(), high.abs())
        smallest = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
        base = largest if exponent >= 1 else smallest
        slope = abs(exponent) * base ** (exponent - 1)
        return slope if whole else torch.where(low >= 0, slope, torch.inf)

    is_even = whole and int(exponent) % 2 == 0
    known = Interval(0.0, math.inf) if is_even or not whole else None
    return Curve(steepest, lambda x: x**exponent, known, pole=exponent < 0)


_SIGMOID_LIKE = Interval(-1.0, 1.0)
CURVES: dict[str, Curve] = {
    "sqrt": Curve(_where_positive(lambda x: 0.5 * x.rsqrt()), torch.sqrt, Interval(0.0, math.inf)),
    "rsqrt": Curve(_where_positive(lambda x: 0.5 * x.rsqrt() / x), torch.rsqrt, Interval(0.0, math.inf), pole=True),
    "log": Curve(_where_positive(lambda x: 1 / x), torch.log, pole=True),
    "log1p": Curve(lambda low, high: torch.where(low > -1, 1 / (1 + low), torch.inf), torch.log1p),
    "exp": Curve(lambda low, high: high.exp(), torch.exp, Interval(0.0, math.inf)),
    "expm1": Curve(lambda low, high: high.exp(), torch.expm1, Interval(-1.0, math.inf)),
    "square": _power(2),
    "reciprocal": _power(-1),
    "sin": Curve(lambda low, high: torch.ones_like(low), torch.sin, _SIGMOID_LIKE),
    "cos": Curve(lambda low, high: torch.ones_like(low), torch.cos, _SIGMOID_LIKE),
    "erf": Curve(lambda low, high: torch.full_like(low, 2 / math.sqrt(math.pi)), torch.erf, _SIGMOID_LIKE),
    "atan": Curve(lambda low, high: torch.ones_like(low), torch.atan, Interval(-math.pi / 2, math.pi / 2)),
}


def _curve(call: Call) -> Curve:
    if call.function == "pow":
        exponent = call.argument("exponent")
        if isinstance(exponent, Tensor) and exponent.numel() == 1:
            exponent = float(exponent)
        if not isinstance(exponent, int | float) or isinstance(exponent, bool) or exponent == 0:
            raise NoBoundError(f"{call.name} has a bound rule only for one constant exponent that is not zero.")
        return _power(exponent)
    return CURVES[call.function]


def _of_one_number(call: Call) -> Sensitivity:
    curve, source = _curve(call), call.operands["input"]
    low, high = extent(source, call)
    slope = worst(curve.steepest(low, high), source, call)
    if not bool(slope.isfinite().all()):
        raise NoBoundError(
            f"{call.name} has an unbounded slope over the possible range of its argument. Restrict the argument, as "
            "in sqrt(x + eps), or compute a bound at given inputs or over a domain."
        )
    sensitivity = call.sensitivity  # a diagonal Jacobian commutes with the scaling
    return Sensitivity(shifted(sensitivity, log(slope)), sensitivity.scale, curve.range)


def _width_of_one_number(call: Call) -> Tensor | None:
    source = call.operands["input"]
    if source.around is None:
        return None
    curve, width = _curve(call), source.around.width
    low, high = extent(source, call)
    by_slope = curve.steepest(low, high) * width
    ends = torch.stack([curve.values(low), curve.values(high)])
    if curve.values in (torch.sin, torch.cos):
        return by_slope
    middle = curve.values(source.value)
    crosses = (low < 0) & (high > 0)
    at_zero = curve.values(torch.zeros_like(low)) if not curve.pole else torch.full_like(low, torch.inf)
    moved = torch.maximum((ends - middle).abs().amax(0), torch.where(crosses, (at_zero - middle).abs(), 0.0))
    return torch.minimum(by_slope.nan_to_num(nan=math.inf), moved.nan_to_num(nan=math.inf))


def _clamp(call: Call) -> Gain:
    ends = [call.argument(name) for name in ("min", "max")]
    low, high = (
        (float(end.min() if side == 0 else end.max()) if isinstance(end, Tensor) else default if end is None else end)
        for side, (end, default) in enumerate(zip(ends, (-math.inf, math.inf), strict=True))
    )
    # each entry is unchanged, with slope 1, or replaced by a constant; if the ends cross, the upper one is used
    known = Interval(low, high) if low <= high else None
    return ScaledGain(1.0, known, scale=call.sensitivity.scale)


def _clamp_at(side: str) -> Callable[[Call], Gain]:
    def rule(call: Call) -> Gain:
        end = call.argument(side)
        is_number = isinstance(end, int | float)
        ends = (end, math.inf) if side == "min" else (-math.inf, end)
        return ScaledGain(1.0, Interval(*ends) if is_number else None, scale=call.sensitivity.scale)

    rule.width = _clamped_width  # type: ignore[attr-defined]
    return rule


def _clamped_width(call: Call) -> Tensor | None:
    width = width_of(call.source)
    return None if width is None else width.expand(call.value.shape)


def _absolute(call: Call) -> Sensitivity:
    sensitivity = call.sensitivity
    return Sensitivity(sensitivity.log_norm, sensitivity.scale, Interval(0.0, math.inf))


def quotient(call: Call) -> Sensitivity:
    """Bound a quotient by ``d(a / b) = da / b - a db / b^2``."""
    above, below = call.operands["input"], call.operands["other"]
    low, high = extent(below, call)
    smallest = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
    inverse = 1 / smallest
    terms = []
    if not above.is_constant:
        size = worst(inverse, below, call)
        terms.append(_broadcast(above, call.value, size))
    tops = torch.as_tensor(above.value, dtype=torch.float64, device=call.value.device).abs()
    if not above.is_constant:
        low, high = extent(above, call)
        tops = torch.maximum(low.abs(), high.abs())
    is_known = call.at_example or below.around is not None
    is_apart = is_known and below.is_apart and (above.is_constant or above.is_apart)
    is_apart = is_apart and call.value.shape[:1] == below.value.shape[:1] and call.value.ndim == below.value.ndim
    joint = (tops * inverse.square()).expand(call.value.shape)
    joint = joint.reshape(len(joint), -1).amax(1) if is_apart else joint.amax()
    terms.append(_broadcast(below, call.value, joint))
    if not all(bool((term < math.inf).all()) for term in terms):
        raise NoBoundError(
            f"{call.name} divides by a value that depends on the input: there is no global constant if the divisor may "
            "be zero or the dividend is unbounded."
        )
    return Sensitivity(log_sum(terms))


def _broadcast(operand: Operand, value: Tensor, size: Tensor) -> Tensor:
    assert isinstance(operand.sensitivity, Sensitivity)
    copies = value.numel() / operand.value.numel()
    return shifted(operand.sensitivity.plain(), log(size) + 0.5 * math.log(copies))


def quotient_width(call: Call) -> Tensor | None:
    """Return ``w_a / min|b| + |a| w_b / (|b| min|b|)``."""
    above, below = call.operands["input"], call.operands["other"]
    if below.around is None:
        return None
    low, high = extent(below, call)
    smallest = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
    top = torch.as_tensor(above.value, dtype=torch.float64, device=call.value.device).abs()
    width = torch.zeros_like(top) if above.is_constant else width_of(above)
    if width is None:
        return None
    moved: Tensor = width / smallest + top * below.around.width / (below.value.abs() * smallest)
    moved = moved.nan_to_num(nan=math.inf)
    return moved.expand(call.value.shape)


def _extreme(call: Call) -> Sensitivity:
    """Bound a minimum or maximum of two values: each output is one of two entries, as in a concatenation."""
    terms = []
    for operand in call.operands.values():
        if operand.is_constant:
            continue
        assert isinstance(operand.sensitivity, Sensitivity)
        copies = call.value.numel() / operand.value.numel()
        terms.append(shifted(operand.sensitivity.plain(), 0.5 * math.log(copies)))
    return Sensitivity(0.5 * log_sum([2 * term for term in terms]))


def _extreme_width(call: Call) -> Tensor | None:
    widths = [width_of(item) for item in call.operands.values()]
    known = [width for width in widths if width is not None]
    if len(known) < len(widths):
        return None
    largest: Tensor = torch.stack([width.expand(call.value.shape) for width in known]).amax(0)
    return largest


def register_rules() -> None:
    """Register the rules of this family."""
    targets: list[Any] = [getattr(torch, name) for name in CURVES]
    register(_of_one_number, "input", *targets, *CURVES)
    register(_of_one_number, "input exponent", torch.pow, operator.pow, "pow")
    register(_absolute, "input", torch.abs, operator.abs, "abs")
    register_layer(_clamp, "input min max", torch.clamp, torch.clip, "clamp", "clip")
    register_layer(_clamp_at("min"), "input min", torch.clamp_min, "clamp_min")
    register_layer(_clamp_at("max"), "input max", torch.clamp_max, "clamp_max")
    register(_extreme, "input other", torch.maximum, torch.minimum, "maximum", "minimum")
    register(_extreme, "input other", torch.fmax, torch.fmin, "fmax", "fmin")
    _of_one_number.width = _width_of_one_number  # type: ignore[attr-defined]
    _clamp.width = _clamped_width  # type: ignore[attr-defined]
    _absolute.width = _clamped_width  # type: ignore[attr-defined]
    _extreme.width = _extreme_width  # type: ignore[attr-defined]
