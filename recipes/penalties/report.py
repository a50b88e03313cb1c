"""The table and the figure of ``recipes.compare_penalties``."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fisher_reg.style import COLOURS, HIGHLIGHT, legend_below, look, panels, style
from recipes.reporting.tables import baseline_first, markdown_table, radius_text, with_error

KEYS = ["model", "method", "strength"]
PLAIN = "none"
DEFAULT = "default"
ROBUST = "l2_0.25"
"""The default attack for the choice of finalists and for figures; see ``attack_name``."""
_TITLES = {
    "seeds": "seeds",
    "clean": "clean",
    "lambda_mean": "mean λ",
    "lambda_median": "median λ",
    "calibration_error": "ECE",
    "seconds": "seconds",
}


def finalists(frame: pd.DataFrame, max_clean_loss: float, robust: str = ROBUST) -> set[tuple[str, str, float]]:
    """Choose for each method and model the strength that is also attacked by AutoAttack.

    It is the one with the highest robust accuracy among those whose accuracy is at most ``max_clean_loss`` below that
    of the plain training, or the one with the highest accuracy if there is none.

    Returns:
        Model, method and strength of each.
    """
    means = frame.groupby(KEYS)[["clean", robust]].mean().reset_index()
    chosen = set()
    for (model, _), settings in means.groupby(["model", "method"]):
        plain = means[(means.model == model) & (means.method == PLAIN)].clean
        floor = plain.iloc[0] - max_clean_loss if len(plain) else -math.inf
        allowed = settings[settings.clean >= floor]
        row = allowed.loc[allowed[robust].idxmax()] if len(allowed) else settings.loc[settings.clean.idxmax()]
        chosen.add((row.model, row.method, row.strength))
    return chosen


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return ``mean ± standard error`` over the seeds of each setting, the plain training of each model first."""
    frame = baseline_first(frame, PLAIN, [*KEYS, "seed"])
    values = [name for name in frame.columns if name not in (*KEYS, "seed", "finite")]
    groups = frame.groupby(KEYS, sort=False)[values]
    mean, error = groups.mean(), groups.sem()
    cells = pd.DataFrame(index=mean.index)
    cells["seeds"] = groups.size().astype(str)
    for name in values:
        cells[name] = [with_error(m, e) for m, e in zip(mean[name], error[name], strict=True)]
    return cells.reset_index()


def markdown(cells: pd.DataFrame) -> str:
    """Return the table as Markdown."""
    titled = cells.assign(strength=cells.strength.map(radius_text))
    titled.columns = [_TITLES.get(name, _attack_title(name)) for name in cells.columns]
    return markdown_table(titled) + "\n"


def short(cells: pd.DataFrame, robust: str = ROBUST) -> pd.DataFrame:
    """Return the columns of the table that fit on a screen."""
    shown = ("clean", robust, "l2_0.5", "linf_2/255", f"auto_{robust}", "lambda_mean", "calibration_error", "seconds")
    return cells[[*KEYS, *(name for name in dict.fromkeys(shown) if name in cells.columns)]]


@style()
def draw(frame: pd.DataFrame, robust: str = ROBUST) -> Figure:
    """Draw robust accuracy over accuracy and over time: a row per model, a curve per method through its strengths."""
    models = list(frame.model.unique())
    figure, axes = panels(len(models), 2, height=4.0 * len(models) + 0.9, sharey="row")
    methods = sorted(frame.method.unique(), key=lambda name: (name != PLAIN, name))
    for line, model in zip(axes, models, strict=True):
        for number, method in enumerate(methods):
            some = frame[(frame.model == model) & (frame.method == method)]
            if some.empty:
                continue
            groups = some.groupby("strength")
            mean, error = groups.mean(numeric_only=True), groups.sem(numeric_only=True).fillna(0)
            for panel, axis in zip(line, ("clean", "seconds"), strict=True):
                drawn = _look(method, number)
                panel.errorbar(mean[axis], mean[robust], error[robust], error[axis], label=method, **drawn)
        plain = frame[(frame.model == model) & (frame.method == PLAIN)]
        line[0].set(xlabel="accuracy without attack", ylabel=f"accuracy under {_attack_title(robust)}", title=model)
        line[1].set(xlabel="time of training, seconds", title=model)
        if len(plain):
            line[0].axvline(plain.clean.mean(), color="gray", linestyle=":", linewidth=1)
    legend_below(figure)
    return figure


def _look(method: str, number: int) -> dict[str, Any]:
    """Return how a method is drawn: the plain training as a black star, our default with a black edge."""
    if method == PLAIN:
        return {"color": "black", "marker": "*", "markersize": 13, "capsize": 2}
    colour = COLOURS[(number - 1) % (len(COLOURS) - 1)]  # without the last one, black
    return (
        look(number - 1)
        | {"color": colour, "capsize": 2, "elinewidth": 1, "markersize": 6}
        | (HIGHLIGHT if method == DEFAULT else {})
    )


def _attack_title(name: str) -> str:
    kind, _, rest = name.partition("_") if name.startswith(("auto_", "same_")) else ("pgd", "", name)
    norm, _, radius = rest.partition("_")
    if norm not in ("l2", "linf"):
        return name
    attack = {"pgd": "PGD {}", "auto": "AutoAttack {}", "same": "PGD {} on the images of AutoAttack"}[kind]
    return attack.format(f"{'ℓ₂' if norm == 'l2' else 'ℓ∞'} {radius}")
