"""``audit.json``: everything except the pictures, as ``audit.schema.json`` describes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fisher_reg import summarize
from recipes.evaluate.audit import Audit, outcome, share
from recipes.evaluate.identity import SCHEMA
from recipes.evaluate.masking import masking
from recipes.evaluate.numbers import Number
from recipes.evaluate.scope import covered, crosswalk, not_tested
from recipes.evaluate.thresholds import Verdict
from recipes.reporting.records import plain, without_folders

SCHEMA_FILE = Path(__file__).with_name("audit.schema.json")
"""JSON Schema (draft 2020-12) of the record."""


def record(
    audit: Audit, measured: Mapping[str, Number], verdicts: Sequence[Verdict], reading: Sequence[str]
) -> dict[str, Any]:
    """Return the record, ready for JSON: NaN becomes null, and infinity a string."""
    shown = audit.shown
    who = asdict(audit.identity)
    result: dict[str, Any] = plain(
        {
            "schema": SCHEMA,
            "provenance": who.pop("provenance"),
            "identity": who,
            "network": audit.network,
            "data": audit.data,
            "settings": without_folders(audit.settings),
            "reading": reading,
            "scope": {"covered": covered(audit), "not_tested": not_tested(audit)},
            "numbers": {name: asdict(number) for name, number in measured.items()},
            "thresholds": [_verdict(verdict) for verdict in verdicts],
            "masking": [asdict(check) for check in masking(audit.attacks, measured)],
            "crosswalk": crosswalk(audit, measured).to_dict("records"),
            "accuracy": share(audit.correct),
            "lambda": summarize(audit.measurement.values["lambda"]),
            "num_saturated": int(audit.saturated.sum()),
            "num_lambda_zero": int((audit.measurement.values["lambda"] == 0).sum()),
            "attacks": {name: _attack(audit, name) for name in audit.attacks},
            "wide_interval_share": measured["wide_interval_share"].value,
            "images": audit.measurement.lists() | {"label": audit.labels} | _sensitivity(audit),
            "most_sensitive": {key: getattr(shown, key) for key in ("index", "eigenvalues", "predicted", "confidence")},
        }
    )
    return result


def write_json(path: Path, content: Any) -> None:
    """Write JSON; NaN and infinity raise an error."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict.threshold) | {
        "value": verdict.number.value,
        "compared": verdict.compared,
        "verdict": "pass" if verdict.passed else "fail",
        "reason": verdict.reason,
    }


def _attack(audit: Audit, name: str) -> dict[str, Any]:
    attacked = audit.attacks[name]
    found = {
        "attack": attacked.text,
        "masked": attacked.result.masked,
        "warnings": attacked.warnings,
        "seconds": attacked.seconds,
    }
    images = {key: getattr(attacked.result, key) for key in ("misclassified", "euclidean")}
    return found | outcome(audit, name) | images


def _sensitivity(audit: Audit) -> dict[str, Any]:
    known = audit.sensitivity
    return {
        "lambda_lower": known.lower,
        "lambda_upper": known.upper,
        "interval_width": known.interval_width,
        "effective_rank": known.effective_rank,
        "kl_ratio": known.kl_ratio,
        "single_step_ratio": known.single_step_ratio,
    }
