"""Agreement of the rankings of networks by bounds and by lambda: numbers, sentences, tables and the figure.

Rows are those of ``rank.csv``: one per network, with columns ``model, family, seed``, the summaries of lambda and the
log10 of the bounds. Every model has the same seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from fisher_reg.style import legend_beside, legend_under, look, panels, style
from recipes.reporting.tables import markdown_table
from recipes.statistics.agreement import (
    MIN_MODELS,
    SIGNIFICANCE,
    agreement,
    every_network,
    grid,
    interval,
    mean_over_seeds,
    p_value,
    rho,
    tau,
)


@dataclass(frozen=True)
class Comparison:
    """A bound and the quantity by which it should rank networks.

    Attributes:
        level: Level of the bound.
        bound: Column of its log10.
        target: Column of a summary of lambda over the images.
    """

    level: str
    bound: str
    target: str


COMPARISONS = (
    Comparison("global", "log10_global", "lambda_median"),
    Comparison("local", "log10_local_mean", "lambda_median"),
    Comparison("blockwise", "log10_blockwise_mean", "lambda_median_few"),
    Comparison("global", "log10_global", "lambda_max"),
    Comparison("local", "log10_local_max", "lambda_max"),
    Comparison("blockwise", "log10_blockwise_max", "lambda_max_few"),
)


def correlations(rows: pd.DataFrame, num_resamples: int) -> pd.DataFrame:
    """Compare the ranking by every bound with that by lambda.

    Returns:
        One row per group of networks (``over``) and comparison, with ``tau, tau_low, tau_high, tau_p``, the same of
        ``rho``, and a ``verdict``.
    """
    groups = {"models": rows, "networks": rows}
    if rows.family.nunique() > 1:
        families = {f"models of {family}": part for family, part in rows.groupby("family", sort=False)}
        groups |= {over: part for over, part in families.items() if part.model.nunique() >= MIN_MODELS}
    return pd.DataFrame(
        [compare(part, comparison, over, num_resamples) for over, part in groups.items() for comparison in COMPARISONS]
    )


def compare(rows: pd.DataFrame, comparison: Comparison, over: str, num_resamples: int) -> dict[str, Any]:
    """Return one row of :func:`correlations`."""
    bound, target = grid(rows, comparison.bound), np.log10(grid(rows, comparison.target))
    merge = every_network if over == "networks" else mean_over_seeds
    result: dict[str, Any] = {"over": over, "level": comparison.level, "bound": comparison.bound}
    result |= {"target": comparison.target, "num_models": len(bound), "num_seeds": bound.shape[1]}
    for name, statistic in (("tau", tau), ("rho", rho)):
        result[name] = float(agreement([(bound, target)], statistic, merge))
        low, high = interval([(bound, target)], statistic, merge, num_resamples)
        p = p_value([(bound, target)], statistic, merge, num_resamples)
        result |= {f"{name}_low": low, f"{name}_high": high, f"{name}_p": p}
    return result | {"verdict": verdict(result)}


def verdict(result: dict[str, Any]) -> str:
    """Return the conclusion about tau from a row of :func:`correlations`.

    Returns:
        A sentence. It claims an order only if the interval excludes 0 and p is at most 0.05. If the smallest possible
        p, ``2 / num_models!``, is larger, it states that there are too few models.
    """
    tau, low, high, p = (result[key] for key in ("tau", "tau_low", "tau_high", "tau_p"))
    bound, things = f"the {result['level']} bound", result["over"]
    if math.isnan(tau):
        return f"tau is undefined: {bound} or {result['target']} is the same for all {things}."
    if 2 / math.factorial(result["num_models"]) > SIGNIFICANCE:
        return f"{result['num_models']} models are too few: no ranking of the {things} can be significant."
    said = f"tau = {tau:.2f} [{low:.2f}, {high:.2f}], p = {p:.2g}: "
    if low <= 0 <= high:
        return f"{said}{bound} does not rank these {things} by {result['target']}."
    if p > SIGNIFICANCE:
        return f"{said}{result['num_models']} models are too few for a significant ranking by {bound}."
    if high < 0:
        return f"{said}{bound} ranks these {things} in the opposite order of {result['target']}."
    if tau > 1 - 1e-9:
        return f"{said}{bound} ranks these {things} by {result['target']}, with every pair in the same order."
    agreeing = f"about {(1 + tau) / 2:.0%} of the pairs are in the same order"
    return f"{said}{bound} ranks these {things} in part by {result['target']}: {agreeing}."


def reproducibility(rows: pd.DataFrame, target: str) -> float:
    """Return the mean tau between the rankings of models by ``target`` in two seeds: about the largest possible tau."""
    pairs = combinations(grid(rows, target).T, 2)
    return float(np.mean([tau(*pair) for pair in pairs])) if rows.seed.nunique() > 1 else math.nan


def notes(rows: pd.DataFrame) -> list[str]:
    """Return notes for readers of the numbers."""
    found = [
        "lambda_median_few and lambda_max_few: over the images of the blockwise bound only.",
        "Intervals: bootstrap over models, and seeds within them. p: permutations of models. Neither is corrected for "
        f"the number of comparisons ({len(COMPARISONS)} in each group).",
    ]
    if rows.seed.nunique() == 1:
        found.append(
            "One seed per model: the intervals account for the choice of the models, not for the seed of the training."
        )
    else:
        taus = [f"{reproducibility(rows, target):.2f} ({target})" for target in ("lambda_median", "lambda_max")]
        found.append(f"Two seeds agree in the order of the models by lambda to tau = {' and '.join(taus)} on average.")
    if violations := int(rows.num_violations.sum()):
        found.append(f"{violations} times a bound was below the eigenvalue that it bounds: this is a bug, report it.")
    return found


def model_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the means over seeds as text, with ranks; rank 1 has the smallest value, the least sensitive network."""
    models = rows.groupby("model", sort=False)
    table = pd.DataFrame({"accuracy": models.accuracy.mean().map("{:.3f}".format)})
    for target in ("lambda_median", "lambda_max"):
        means = np.log10(rows[target]).groupby(rows.model, sort=False).mean()
        table[target] = _ranked(10**means, "{:.3g}")
    for bound in dict.fromkeys(comparison.bound for comparison in COMPARISONS):
        table[bound] = _ranked(models[bound].mean(), "{:.2f}")
    return table.reset_index()


def comparison_table(found: pd.DataFrame) -> pd.DataFrame:
    """Return the correlations as text."""
    table = found[["over", "level", "target"]].copy()
    for name in ("tau", "rho"):
        columns = (found[f"{name}{end}"] for end in ("", "_low", "_high", "_p"))
        table[f"{name} [95 %]"], table[f"p {name}"] = zip(
            *(
                (f"{value:.2f} [{low:.2f}, {high:.2f}]", f"{p:.2g}")
                for value, low, high, p in zip(*columns, strict=True)
            ),
            strict=True,
        )
    return table


def markdown(rows: pd.DataFrame, found: pd.DataFrame) -> str:
    """Return the tables, verdicts and notes as a Markdown page."""
    verdicts = [f"- {text}" for text in dict.fromkeys(found.verdict)]
    parts = [
        "# Do the bounds rank the networks?",
        "Means over seeds (of the log10 of lambda and of the bounds); in brackets the rank, 1 for the smallest value.",
        markdown_table(model_table(rows), is_right=True),
        markdown_table(comparison_table(found), is_right=True),
        "\n".join(verdicts),
        *notes(rows),
    ]
    return "\n\n".join(parts) + "\n"


@style()
def draw(rows: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Draw the bounds over lambda, the ranks side by side, and tau with its intervals."""
    names = list(rows.family.unique())
    figure, ((scatter,), (ranks,), (taus,)) = panels(3, 1, height=12.5)
    _draw_bounds(scatter, rows, names)
    _draw_ranks(ranks, rows, names)
    _draw_taus(taus, found)
    return figure


def _draw_bounds(axes: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    for number, (_, part) in enumerate(rows.groupby("family", sort=False)):
        for level, (bound, target) in _LARGEST.items():
            drawn = look(number) | {"linestyle": "none", "markersize": 6, "fillstyle": _FILLS[level]}
            axes.plot(np.log10(part[target]), part[bound], **drawn)
    ends = np.array(axes.get_xlim())
    axes.plot(ends, ends, color="gray", linestyle=":")
    handles = [
        Line2D([], [], **(look(index) | {"linestyle": "none", "label": name})) for index, name in enumerate(names)
    ]
    handles += [
        Line2D([], [], color="k", marker="o", linestyle="none", fillstyle=fill, label=f"{level} bound")
        for level, fill in _FILLS.items()
    ]
    handles.append(Line2D([], [], color="gray", linestyle=":", label="bound = λ"))
    legend_beside(axes, handles)
    axes.set_yscale("symlog", linthresh=8, linscale=3)  # of log10: the global bound may be 80 decades above the others
    axes.set_ylim(min(0, rows[[bound for bound, _ in _LARGEST.values()]].min(axis=None)) - 0.5)
    axes.yaxis.set_major_locator(FixedLocator([*range(-16, 8, 2), 8, 16, 32, 64, 128, 256]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: rf"$10^{{{value:g}}}$")
    axes.set(
        xlabel=r"largest $\lambda_{\max}(F(x))$ over the images, nats per squared pixel",
        ylabel="largest bound (axis compressed above $10^8$)",
        title="each network",
    )


def _draw_ranks(axes: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    columns = {"lambda": "lambda_max", **{level: bound for level, (bound, _) in _LARGEST.items()}}
    values = rows.assign(lambda_max=np.log10(rows.lambda_max)).groupby("model", sort=False)
    places = pd.DataFrame({name: values[column].mean().rank(method="first") for name, column in columns.items()})
    families = values.family.first()
    for model, line in places.iterrows():
        family = families[model]
        axes.plot(range(len(columns)), line, **(look(names.index(family)) | {"label": family}))
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    for side, name in ((axes, "lambda"), (right, "blockwise")):
        order = places[name].sort_values()
        side.set_yticks(order, order.index)
        side.set_ylim(0.5, len(places) + 0.5)
    handles = {line.get_label(): line for line in axes.lines}
    legend_under(axes, handles.values(), ncols=len(handles))
    axes.set_xticks(range(len(columns)), ["λ, largest", "global bound", "local bound", "blockwise,\nfewer images"])
    axes.set(title="order of the models, largest on top")
    axes.margins(x=0.03)


def _draw_taus(axes: Axes, found: pd.DataFrame) -> None:
    groups: dict[str, tuple[str, Literal["full", "none"], float]] = {
        "models": ("k", "full", 0.15),
        "networks": ("gray", "none", -0.15),
    }
    for over, (colour, fill, shift) in groups.items():
        part = found[found.over == over].reset_index(drop=True)
        for place, row in part.iterrows():
            axes.plot([row.tau_low, row.tau_high], [shift - place] * 2, color=colour)
            axes.plot(row.tau, shift - place, "o", color=colour, fillstyle=fill, markersize=7)
    labels = [f"{comparison.level},\n{_TARGETS[comparison.target]}" for comparison in COMPARISONS]
    axes.set_yticks([-place for place in range(len(labels))], labels)
    axes.axvline(0, color="gray", linestyle=":")
    handles = [
        Line2D([], [], color=colour, marker="o", fillstyle=fill, label=f"over {over}")
        for over, (colour, fill, _) in groups.items()
    ]
    legend_beside(axes, handles)
    axes.set(xlim=(-1.05, 1.05), ylim=(-len(labels) + 0.5, 0.5), xlabel="Kendall's tau, 95 % interval")
    axes.set_title("agreement of the orders")


_FILLS: dict[str, Literal["full", "left", "none"]] = {"global": "full", "local": "left", "blockwise": "none"}
_TARGETS = {
    "lambda_median": "median λ",
    "lambda_median_few": "median λ, fewer images",
    "lambda_max": "largest λ",
    "lambda_max_few": "largest λ, fewer images",
}
_LARGEST = {  # and lambda on the images of that bound
    "global": ("log10_global", "lambda_max"),
    "local": ("log10_local_max", "lambda_max"),
    "blockwise": ("log10_blockwise_max", "lambda_max_few"),
}


def _ranked(values: pd.Series, pattern: str) -> pd.Series:
    ranks = values.rank(method="min").astype(int)
    return pd.Series(
        [f"{pattern.format(value)} ({rank})" for value, rank in zip(values, ranks, strict=True)], values.index
    )
