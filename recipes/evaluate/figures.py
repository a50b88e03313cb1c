"""The figures of an audit, from arrays with one number per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fisher_reg.style import COLOURS, WIDTH, legend_below, look, panels, style
from recipes.competitors.measurement import SATURATED

Array = np.ndarray[Any, Any]

_UNIT = "nats / pixel²"
_GROUPS = {f"confidence up to {SATURATED}": False, f"saturated: above {SATURATED}": True}
_LEVELS = {
    "log10_global": "global bound, certified for every input",
    "log10_local": "local bound, certified at the image",
    "log10_blockwise": "blockwise bound, not certified",
}


@style()
def distribution(values: Array, margins: Array, is_saturated: Array) -> Figure:
    """Draw the histogram of log10 λ, and λ against the margin of the logits; λ = 0 is counted, not drawn."""
    figure, ((left, right),) = panels(1, 2, height=3.8)
    positive = values > 0
    logs = np.log10(values, where=positive, out=np.full_like(values, np.nan))
    groups = {name: positive & (is_saturated == wanted) for name, wanted in _GROUPS.items()}
    if positive.any():
        parts = [logs[group] for group in groups.values()]
        _, _, bars = left.hist(parts, 20, stacked=True, color=COLOURS[: len(groups)], edgecolor="white")
        for bar in bars[1]:
            bar.set_hatch("////")
    for number, (name, group) in enumerate(groups.items()):
        right.plot(margins[group], logs[group], label=name, **(look(number) | {"linestyle": "none"}))
    left.set(xlabel=f"log₁₀ λ, {_UNIT}", ylabel="images", title=f"distribution of λ ({(~positive).sum()} with λ = 0)")
    right.set(xlabel="margin of the logits, nats", ylabel=f"log₁₀ λ, {_UNIT}")
    right.set_title("confident predictions have a small λ")
    legend_below(figure, ncols=2)
    return figure


@style()
def bounds(values: Array, levels: Mapping[str, Array]) -> Figure:
    """Draw log10 of λ and of its bounds for each image, sorted by λ."""
    figure, ((axes,),) = panels(height=4.4)
    order = np.argsort(values, kind="stable")
    place = np.arange(1, len(order) + 1)
    for number, (name, label) in enumerate(_LEVELS.items(), 1):
        if np.isfinite(levels[name]).any():
            axes.plot(place, levels[name][order], label=label, **(look(number) | {"linestyle": "none"}))
    logs = np.log10(values[order], where=values[order] > 0, out=np.full(len(order), np.nan))
    axes.plot(place, logs, label="λ", **look(0))
    axes.set(xlabel="images, sorted by λ", ylabel=f"log₁₀ of λ and its bounds, {_UNIT}")
    legend_below(figure, ncols=2)
    return figure


@style()
def black_box(values: Array, estimates: Array, errors: Array) -> Figure:
    """Draw λ from queries, with two standard errors, against λ from derivatives, where both are positive."""
    figure, ((axes,),) = panels(height=5.0, width=5.4)
    drawn = (values > 0) & (estimates > 0)
    if drawn.any():
        ends = [values[drawn].min(), values[drawn].max()]
        axes.plot(ends, ends, color="black", linewidth=1, label="equal")
        axes.errorbar(
            values[drawn],
            estimates[drawn],
            2 * errors[drawn],
            fmt="o",
            color=COLOURS[0],
            elinewidth=0.8,
            label="± 2 standard errors",
        )
        axes.set(xscale="log", yscale="log")
        legend_below(figure)
    axes.set(xlabel=f"λ by derivatives, {_UNIT}", ylabel=f"λ by queries of the probabilities, {_UNIT}")
    return figure


def examples(images: Tensor, eigenvectors: Tensor, moved: Tensor, titles: Sequence[Sequence[str]]) -> Figure:
    """Draw one row per example: image, top eigenvector, and the image moved against and along it.

    Args:
        images: ``(S, C, H, W)`` in [0, 1].
        eigenvectors: ``(S, C, H, W)``; red is positive and blue is negative, or, in colours, grey is zero.
        moved: ``(2, S, C, H, W)`` in [0, 1].
        titles: Four texts for each example.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(WIDTH, 2.5 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 4, squeeze=False)
    for row, image, vector, pair, names in zip(grid, images, eigenvectors, moved.transpose(0, 1), titles, strict=True):
        for axes, picture in zip((row[0], row[2], row[3]), (image, *pair), strict=True):
            _show(axes, picture)
        limit = max(float(vector.abs().max()), 1e-30)
        if len(vector) == 3:
            _show(row[1], 0.5 + vector / (2 * limit))
        else:
            row[1].imshow(vector.sum(0).numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        for axes, name in zip(row, names, strict=True):
            axes.set_title(name, fontsize=9)
            axes.set_axis_off()
    return figure


def _show(axes: Axes, image: Tensor) -> None:
    """Draw ``(C, H, W)`` in colours if it has three channels, else the mean of its channels in grey."""
    if len(image) == 3:
        axes.imshow(image.movedim(0, 2).clamp(0, 1).numpy())
    else:
        axes.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
