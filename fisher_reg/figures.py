"""Figures from numbers: what was logged goes in, a matplotlib figure comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_LEVELS = {
    "global": ("tab:red", "s-", "global upper bound"),
    "local": ("tab:orange", "s-", "local upper bound, mean of log"),
    "blockwise": ("tab:purple", "s--", "blockwise (not certified), mean of log"),
}


def bound_versus_empirical(history: Sequence[Mapping[str, float]]) -> Figure:
    r"""Draw the estimate and the bounds above it over the epochs, on a logarithmic axis.

    Args:
        history: One mapping per measurement, with ``epoch`` and the keys that
            :class:`fisher_reg.FisherMonitor` logs. Values that are not finite are left out.

    Returns:
        A figure that belongs to no pyplot state.

    Raises:
        ModuleNotFoundError: Without matplotlib.
        ValueError: For an empty history.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("There is nothing to draw: the history is empty. Has the monitor measured an epoch yet?")
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    epochs = [entry["epoch"] for entry in history]

    def series(key: str) -> list[float]:
        return [entry.get(key, math.nan) for entry in history]

    keys = dict.fromkeys(key for entry in history for key in entry)
    levels = [key.removeprefix("fisher/log10_bound_") for key in keys if key.startswith("fisher/log10_bound_")]
    for level in levels:
        colour, line, name = _LEVELS.get(level, ("tab:red", "s-", f"{level} upper bound"))
        values = series(f"fisher/log10_bound_{level}")
        known = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if not math.isnan(value)]
        axes.plot([epoch for epoch, _ in known], [value for _, value in known], line, color=colour, label=name)
    curves = {"max": "tab:blue", "p95": "tab:cyan", "mean": "tab:green", "median": "tab:olive"}
    for name, colour in curves.items():
        decades = [_log10(value) for value in series(f"fisher/lambda_max_{name}")]
        axes.plot(epochs, decades, "o-", color=colour, markersize=4, label=rf"$\lambda_{{\max}}(F)$, {name}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_formatter(lambda value, position: f"$10^{{{value:g}}}$")
    axes.set(xlabel="epoch", ylabel="nats per squared input unit", title="Fisher spectral norm: bound and estimate")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _log10(value: float) -> float:
    return math.log10(value) if 0 < value < math.inf else math.nan
