"""Figures from numbers: what was logged goes in, a matplotlib figure comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_LEVELS = {
    "global": ("tab:red", "s-", "global upper bound"),
    "local": ("tab:orange", "s-", "local upper bound, mean of log"),
    "blockwise": ("tab:purple", "s--", "blockwise (not certified), mean of log"),
}


def bound_versus_empirical(history: Sequence[Mapping[str, float]], *, prefix: str = "fisher") -> Figure:
    r"""Draw the estimate and the bounds above it over the epochs, on a logarithmic axis.

    Args:
        history: One mapping per measurement, with ``epoch`` and the keys that
            :class:`fisher_reg.FisherMonitor` logs. Values that are not finite are left out.
        prefix: First part of these keys.

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
    first = f"{prefix}/log10_bound_"
    levels = [key.removeprefix(first) for key in keys if key.startswith(first)]
    for level in levels:
        colour, line, name = _LEVELS.get(level, ("tab:red", "s-", f"{level} upper bound"))
        values = series(f"{first}{level}")
        known = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if not math.isnan(value)]
        axes.plot([epoch for epoch, _ in known], [value for _, value in known], line, color=colour, label=name)
    curves = {"max": "tab:blue", "p95": "tab:cyan", "mean": "tab:green", "median": "tab:olive"}
    for name, colour in curves.items():
        decades = [_log10(value) for value in series(f"{prefix}/lambda_max_{name}")]
        axes.plot(epochs, decades, "o-", color=colour, markersize=4, label=rf"$\lambda_{{\max}}(F)$, {name}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_formatter(lambda value, position: f"$10^{{{value:g}}}$")
    axes.set(xlabel="epoch", ylabel="nats per squared input unit", title="Fisher spectral norm: bound and estimate")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def sensitive_examples(
    images: Sequence[Tensor], eigenvectors: Sequence[Tensor], eigenvalues: Sequence[float]
) -> Figure:
    r"""Draw images with their top eigenvectors beside them: where, and how, the prediction is moved most.

    Args:
        images: Each ``(C, H, W)`` with one or three channels, on any scale; each is stretched to its own range.
        eigenvectors: Of the same shapes. Drawn as the sum over the channels, blue below zero and red above.
        eigenvalues: :math:`\lambda` of each, for the titles.

    Returns:
        A figure that belongs to no pyplot state: one pair per example, four pairs in a row.

    Raises:
        ModuleNotFoundError: Without matplotlib.
        ValueError: Without images.
    """
    from matplotlib.figure import Figure

    if not images:
        raise ValueError("There is nothing to draw: give at least one image.")
    num_rows = math.ceil(len(images) / _PAIRS_PER_ROW)
    num_pairs = min(len(images), _PAIRS_PER_ROW)
    figure = Figure(figsize=(2.4 * num_pairs, 1.5 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, 2 * num_pairs, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for i, (image, vector, value) in enumerate(zip(images, eigenvectors, eigenvalues, strict=True)):
        shown, signed = _stretched(image), vector.double().sum(0)
        largest = max(float(signed.abs().max()), 1e-30)
        axes[2 * i].imshow(shown.squeeze(-1), cmap="gray")
        axes[2 * i].set_title(rf"$\lambda$ = {value:.3g}", fontsize=8)
        axes[2 * i + 1].imshow(signed, cmap="seismic", vmin=-largest, vmax=largest)
    return figure


_PAIRS_PER_ROW = 4


def _stretched(image: Tensor) -> Tensor:
    """Return an image ``(H, W, C)`` in [0, 1]."""
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp_min(1e-30)).movedim(0, -1)


def _log10(value: float) -> float:
    return math.log10(value) if 0 < value < math.inf else math.nan
