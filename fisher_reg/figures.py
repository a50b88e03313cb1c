"""Matplotlib figures from logged numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fisher_reg.style import COLOURS, legend_below, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY, _BLACK = COLOURS
_LEVELS = {
    "global": (_VERMILLION, "s-", "global upper bound"),
    "local": (_ORANGE, "D-", "local upper bound, mean of log"),
    "blockwise": (_PURPLE, "X--", "blockwise (not certified), mean of log"),
}
_CURVES = {"max": (_BLACK, "^-"), "p95": (_SKY, "v--"), "mean": (_BLUE, "o-"), "median": (_GREEN, "P:")}


def bound_versus_empirical(history: Sequence[Mapping[str, float]], *, prefix: str = "fisher") -> Figure:
    r"""Draw the estimate and its upper bounds during the training, on a logarithmic axis.

    The horizontal axis shows epochs, or optimiser steps if an epoch has several measurements.

    Args:
        history: One mapping per measurement, with ``epoch``, ``step`` and the keys that
            :class:`fisher_reg.FisherMonitor` logs. Values that are not finite are left out.
        prefix: The first part of these keys.

    Returns:
        A figure outside pyplot's state.

    Raises:
        ModuleNotFoundError: Without matplotlib.
        ValueError: For an empty history.
    """
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("There is nothing to draw: the history is empty. Has the monitor measured an epoch yet?")
    with style():
        figure, ((axes,),) = panels(height=5.0, width=6.4)
        unit, times = _times(history)
        _draw_bounds(axes, times, history, prefix)
        for name, (colour, line) in _CURVES.items():
            logs = [_log10(entry.get(f"{prefix}/lambda_max_{name}", math.nan)) for entry in history]
            axes.plot(times, logs, line, color=colour, label=rf"$\lambda_{{\max}}(F)$, {name}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(set(times)) == 1:
            axes.set_xlim(times[0] - 1, times[0] + 1)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        low, high = axes.get_ylim()
        if math.floor(high) > math.ceil(low):
            axes.yaxis.set_major_formatter(lambda value, position: f"$10^{{{value:g}}}$")
        else:  # the ticks lie between two powers of ten
            axes.yaxis.set_major_formatter(lambda value, position: f"{10**value:.3g}")
        axes.set(xlabel=unit, ylabel="nats per squared input unit", title="Fisher spectral norm: bound and estimate")
        legend_below(figure, ncols=2)
    return figure


def _draw_bounds(axes: Axes, times: list[float], history: Sequence[Mapping[str, float]], prefix: str) -> None:
    keys = dict.fromkeys(key for entry in history for key in entry)
    first = f"{prefix}/log10_bound_"
    levels = [key.removeprefix(first) for key in keys if key.startswith(first)]
    for level in levels:
        colour, line, name = _LEVELS.get(level, (_VERMILLION, "s-", f"{level} upper bound"))
        values = [entry.get(f"{first}{level}", math.nan) for entry in history]
        known = [(time, value) for time, value in zip(times, values, strict=True) if not math.isnan(value)]
        axes.plot([time for time, _ in known], [value for _, value in known], line, color=colour, label=name)


def _times(history: Sequence[Mapping[str, float]]) -> tuple[str, list[float]]:
    """Return the unit of the horizontal axis and the positions of the measurements."""
    epochs = [entry["epoch"] for entry in history]
    if len(set(epochs)) < len(epochs) and all("step" in entry for entry in history):
        return "optimiser step", [entry["step"] for entry in history]
    return "epoch", epochs


def sensitive_examples(
    images: Sequence[Tensor], eigenvectors: Sequence[Tensor], eigenvalues: Sequence[float]
) -> Figure:
    r"""Draw images next to their top eigenvectors, which change the prediction most.

    Args:
        images: Each ``(C, H, W)`` with one or three channels, on any scale; each is scaled to its own range.
        eigenvectors: Of the same shapes. The sum over the channels is drawn, on a colour scale that is symmetric about
            zero: negative entries are blue, positive entries red, and zero is white. The scale ends at the 99.5 %
            quantile of the absolute values.
        eigenvalues: :math:`\lambda` of each image, for the titles.

    Returns:
        A figure outside pyplot's state: a grid of pairs, up to four in a row, and fewer for wide images.

    Raises:
        ModuleNotFoundError: Without matplotlib.
        ValueError: If there are no images.
    """
    from matplotlib.figure import Figure

    if not images:
        raise ValueError("There is nothing to draw: give at least one image.")
    grid = _Grid.of(images)
    figure = Figure(figsize=(grid.width, grid.height))
    figure.text(0.5, 1 - _MARGIN / grid.height, "input and top eigenvector", ha="center", va="top", fontsize=9)
    axes = figure.add_axes((0, 0, 1, 1))  # one for all images, in inches: sixteen axes take three times as long
    for i, (image, vector, value) in enumerate(zip(images, eigenvectors, eigenvalues, strict=True)):
        signed = vector.double().sum(0)
        limit = max(float(signed.abs().flatten().kthvalue(math.ceil(_SHOWN_IN_FULL * signed.numel())).values), 1e-30)
        for place, shown, colours in (
            (0, _stretched(image), {"cmap": "gray"}),
            (1, signed, {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}),
        ):
            axes.imshow(shown.numpy(), aspect="auto", extent=grid.panel(i, place), **colours)
        axes.text(*grid.title(i), rf"$\lambda$ = {value:.3g}", ha="center", fontsize=8)
    axes.set(xlim=(0, grid.width), ylim=(0, grid.height))
    axes.set_axis_off()
    return figure


_PAIRS_PER_ROW = 4
_AREA = 1.3
"""Area of an image in square inches: four pairs of square images are then ten inches wide."""
_GAP, _MARGIN, _TITLE = 0.05, 0.18, 0.22
_MIN_WIDTH, _MAX_WIDTH = 2.4, 10.0
_LONGEST = 4.0
"""Largest aspect ratio that is kept; longer images, such as signals of one row, are stretched."""
_SHOWN_IN_FULL = 0.995
"""Quantile at which the colour scale ends: otherwise one large entry would make all others white."""


@dataclass(frozen=True)
class _Grid:
    """Positions of pairs of images in a figure, in inches."""

    image: tuple[float, float]
    num_rows: int
    num_columns: int

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> _Grid:
        """Return the grid for images of the shape of the first one."""
        ratio = min(max(images[0].shape[-1] / images[0].shape[-2], 1 / _LONGEST), _LONGEST)
        image = math.sqrt(_AREA * ratio), math.sqrt(_AREA / ratio)
        num_columns = min(len(images), _PAIRS_PER_ROW, max(1, int(_MAX_WIDTH / (2 * image[0]))))
        return cls(image, math.ceil(len(images) / num_columns), num_columns)

    @property
    def pair(self) -> float:
        return 2 * self.image[0] + _GAP

    @property
    def width(self) -> float:
        return max(self.num_columns * (self.pair + _MARGIN) + _MARGIN, _MIN_WIDTH)

    @property
    def height(self) -> float:
        return self.num_rows * (self.image[1] + _TITLE + _MARGIN) + _MARGIN + _TITLE

    def _corner(self, i: int) -> tuple[float, float]:
        row, column = divmod(i, self.num_columns)
        left = (self.width - self.num_columns * (self.pair + _MARGIN) + _MARGIN) / 2 + column * (self.pair + _MARGIN)
        return left, self.height - _TITLE - (row + 1) * (self.image[1] + _TITLE + _MARGIN)

    def panel(self, i: int, place: int) -> tuple[float, float, float, float]:
        """Return left, right, bottom and top of the image at ``place`` 0 or 1 of a pair."""
        left, bottom = self._corner(i)
        x = left + place * (self.image[0] + _GAP)
        return x, x + self.image[0], bottom, bottom + self.image[1]

    def title(self, i: int) -> tuple[float, float]:
        """Return the centre of the title, above the pair."""
        left, bottom = self._corner(i)
        return left + self.pair / 2, bottom + self.image[1] + _GAP


def _stretched(image: Tensor) -> Tensor:
    """Return an image ``(H, W, C)``, or ``(H, W)`` of one channel, in [0, 1]."""
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp_min(1e-30)).movedim(0, -1).squeeze(-1)


def _log10(value: float) -> float:
    return math.log10(value) if 0 < value < math.inf else math.nan
