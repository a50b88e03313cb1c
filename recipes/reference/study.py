"""What a value of λ means: ``python -m recipes.reference folder=FOLDER``.

Reads the images of ``recipes.compare`` and relates λ, and λ at equal margins, to the distance to the nearest
adversarial example and to the accuracy under AutoAttack (:mod:`recipes.statistics.law`). The errors are those for
networks of a family, or on a data set, that was not used in the fit. Audits of ``recipes.evaluate`` use the result.

Writes to Hydra's run folder ``reference.csv`` (predicted and observed accuracy, a row per network and attack),
``reference.json`` (the law, its errors, and the undefended networks), ``reference.md`` and ``reference.png``.

Takes a few seconds on two CPU cores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig

from fisher_reg.style import legend_below, look, panels, style
from recipes.compare.powers import NETWORK
from recipes.competitors.measurement import METRICS
from recipes.reference.prediction import fitted, held_out
from recipes.reporting.files import settings_of, show, write
from recipes.reporting.tables import markdown_table
from recipes.runtime.command import command

LAWS = ("lambda", "lambda_tempered")
GROUPS = {"model": "family", "dataset": "data set"}
_EDGES = {"lambda": (0, 0.3, 1, 3, 10, np.inf), "lambda_tempered": (0, 0.3, 1, 3, 10, np.inf)}


@command("reference")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    reference(config)


def reference(config: DictConfig) -> dict[str, Any]:
    """Fit, predict, and write the files.

    Returns:
        What ``reference.json`` holds.

    Raises:
        FileNotFoundError: If the folder lacks the files of a comparison.
        ValueError: If an attack is not one of the comparison with a Euclidean ball, or there are fewer than two
            families or data sets.
    """
    folder, output = Path(config.folder), Path(config.output_dir)
    examples, radii = read(folder, list(config.attacks))
    predicted = pd.concat([held_out(examples, metric, radii, group) for metric in LAWS for group in GROUPS])
    record = {
        "settings": settings_of(config),
        "radii": radii,
        "laws": {metric: asdict(fitted(examples, metric, radii)) for metric in LAWS},
        "errors": errors(predicted),
        "undefended": undefended(examples),
    }
    text = page(examples, predicted, radii)
    figure = draw(predicted[predicted.left_out == "model"])
    write(output, "reference", config, rows=predicted, record=record, page=text, figure=figure)
    show(text, output)
    return record


def read(folder: Path, attacks: list[str]) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the images of a comparison, and the radius of each attack.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: For an attack without a Euclidean ball, or too few groups to leave one out.
    """
    for name in ("examples.csv.gz", "compare.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder={folder} has no {name}: give a folder that recipes.compare has written.")
    examples = pd.read_csv(folder / "examples.csv.gz")
    known = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["settings"]["attacks"]
    balls = {name: settings["epsilon"] for name, settings in known.items() if settings.get("norm") == 2}
    if not attacks or not set(attacks) <= set(balls):
        raise ValueError(f"attacks={attacks} must be some of the attacks in a Euclidean ball, {', '.join(balls)}.")
    for column, title in GROUPS.items():
        if examples[column].nunique() < 2:
            raise ValueError(f"There is one {title} only: a law needs another one to be tested on.")
    return examples, {name: float(balls[name]) for name in attacks}


def errors(predicted: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean and 90th percentile of the absolute error in points of accuracy, by metric and group left out."""
    points = predicted.assign(points=100 * (predicted.predicted - predicted.observed).abs())
    groups = points.groupby(["metric", "left_out"], sort=False).points
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (metric, group), values in groups:
        row = {"mean": round(float(values.mean()), 2), "p90": round(float(values.quantile(0.9)), 2)}
        found.setdefault(str(metric), {})[str(group)] = row
    return found


def undefended(examples: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    """Return the medians of the plainly trained networks of each data set, ascending."""
    plain = examples[examples.training == "standard"]
    medians = plain.groupby(NETWORK, sort=False)[list(LAWS)].median().reset_index()
    return {
        str(dataset): {metric: sorted(float(f"{value:.4g}") for value in some[metric]) for metric in LAWS}
        for dataset, some in medians.groupby("dataset", sort=False)
    }


def networks_table(examples: pd.DataFrame, metric: str, radii: Mapping[str, float]) -> pd.DataFrame:
    """Return distances and accuracies by the median of a metric: a row per range, 90 % of its networks in brackets."""
    right = examples[examples.correct]
    groups = right.groupby(NETWORK, sort=False)
    columns = {metric: groups[metric].median(), "distance": groups.distance_minimal.median()}
    for name, radius in radii.items():
        columns[f"robust, ℓ₂ {radius:g}"] = 1 - groups[f"misclassified_{name}"].mean()
    networks = pd.DataFrame(columns)
    ranges = pd.cut(networks[metric], _EDGES[metric], right=False)
    rows = []
    for place, some in networks.groupby(ranges, observed=True):
        row = {f"median {METRICS[metric].title}": _range(place), "networks": str(len(some))}
        rows.append(row | {name: _spread(some[name]) for name in networks.columns[1:]})
    return pd.DataFrame(rows)


def short_table(examples: pd.DataFrame, radii: Mapping[str, float]) -> pd.DataFrame:
    """Return :func:`networks_table` of both metrics side by side: a row per range."""
    parts = []
    for metric, title in {"lambda": "λ", "lambda_tempered": "λ at equal margins"}.items():
        table = networks_table(examples, metric, radii)
        parts.append(table.drop(columns=[table.columns[0], "networks"]).add_prefix(f"{title}: "))
    return pd.concat([table.iloc[:, 0].rename("median"), *parts], axis=1)


def errors_table(predicted: pd.DataFrame) -> pd.DataFrame:
    """Return the errors in points of accuracy: a row per metric."""
    rows = []
    for metric, groups in errors(predicted).items():
        cells = {f"new {GROUPS[name]}": f"{row['mean']:.1f} ({row['p90']:.0f})" for name, row in groups.items()}
        rows.append({"predicted from": METRICS[metric].title} | cells)
    return pd.DataFrame(rows)


def page(examples: pd.DataFrame, predicted: pd.DataFrame, radii: Mapping[str, float]) -> str:
    """Return the tables as a Markdown page."""
    num_networks = examples.groupby(NETWORK).ngroups
    parts = [
        "# What a value of λ means",
        f"{num_networks} networks of recipes.compare; only images that the network classifies correctly. λ in nats per "
        "squared pixel value, distances Euclidean in pixel values. Median over the networks of a row; in brackets the "
        "range that holds 90 % of them.",
        *(markdown_table(networks_table(examples, metric, radii)) for metric in LAWS),
        "Error of the predicted accuracy under AutoAttack, in points, for networks of a family or on a data set from "
        "which nothing was fitted: mean (90th percentile).",
        markdown_table(errors_table(predicted)),
    ]
    return "\n\n".join(parts) + "\n"


@style()
def draw(predicted: pd.DataFrame) -> Figure:
    """Draw predicted over observed accuracy of held-out families, a panel per metric."""
    figure, grid = panels(1, len(LAWS), height=4.4, sharex=True, sharey=True)
    for axes, metric in zip(grid[0], LAWS, strict=True):
        for number, (model, some) in enumerate(predicted[predicted.metric == metric].groupby("model", sort=False)):
            options = look(number) | {"linestyle": "none", "alpha": 0.7}
            axes.plot(some.observed, some.predicted, label=model, **options)
        axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="equal")
        axes.set(title=f"from {METRICS[metric].title}", xlabel="accuracy under AutoAttack")
    grid[0, 0].set_ylabel("predicted by the law of the other families")
    legend_below(figure, ncols=5)
    return figure


def _range(place: pd.Interval) -> str:
    if place.left == 0:
        return f"below {place.right:g}"
    return f"above {place.left:g}" if np.isinf(place.right) else f"{place.left:g} to {place.right:g}"


def _spread(values: pd.Series) -> str:
    low, middle, high = values.quantile([0.05, 0.5, 0.95])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
