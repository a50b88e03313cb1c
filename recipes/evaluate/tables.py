"""The tables of an audit, on its page and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from recipes.competitors.measurement import METRICS
from recipes.evaluate.audit import Audit, outcome
from recipes.evaluate.identity import SCHEMA, Identity
from recipes.evaluate.numbers import Number
from recipes.evaluate.thresholds import Verdict

_SUMMARY = (
    "accuracy",
    "lambda_median",
    "lambda_p95",
    "wide_interval_share",
    "saturated_share",
    "trace_median",
    "lambda_tempered_median",
    "effective_rank_median",
    "log10_bound_global",
    "log10_bound_local_median",
    "log10_bound_blockwise_median",
)
_NUM_INDICES = 200  # the page lists at most this many


def identity_table(identity: Identity) -> pd.DataFrame:
    """Return one row per item that identifies the audit."""
    made, shown = identity.provenance, identity.image_indices[:_NUM_INDICES]
    more = len(identity.image_indices) - len(shown)
    indices = ", ".join(map(str, shown)) + (f" and {more} more in audit.json" if more else "")
    environment = made["environment"]
    versions = {name: value for name, value in environment.items() if value and name not in ("device", "threads")}
    rows = {
        "date (UTC)": identity.date,
        "command": made["command"],
        "package and commit": f"fisher-reg {environment['fisher-reg']}, {made['commit']}",
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "device": f"{environment['device']}, {environment['threads']} threads",
        "seed": str(made["seed"]),
        "SHA-256 of the weights": identity.weights_sha256,
        "SHA-256 of the checkpoint": identity.checkpoint_sha256 or "no file was given",
        "SHA-256 of the images": identity.images_sha256,
        "digest of the data": made["data"] or "not recorded for these data",
        "indices of the images in the test split": indices,
        "record": f"audit.json, {SCHEMA}",
    }
    return pd.DataFrame({"": list(rows), "value": list(rows.values())})


def summary(audit: Audit, measured: Mapping[str, Number]) -> pd.DataFrame:
    """Return the most important numbers."""
    names = [*_SUMMARY]
    for name, attacked in audit.attacks.items():
        names.append(f"attacks.{name}.{'success' if attacked.ball is None else 'accuracy'}")
        if attacked.ball is None:
            names.append(f"attacks.{name}.median_distance_of_all")
    return number_table(names, measured, len(audit.images))


def number_table(
    names: Sequence[str] | Mapping[str, Number],
    measured: Mapping[str, Number],
    num_images: int,
    *,
    with_names: bool = False,
) -> pd.DataFrame:
    """Return a row per number: value, interval, kind of guarantee and number of images."""
    rows = []
    for name in names:
        number = measured[name]
        row = {"name": name} if with_names else {}
        row |= {"number": number.title, "value": value_of(number), "interval": interval_of(number)}
        guarantee = number.guarantee if number.interval is None else f"{number.guarantee}; interval probabilistic"
        rows.append(row | {"guarantee": guarantee, "images": f"{number.count} of {num_images}"})
    return pd.DataFrame(rows)


def value_of(number: Number) -> str:
    """Return the value with its unit; an infinite distance is shown as not reached."""
    if number.value == math.inf:
        return "not reached"
    return _formatted(number.value, number.unit) if not math.isnan(number.value) else "none"


def interval_of(number: Number) -> str:
    """Return the interval with its level of confidence."""
    if number.interval is None or math.isnan(number.value):
        return "–"
    low, high = (_formatted(end, number.unit, bare=True) for end in (number.interval.low, number.interval.high))
    return f"{low} to {high} ({number.interval.level:.0%})"


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Return a row per threshold."""
    return pd.DataFrame(
        {
            "threshold": str(verdict.threshold),
            "verdict": verdict.word,
            "value": value_of(verdict.number),
            "interval": interval_of(verdict.number),
            "guarantee": verdict.number.guarantee,
            "why": verdict.reason,
        }
        for verdict in verdicts
    )


def attack_table(audit: Audit) -> pd.DataFrame | None:
    """Return a row per attack, in the order of the configuration."""
    rows = []
    for name, attacked in audit.attacks.items():
        found = outcome(audit, name)
        area, link = found["auc_of_lambda"], found["correlation_of_lambda"]
        success = f"{found['num_adversarial']} of {found['num_correct']}: {percent(found['success'])}"
        row: dict[str, Any] = {"attack": name, "ball": attacked.ball or "none", "adversarial example found": success}
        row |= {"accuracy under it": percent(found["accuracy"])}
        row |= {
            "median distance of those found": _distance(found),
            "of all correctly classified": _distance_of_all(found),
        }
        row |= {"masked": found["num_masked"], "ROC-AUC of λ": "–" if area is None else brackets(area)}
        row |= {"correlation with distance": "–" if link is None else brackets(link), "seconds": attacked.seconds}
        rows.append(row)
    return pd.DataFrame(rows) if rows else None


def shown_table(audit: Audit) -> pd.DataFrame:
    """Return a row per image that is shown, with its largest eigenvalues."""
    shown = audit.shown
    numbers = {f"λ{place + 1}": column.tolist() for place, column in enumerate(shown.eigenvalues.unbind(1))}
    return pd.DataFrame(
        {
            "image": shown.index.tolist(),
            "label": [audit.name_of(int(audit.labels[index])) for index in shown.index],
            "predicted": [audit.name_of(int(label)) for label in shown.predicted[0]],
            "confidence": shown.confidence[0].tolist(),
            **numbers,
            "effective rank": audit.sensitivity.effective_rank[shown.index].tolist(),
        }
    )


def metric_table(audit: Audit) -> pd.DataFrame:
    """Return a row per measure of :data:`recipes.competitors.measurement.METRICS`."""
    rows = []
    for name, metric in METRICS.items():
        values = audit.measurement.values[name]
        low, middle, high = (float(values.nanquantile(level)) for level in (0.05, 0.5, 0.95))
        row = {"measure": metric.title, "median": middle, "5 %": low, "95 %": high, "unit": metric.unit}
        rows.append(
            row
            | {"images": f"{int((~values.isnan()).sum())} of {len(values)}", "seconds": audit.measurement.seconds[name]}
        )
    return pd.DataFrame(rows)


def percent(found: dict[str, Any]) -> str:
    """Return a share and its interval for a table."""
    if math.isnan(found["value"]):
        return "–"
    return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


def brackets(found: dict[str, float]) -> str:
    """Return a number and its interval for a table."""
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _formatted(value: float, unit: str, *, bare: bool = False) -> str:
    if unit == "share":
        return f"{value:.1%}"
    text = "∞" if value == math.inf else f"{value:.3g}"
    return text if bare or not unit else f"{text} {unit}"


def _distance(found: dict[str, Any]) -> str:
    return f"{found['median_distance']:.2g}, n = {found['num_adversarial']}" if found["num_adversarial"] else "–"


def _distance_of_all(found: dict[str, Any]) -> str:
    middle, count = found["distance_of_all"]["value"], found["num_correct"]
    if count == 0:
        return "–"
    return f"not reached, n = {count}" if middle == math.inf else f"{middle:.2g}, n = {count}"
