"""Thresholds that an audit must meet, and a verdict for each: ``thresholds={accuracy: {min: 0.9}}``.

A verdict is conservative. If a number has an interval, the less favourable end of the interval is compared with the
limit, so that a number passes only if the whole interval passes. A number that was not measured fails.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from recipes.evaluate.numbers import Number, names

Side = Literal["min", "max"]
_SIDES: tuple[Side, ...] = ("min", "max")
_EXAMPLE = "thresholds={accuracy: {min: 0.9}, lambda_p95: {max: 50}}"


@dataclass(frozen=True)
class Threshold:
    """A smallest or a largest value that one number may have.

    Attributes:
        name: The name of the number, see :func:`recipes.evaluate.numbers.names`.
        side: Whether the limit is the smallest or the largest value that passes.
        limit: The limit, in the unit of the number.
    """

    name: str
    side: Side
    limit: float

    def __str__(self) -> str:
        return f"{self.name} {'≥' if self.side == 'min' else '≤'} {self.limit:g}"

    @property
    def key(self) -> str:
        """Name of the condition, one for each side of a number."""
        return f"{self.name}.{self.side}"

    def holds(self, value: float) -> bool:
        """Whether a value meets the limit; NaN never does."""
        return value >= self.limit if self.side == "min" else value <= self.limit


@dataclass(frozen=True)
class Verdict:
    """Whether a number meets a threshold.

    Attributes:
        threshold: The condition.
        number: What was measured.
        compared: The value that was compared: the less favourable end of the interval, if there is one.
        passed: Whether it meets the threshold.
    """

    threshold: Threshold
    number: Number
    compared: float
    passed: bool

    @property
    def word(self) -> str:
        """The verdict as tables show it."""
        return "pass" if self.passed else "FAIL"

    @property
    def reason(self) -> str:
        """The reason, in one sentence."""
        if math.isnan(self.compared):
            return f"{self.threshold}: fails, because this number was not measured."
        if self.number.interval is None:
            return f"{self.threshold}: {'passes' if self.passed else 'fails'} with {self.compared:.4g}."
        end = "lower" if self.threshold.side == "min" else "upper"
        said = f"{self.threshold}: {'passes' if self.passed else 'fails'} with the {end} end {self.compared:.4g} of the"
        if not self.passed and self.threshold.holds(self.number.value):
            return (
                f"{said} interval; the value {self.number.value:.4g} alone would pass, and more images may decide it."
            )
        return f"{said} interval around {self.number.value:.4g}."


def parsed(config: DictConfig | Mapping[str, Any] | None, attacks: Sequence[str]) -> tuple[Threshold, ...]:
    """Return the thresholds of a configuration.

    Args:
        config: Maps names of numbers to ``{min: x}``, ``{max: x}`` or both. The parts of a name may also be nested.
        attacks: The names of the attacks that will be run.

    Raises:
        ValueError: For an unknown name, an empty condition, or a limit that is not a number.
    """
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    found = list(_flat(plain or {}, ""))
    known = names(attacks)
    for threshold in found:
        if threshold.name not in known:
            close = difflib.get_close_matches(threshold.name, known, 1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"thresholds has {threshold.name}, which is not a number of this audit.{meant} Use one of "
                f"{', '.join(known)}."
            )
    limits = {threshold.key: threshold.limit for threshold in found}
    for name in {threshold.name for threshold in found}:
        low, high = limits.get(f"{name}.min", -math.inf), limits.get(f"{name}.max", math.inf)
        if low > high:
            raise ValueError(f"thresholds.{name} can never be met: min={low:g} is above max={high:g}.")
    return tuple(sorted(found, key=lambda threshold: known.index(threshold.name)))


def judged(thresholds: Sequence[Threshold], measured: Mapping[str, Number]) -> tuple[Verdict, ...]:
    """Return a verdict for each threshold."""
    return tuple(_judged(threshold, measured[threshold.name]) for threshold in thresholds)


def failure(judgements: Sequence[Mapping[str, Any]]) -> str | None:
    """Return one line about the thresholds of a record that fail; ``None`` if all pass."""
    failed = [one["reason"] for one in judgements if one["verdict"] == "fail"]
    return f"{len(failed)} of {len(judgements)} thresholds failed. {' '.join(failed)}" if failed else None


def _judged(threshold: Threshold, number: Number) -> Verdict:
    compared = number.value
    if number.interval is not None and not math.isnan(number.value):
        compared = number.interval.low if threshold.side == "min" else number.interval.high
    return Verdict(threshold, number, compared, threshold.holds(compared))


def _flat(node: Any, name: str) -> Iterator[Threshold]:
    if not isinstance(node, Mapping) or (name and not node):
        raise ValueError(f"thresholds{'.' if name else ''}{name} needs min, max or both; got {node!r}. {_EXAMPLE}")
    if not set(node) & set(_SIDES):
        for key, part in node.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
        return
    if not name or set(node) - set(_SIDES):
        raise ValueError(f"thresholds.{name} takes only min and max; got {', '.join(map(str, node))}. {_EXAMPLE}")
    for side in _SIDES:
        if side in node:
            yield Threshold(name, side, _limit(node[side], f"thresholds.{name}.{side}"))


def _limit(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{place} must be a finite number; got {value!r}.")
    return float(value)
