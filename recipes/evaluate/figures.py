"""The figures of an audit, from arrays of one number per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from recipes.competitors.measurement import SATURATED

Array = np.ndarray[Any, Any]

_GROUPS = {f"confidence up to {SATURATED}": ("tab:blue", False), f"saturated: above {SATURATED}": ("tab:orange", True)}
_LEVELS = {
    "log10_global": ("global bound, certified for every input", "tab:red"),
    "log10_local": ("local bound, certified at the image", "tab:orange"),
    "log10_blockwise": ("blockwise bound, not certified", "tab:purple"),
}


def distribution(values: Array, margins: Array, is_saturated: Array) -> Figure:
    """Draw the histogram of log10 λ, and λ over the margin of the logits; λ = 0 is counted, not drawn."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    positive = values > 0
    logs = np.log10(values, where=positive, out=np.full_like(values, np.nan))
    groups = {name: positive & (is_saturated == wanted) for name, (_, wanted) in _GROUPS.items()}
    colours = [colour for colour, _ in _GROUPS.values()]
    if positive.any():
        left.hist([logs[group] for group in groups.values()], 20, stacked=True, color=colours, label=list(groups))
    for (name, group), colour in zip(groups.items(), colours, strict=True):
        right.plot(margins[group], logs[group], ".", color=colour, label=name)
    left.set(
        xlabel="log₁₀ λ, nats / pixel²", ylabel="images", title=f"distribution of λ ({(~positive).sum()} with λ = 0)"
    )
    right.set(xlabel="margin of the logits, nats", ylabel="log₁₀ λ", title="confident predictions have a small λ")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def bounds(values: Array, levels: Mapping[str, Array]) -> Figure:
    """Draw λ and the decimal logarithms of the bounds over the images, in the order of λ."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    order = np.argsort(values, kind="stable")
    place = np.arange(1, len(order) + 1)
    for name, (label, colour) in _LEVELS.items():
        if np.isfinite(levels[name]).any():
            axes.plot(place, levels[name][order], ".", color=colour, label=label)
    logs = np.log10(values[order], where=values[order] > 0, out=np.full(len(order), np.nan))
    axes.plot(place, logs, ".-", color="tab:blue", label="λ")
    axes.set(xlabel="images, in the order of λ", ylabel="log₁₀, nats / pixel²")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def black_box(values: Array, estimates: Array, errors: Array) -> Figure:
    """Draw the estimate from queries, with two standard errors, over that from derivatives; where both are positive."""
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    drawn = (values > 0) & (estimates > 0)
    if drawn.any():
        ends = [values[drawn].min(), values[drawn].max()]
        axes.plot(ends, ends, color="black", linewidth=1, label="equal")
        axes.errorbar(
            values[drawn], estimates[drawn], 2 * errors[drawn], fmt=".", elinewidth=0.8, label="± 2 standard errors"
        )
        axes.set(xscale="log", yscale="log")
        axes.legend(frameon=False)
    axes.set(xlabel="λ by derivatives, nats / pixel²", ylabel="λ by queries of the probabilities")
    axes.grid(alpha=0.3)
    return figure


def examples(images: Tensor, eigenvectors: Tensor, moved: Tensor, titles: Sequence[Sequence[str]]) -> Figure:
    """Draw one row per example: image, top eigenvector, and the image moved against and along it.

    Args:
        images: ``(S, C, H, W)`` in [0, 1].
        eigenvectors: ``(S, C, H, W)``; their signs show, red above and blue below zero, or colours around grey.
        moved: ``(2, S, C, H, W)`` in [0, 1].
        titles: Four for each example.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(10, 2.9 * len(images)), layout="constrained")
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
