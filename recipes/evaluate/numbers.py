"""The numbers of an audit by name, each with its kind of guarantee, its interval and its number of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fisher_reg import summarize
from recipes.evaluate.audit import CONFIDENCE, FAILURE_PROBABILITY, WIDE, Audit, outcome, share

Guarantee = Literal["certified", "probabilistic", "estimate", "attack"]
GUARANTEES: dict[Guarantee, str] = {
    "certified": "A bound from one rule per layer of the traced network, without sampling. It holds in exact "
    "arithmetic, and is computed in float64.",
    "probabilistic": f"Holds except with a stated failure probability: {FAILURE_PROBABILITY:.0%} for the intervals of "
    f"λ of all images together, and {1 - CONFIDENCE:.0%} for each interval that comes from the number of images.",
    "estimate": "Computed at these images, without a bound on its error. The estimate of λ exceeds the true value "
    "at most by round-off.",
    "attack": "The result of an attack. A stronger attack can find more: the accuracy under an attack is an upper "
    "bound on the true robust accuracy, and a distance is an upper bound on the true distance.",
}
"""The meaning of each kind of guarantee."""


@dataclass(frozen=True)
class Interval:
    """An interval that holds with a probability.

    Attributes:
        low: Lower end.
        high: Upper end, which may be infinite.
        level: The probability.
        guarantee: The guarantee of the interval.
    """

    low: float
    high: float
    level: float
    guarantee: Guarantee = "probabilistic"


@dataclass(frozen=True)
class Number:
    """A number of the audit.

    Attributes:
        title: The name that tables show.
        value: The value; NaN if it was not measured.
        unit: The unit of the value; ``"share"`` for a fraction between 0 and 1.
        guarantee: The guarantee of the value.
        count: The number of images from which the value was computed.
        interval: The interval around the value, if one is known.
    """

    title: str
    value: float
    unit: str
    guarantee: Guarantee
    count: int
    interval: Interval | None = None


_NATS = "nats / pixel²"


def numbers(audit: Audit) -> dict[str, Number]:
    """Return all numbers by the names of :func:`names`."""
    found = {name: compute(audit) for name, compute in _NUMBERS.items()}
    for attack in audit.attacks:
        seen = outcome(audit, attack)
        found |= {f"attacks.{attack}.{name}": compute(attack, seen) for name, compute in _OF_ATTACK.items()}
    return found


def names(attacks: Iterable[str]) -> list[str]:
    """Return the names of the numbers of an audit with these attacks; a threshold can have each of them."""
    return [*_NUMBERS, *(f"attacks.{attack}.{name}" for attack in attacks for name in _OF_ATTACK)]


def _share(title: str, found: dict[str, Any], guarantee: Guarantee = "estimate") -> Number:
    interval = Interval(found["low"], found["high"], CONFIDENCE)
    return Number(title, found["value"], "share", guarantee, found["count"], interval)


def _lambda(statistic: str, title: str) -> Callable[[Audit], Number]:
    """Return a statistic of λ; it increases with each value, so that the ends of the intervals enclose it."""

    def compute(audit: Audit) -> Number:
        values, known = audit.measurement.values["lambda"], audit.sensitivity
        value, low, high = (float(summarize(part)[statistic]) for part in (values, known.lower, known.upper))
        ends = (min(low, value), math.inf if math.isnan(high) else max(high, value))  # the two can differ by round-off
        interval = Interval(*ends, 1 - FAILURE_PROBABILITY)
        return Number(f"λ, {title}", value, _NATS, "estimate", len(values), interval)

    return compute


def _median(title: str, unit: str, select: Callable[[Audit], Tensor], guarantee: Guarantee = "estimate") -> Any:
    def compute(audit: Audit) -> Number:
        values = select(audit).double()
        measured = values[~values.isnan()]
        middle = float(measured.quantile(0.5)) if len(measured) else math.nan
        return Number(title, middle, unit, guarantee, len(measured))

    return compute


def _metric(name: str) -> Callable[[Audit], Tensor]:
    return lambda audit: audit.measurement.values[name]


def _blackbox_ratio(audit: Audit) -> Tensor:
    values = audit.measurement.values
    return torch.where(values["lambda"] > 0, values["lambda_blackbox"] / values["lambda"], math.nan)


def _part(title: str, hits: Tensor, guarantee: Guarantee) -> Number:
    """Return the share among these images, without an interval for other images."""
    value = float(hits.double().mean()) if len(hits) else math.nan
    return Number(title, value, "share", guarantee, len(hits))


def _masked(audit: Audit) -> Number:
    masked = [attacked.result.masked for attacked in audit.attacks.values()]
    title = "images with a gradient of exactly zero after an attack"
    return _part(title, torch.stack(masked).any(0) if masked else audit.correct[:0], "attack")


def _distance(title: str, found: dict[str, Any]) -> Number:
    interval = Interval(found["low"], found["high"], CONFIDENCE)
    return Number(title, found["value"], "pixel units", "attack", found["count"], interval)


_WIDE_TITLE = (
    f"intervals of λ wider than {WIDE:.0%}, which hold together with probability {1 - FAILURE_PROBABILITY:.0%}"
)
_NUMBERS: dict[str, Callable[[Audit], Number]] = {
    "accuracy": lambda audit: _share("accuracy", share(audit.correct)),
    "lambda_median": _lambda("median", "median"),
    "lambda_mean": _lambda("mean", "mean"),
    "lambda_p95": _lambda("p95", "95 % quantile"),
    "lambda_max": _lambda("max", "largest"),
    "wide_interval_share": lambda audit: _part(_WIDE_TITLE, audit.sensitivity.interval_width > WIDE, "probabilistic"),
    "saturated_share": lambda audit: _part("saturated predictions", audit.saturated, "estimate"),
    "trace_median": _median("trace of F, median", _NATS, _metric("trace")),
    "effective_rank_median": _median("effective rank, median", "", lambda audit: audit.sensitivity.effective_rank),
    "lambda_tempered_median": _median("λ at equal margins, median", _NATS, _metric("lambda_tempered")),
    "lambda_blackbox_median": _median("λ by queries, median", _NATS, _metric("lambda_blackbox")),
    "clever_median": _median("CLEVER, median", "pixel units", _metric("clever")),
    "log10_bound_global": _median(
        "log₁₀ of the global bound on λ in nats / pixel², for every input", "", _metric("log10_global"), "certified"
    ),
    "log10_bound_local_median": _median(
        "log₁₀ of the local bound on λ in nats / pixel², at the images, median", "", _metric("log10_local"), "certified"
    ),
    "log10_bound_blockwise_median": _median(
        "log₁₀ of the blockwise bound on λ in nats / pixel², median", "", _metric("log10_blockwise")
    ),
    "kl_ratio_median": _median("divergence over ½ λ ε², median", "", lambda audit: audit.sensitivity.kl_ratio),
    "single_step_ratio_median": _median(
        "divergence of one step over that of several, median", "", lambda audit: audit.sensitivity.single_step_ratio
    ),
    "blackbox_ratio_median": _median("λ by queries over λ, median", "", _blackbox_ratio),
    "masked_share": _masked,
}
_OF_ATTACK: dict[str, Callable[[str, dict[str, Any]], Number]] = {
    "accuracy": lambda name, found: _share(f"accuracy under {name}", found["accuracy"], "attack"),
    "success": lambda name, found: _share(f"adversarial example found by {name}", found["success"], "attack"),
    "median_distance": lambda name, found: _distance(
        f"distance of the adversarial examples of {name}, median", found["distance"]
    ),
    "median_distance_of_all": lambda name, found: _distance(
        f"distance of {name} at all correctly classified images, infinite where none was found, median",
        found["distance_of_all"],
    ),
}
