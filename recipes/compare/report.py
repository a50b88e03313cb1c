"""Files of ``recipes.compare``: tables, figures, and the page with both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from fisher_reg.style import FILLS, HIGHLIGHT, legend_below, look, panels, plain_ticks, style
from recipes.compare.analysis import PREDICTORS, Analysis, in_decades, predicted, reached
from recipes.competitors.measurement import METRICS
from recipes.reporting.files import write as write_files
from recipes.reporting.page import Section, render
from recipes.reporting.records import without_folders
from recipes.reporting.tables import markdown_table
from recipes.statistics.agreement import SIGNIFICANCE

_UNIT = "nats / pixel²"
_MAX_POINTS = 4000  # of a scatter plot


def write(
    found: Analysis,
    texts: Sequence[str],
    settings: dict[str, Any],
    folder: Path,
    *,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write the files of a run into its folder.

    Args:
        found: The numbers.
        texts: What they say.
        settings: Of the run.
        folder: The folder.
        provenance: Of the numbers, where another run has measured them.
    """
    for name, digits in (("networks", 6), ("per_example", 4), ("per_model", 4)):
        write_files(folder, name, settings, rows=getattr(found, name), digits=digits)
    found.examples.to_csv(folder / "examples.csv.gz", index=False, float_format="%.6g")
    drawn = figures(found)
    for name, (figure, _) in drawn.items():
        write_files(folder, name, settings, figure=figure)
    record = {"findings": list(texts), "settings": without_folders(settings), "provenance": provenance}
    write_files(folder, "compare", settings, record=record, page=markdown(found, texts))
    (folder / "compare.html").write_text(page(found, texts, drawn), encoding="utf-8")


def tables(found: Analysis) -> dict[str, pd.DataFrame]:
    """Return the tables: predictive power of the metrics, the networks, the distances, and saturation."""
    return {
        "Predictive power of the metrics for examples and networks": metric_table(
            found.per_example, found.per_model, found.networks
        ),
        "The networks: means over seeds": network_table(found),
        "Predicted distance to the nearest adversarial example": found.distances.drop(columns="predictor"),
        "Attack success by confidence (over all networks and data sets)": found.saturation,
    }


def metric_table(per_example: pd.DataFrame, per_model: pd.DataFrame, networks: pd.DataFrame) -> pd.DataFrame:
    """Return a row per metric; every cell with its 95 % interval, ``*`` if the corrected p is at most 0.05."""
    table = pd.DataFrame({"metric": [metric.title for metric in METRICS.values()]}, index=list(METRICS))
    over_models = per_model[(per_model.scope == "all") & (per_model.statistic == "rho")]
    for over, part in {"images": per_example, "networks": over_models}.items():
        for target, rows in part.groupby("target", sort=False):
            goal = "nearness" if target == "distance" else target
            column = f"{over}: {goal}, {rows.statistic.iloc[0]}"
            table[column] = pd.Series({row.metric: _cell(row) for _, row in rows.iterrows()})
    table["seconds"] = [f"{networks[f'seconds_{name}'].median():.2g}" for name in METRICS]
    return table.fillna("–")


def short_markdown(per_example: pd.DataFrame, per_model: pd.DataFrame, networks: pd.DataFrame) -> str:
    """Return the columns of :func:`metric_table` that fit on a page."""
    shown = ["metric", "images: auto_pgd, auc", "images: nearness, rho", "networks: nearness, rho", "seconds"]
    return markdown_table(metric_table(per_example, per_model, networks)[shown], is_right=True)


def _cell(row: pd.Series) -> str:
    few = f" ({row.num_networks} of {row.num_all})" if row.get("num_all", row.num_networks) > row.num_networks else ""
    star = "*" if row.p_corrected <= SIGNIFICANCE else ""
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]{star}{few}"


def network_table(found: Analysis) -> pd.DataFrame:
    """Return the means over the seeds of each cell; geometric means for positive metrics."""
    shown = ["accuracy", *(name for name in found.networks if name.startswith("success_")), "distance"]
    shown += ["lambda", "lambda_blackbox", "lambda_tempered", "clever"]
    shown += ["log10_blockwise", "log10_local", "log10_global"]
    decades = in_decades(found.networks)
    means = decades.groupby(["dataset", "model", "training"], sort=False)[shown].mean()
    changed = [name for name in shown if not decades[name].equals(found.networks[name])]
    return means.assign(**{name: 10 ** means[name] for name in changed}).reset_index()


def markdown(found: Analysis, texts: Sequence[str]) -> str:
    """Return findings and tables as a Markdown page."""
    parts = ["# Metric against attack", *(f"- {text}" for text in texts), ""]
    for title, frame in tables(found).items():
        parts += [f"## {title}", "", markdown_table(frame, is_right=True), ""]
    return "\n".join(parts)


def page(found: Analysis, texts: Sequence[str], drawn: dict[str, tuple[Figure, str]]) -> str:
    """Return findings, tables and figures as a self-contained HTML page."""
    sections = [Section("Findings", texts)]
    sections += [Section(title, table=frame) for title, frame in tables(found).items()]
    sections += [
        Section(name.replace("_", " ").capitalize(), figure=figure, caption=caption)
        for name, (figure, caption) in drawn.items()
    ]
    lead = [
        "How well do the largest eigenvalue of the input-space Fisher matrix, and every other number that needs no "
        "attack, predict which images are misclassified under attack, and the distances of adversarial examples? "
        "Positive correlations and areas above one half mean that a larger sensitivity goes with easier attacks. "
        "Intervals are 95 % bootstrap intervals: over images, models and seeds if images are ordered; over models and "
        "seeds, for these images, if networks are ordered. * marks p-values of at most 0.05 after correction for all "
        "tests of a kind; (n of N) counts the networks for which a value is defined. CLEVER and the blockwise bound "
        "are computed for fewer images than the others."
    ]
    return render("Metric against attack", lead, sections)


def figures(found: Analysis) -> dict[str, tuple[Figure, str]]:
    """Draw the figures, each with its caption."""
    return {
        "metric_against_attack": (
            draw_success(found.networks),
            "Each point is a network. Left: median λ over the images; right: at equal margins, which the confidence "
            "of a network does not change. Upwards: median distance to the nearest adversarial example, in pixel "
            "units.",
        ),
        "ranking": (
            draw_ranking(found.networks),
            "Order of the models and trainings of each data set by median λ, by λ at equal margins, and by the median "
            "distance to the nearest adversarial example; the most sensitive on top.",
        ),
        "white_box_against_black_box": (
            draw_black_box(found.examples),
            "Each point is an image of a network: estimates against the largest eigenvalue.",
        ),
        "distance": (
            draw_distances(found.examples),
            "Distance to the nearest adversarial example over the predicted distance; a point per image that the "
            "network classified correctly. An eigenvalue has one constant c per network, fitted on the other images.",
        ),
        "power": (
            draw_power(found),
            "Rank correlation with the nearness of the nearest adversarial example, over the examples of a network "
            "(mean over networks) and over the networks of a data set (mean over data sets), with 95 % intervals.",
        ),
    }


@style()
def draw_success(networks: pd.DataFrame) -> Figure:
    """Draw the distance to the nearest adversarial example over λ: a row of panels per data set."""
    datasets, models, trainings = (list(networks[name].unique()) for name in ("dataset", "model", "training"))
    figure, grid = panels(len(datasets), 2, height=2.7 * len(datasets) + 0.7, sharey="row")
    for line, dataset in zip(grid, datasets, strict=True):
        some = networks[networks.dataset == dataset]
        for axes, metric in zip(line, ("lambda", "lambda_tempered"), strict=True):
            for (model, training), part in some.groupby(["model", "training"]):
                axes.plot(part[metric], part.distance, **_point(models.index(model), trainings.index(training)))
            axes.set(xscale="log", yscale="log", title=dataset)
            plain_ticks(axes.xaxis)
            plain_ticks(axes.yaxis)
    for axes, metric in zip(grid[-1], ("lambda", "lambda_tempered"), strict=True):
        axes.set_xlabel(f"median of {METRICS[metric].title}, {_UNIT}")
    figure.supylabel("distance to the nearest adversarial example, pixels (median)", fontsize="medium")
    handles = [Line2D([], [], **(_point(index, 0) | {"label": name})) for index, name in enumerate(models)]
    for index, name in enumerate(trainings):
        handles.append(Line2D([], [], **(_point(0, index) | {"label": f"training: {name}", "color": "black"})))
    legend_below(figure, handles)
    return figure


def _point(model: int, training: int) -> dict[str, Any]:
    """Return how a network is drawn: the model by its colour and marker, the training by what the marker is filled."""
    return look(model) | {"linestyle": "none", "fillstyle": FILLS[training % len(FILLS)], "markersize": 6}


@style()
def draw_ranking(networks: pd.DataFrame) -> Figure:
    """Draw the order of the cells of each data set by metric and by attack, side by side."""
    datasets, models = list(networks.dataset.unique()), list(networks.model.unique())
    columns = {"lambda": 1, "lambda_tempered": 1, "distance": -1}
    num_rows = -(-len(datasets) // 2)
    figure, grid = panels(num_rows, min(2, len(datasets)), height=4.2 * num_rows + 0.4)
    for axes in grid.flat[len(datasets) :]:
        axes.remove()
    for axes, dataset in zip(grid.flat, datasets, strict=False):
        some = in_decades(networks[networks.dataset == dataset])
        cells = some.groupby(["model", "training"], sort=False)[list(columns)].mean()
        places = pd.DataFrame({name: (sign * cells[name]).rank(method="first") for name, sign in columns.items()})
        for (model, _), line in places.iterrows():
            axes.plot(range(len(columns)), line, **(look(models.index(model)) | {"label": model}))
        order = places["lambda"].sort_values()
        axes.set_yticks(order, [f"{model}, {training}" for model, training in order.index])
        axes.set_xticks(range(len(columns)), ["λ", "λ, equal\nmargins", "attack"])
        axes.set(title=dataset, ylim=(0.5, len(places) + 0.5))
    legend_below(figure)
    return figure


@style()
def draw_black_box(examples: pd.DataFrame) -> Figure:
    """Draw the black-box estimate and the paper's two estimators over λ."""
    shown = ("lambda_blackbox", "paper_white_box", "paper_black_box")
    some = examples.sample(min(_MAX_POINTS, len(examples)), random_state=0)
    some = some[some["lambda"] > 0]
    figure, ((axes,),) = panels(height=6.4)
    for number, name in enumerate(shown):
        drawn = some[some[name] > 0]
        off = np.abs(np.log10(drawn[name] / drawn["lambda"])).median()
        left_out = f"zero or none at {len(some) - len(drawn)} of {len(some)}"
        label = f"{METRICS[name].title}: median factor {10**off:.3g}, {left_out}"
        axes.plot(drawn["lambda"], drawn[name], label=label, **_cloud(number))
    ends = [some["lambda"].min(), some["lambda"].max()]
    axes.plot(ends, ends, color="k", linewidth=1, label="equal")
    axes.set(xscale="log", yscale="log", xlabel=f"{METRICS['lambda'].title}, {_UNIT}", ylabel=f"estimate, {_UNIT}")
    _strong(legend_below(figure, ncols=1))
    return figure


def _cloud(number: int) -> dict[str, Any]:
    """Return how thousands of points are drawn."""
    return look(number) | {"linestyle": "none", "alpha": 0.3, "markersize": 3, "markeredgewidth": 0}


@style()
def draw_distances(examples: pd.DataFrame) -> Figure:
    """Draw the distances to the nearest adversarial examples over their predictions, a panel per predictor."""
    found = reached(examples[examples.correct])
    figure, (line,) = panels(1, len(PREDICTORS), height=3.9, sharex=True, sharey=True)
    for axes, (name, title) in zip(line, PREDICTORS.items(), strict=True):
        pairs = predicted(found, name)
        for number, (dataset, part) in enumerate(pairs.groupby("dataset", sort=False)):
            some = part.sample(min(_MAX_POINTS // 4, len(part)), random_state=0)
            axes.plot(some.prediction, some.distance, label=dataset, **_cloud(number))
        ends = [pairs.distance.min(), pairs.distance.max()]
        axes.plot(ends, ends, color="k", linewidth=1, label="equal")
        axes.set(xscale="log", yscale="log", title=title)
        axes.set(xlim=(ends[0] / 10, ends[1] * 10), ylim=(ends[0] / 1.5, ends[1] * 1.5))
    line[0].set_ylabel("distance to the nearest\nadversarial example, pixels")
    line[len(line) // 2].set_xlabel("predicted distance, pixels")
    _strong(legend_below(figure, ncols=5))
    return figure


def _strong(legend: Legend) -> None:
    """Draw the points of a legend larger than those of the clouds, and opaque."""
    for handle in legend.legend_handles:
        if isinstance(handle, Line2D):
            handle.set_alpha(1)
            handle.set_markersize(6)


@style()
def draw_power(found: Analysis) -> Figure:
    """Draw how well each metric orders examples and networks by distance."""
    over_models = found.per_model[(found.per_model.scope == "all") & (found.per_model.statistic == "rho")]
    figure, (line,) = panels(1, 2, height=5.0, sharey=True)
    titles = {"examples of a network": found.per_example, "networks of a data set": over_models}
    for axes, (title, part) in zip(line, titles.items(), strict=True):
        _draw_intervals(axes, part[part.target == "distance"].set_index("metric"))
        axes.set(title=title, xlabel="rank correlation with nearness")
    line[0].set_yticks([-place for place in range(len(METRICS))], [metric.title for metric in METRICS.values()])
    ours, others = (Line2D([], [], **_dot(is_ours), label=label) for is_ours, label in _WHOSE.items())
    legend_below(figure, [ours, others])
    return figure


_WHOSE = {True: "λ of this package", False: "other measures"}


def _dot(is_ours: bool) -> dict[str, Any]:
    return {**look(0), "marker": "o"} if is_ours else {**look(1), "linestyle": "-", "markerfacecolor": "white"}


def _draw_intervals(axes: Axes, rows: pd.DataFrame) -> None:
    for place, name in enumerate(METRICS):
        if name in rows.index:
            row = rows.loc[name]
            drawn = _dot(name.startswith("lambda"))
            axes.plot([row.low, row.high], [-place] * 2, **(drawn | {"marker": ""}))
            axes.plot(row.value, -place, **(drawn | {"linestyle": "none"} | (HIGHLIGHT if name == "lambda" else {})))
    axes.axvline(0, color="gray", linestyle=":")
