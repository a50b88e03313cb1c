"""Compare a network with those of ``recipes.compare``; the numbers are in the file that ``recipes.reference`` wrote."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from recipes.evaluate.audit import Audit
from recipes.statistics.law import Law

FILE = Path(__file__).parents[1] / "results" / "reference.json"
"""The file is also in the wheel."""
_NETWORKS = "VGG, ResNet, DenseNet, ViT, trained without defence, from recipes.compare"


def comparison(audit: Audit) -> list[str]:
    """Return how λ compares with known networks, and the accuracy under AutoAttack that it predicts, in sentences."""
    found = _reference()
    return [*_rank(audit, found["undefended"]), _expectation(audit, found)]


def _rank(audit: Audit, undefended: dict[str, dict[str, list[float]]]) -> list[str]:
    name = _data_set(audit.settings["data"])
    if name not in undefended:
        known = ", ".join(undefended)
        return [f"There is no reference for these data. Reference networks exist for {known}."]
    parts = []
    for metric, title in {"lambda": "median λ", "lambda_tempered": "median λ at equal margins"}.items():
        others, value = undefended[name][metric], _median(audit, metric)
        smaller = sum(other > value for other in others)
        parts.append(f"{title} ({value:.3g}) is smaller than that of {smaller} of the {len(others)}")
    return [f"Comparison with undefended networks on {name} ({_NETWORKS}): the {' and the '.join(parts)}."]


def _expectation(audit: Audit, found: dict[str, Any]) -> str:
    law, error = Law(**found["laws"]["lambda_tempered"]), found["errors"]["lambda_tempered"]["model"]
    values, correct = audit.measurement.values["lambda_tempered"].numpy(), audit.correct.numpy()
    expected = {radius: float((correct * law.survival(values, radius)).mean()) for radius in found["radii"].values()}
    texts = [f"{value:.0%} at a radius of {radius:g}" for radius, value in expected.items()]
    return (
        f"The accuracy under AutoAttack (ℓ₂) that λ at equal margins predicts is {' and '.join(texts)}. For families "
        f"of networks that were not used in the fit, the mean error of this prediction is {error['mean']:.0f} "
        f"percentage points, and one error in ten is {error['p90']:.0f} or more. The prediction is valid for "
        "images of up to 32 x 32 pixels."
    )


def _data_set(data: dict[str, Any]) -> str | None:
    """Return the name of a data set of ``recipes.compare``."""
    kind = str(data["_target_"]).rsplit(".", 1)[-1]
    return {"Digits": "digits", "MNIST": "mnist", "CIFAR10": "cifar10"}.get(str(data.get("name", kind)))


def _median(audit: Audit, metric: str) -> float:
    values = audit.measurement.values[metric]
    return float(values.nanquantile(0.5)) if not bool(values.isnan().all()) else math.nan


@cache
def _reference() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found
