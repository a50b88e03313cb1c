"""How figures look: one palette that colour-blind readers can tell apart, one size of text, legends outside the data.

Public: figures of other numbers in the same style.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

__all__ = ["COLOURS", "HIGHLIGHT", "LINES", "MARKERS", "WIDTH", "legend_below", "look", "panels", "style"]

WIDTH = 8.0
"""Of a figure, in inches: at 120 dots per inch 960 pixels, which a page of 800 pixels shows without loss."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito (2008), "Color Universal Design": told apart under every common colour vision deficiency.

Their yellow is left out: thin lines of it cannot be seen on white.
"""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
LINES = ("-", "--", "-.", ":")

HIGHLIGHT: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 1.6, "markersize": 9, "zorder": 5}
"""Of a marker: the method that a reader should look at first."""

_TEXT = 9  # points: 12 pixels on a page of 800
_SETTINGS: dict[str, Any] = {
    "font.size": _TEXT,
    "axes.titlesize": _TEXT + 1,
    "axes.labelsize": _TEXT,
    "legend.fontsize": _TEXT,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
}


@contextmanager
def style() -> Generator[None, None, None]:
    """Let matplotlib draw in this style while the context is open; also a decorator of a function that draws.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    from matplotlib import rc_context

    with rc_context(_SETTINGS):
        yield


@style()
def panels(
    num_rows: int = 1, num_columns: int = 1, *, height: float, width: float = WIDTH, **options: Any
) -> tuple[Figure, np.ndarray[Any, np.dtype[np.object_]]]:
    """Return a figure that belongs to no pyplot state, and its panels with a pale grid.

    Args:
        num_rows: Of panels.
        num_columns: Of panels.
        height: Of the figure, in inches.
        width: Of the figure, in inches.
        options: Of :meth:`matplotlib.figure.Figure.subplots`: ``sharex``, ``width_ratios``, ….

    Returns:
        The figure, and the axes ``(num_rows, num_columns)``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, **options)
    for axes in grid.flat:  # ticks are made when a figure is drawn, which may be outside the style
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=_TEXT)
    return figure, grid


def look(number: int) -> dict[str, Any]:
    """Return colour, marker and line of the n-th series of a figure, from 0: the first 70 differ in colour or marker.

    The marker and the line are what is left of a series in grey.

    Example:
        >>> look(1)
        {'color': '#D55E00', 'marker': 's', 'linestyle': '--'}
    """
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number % len(LINES)],
    }


def legend_below(figure: Figure, handles: Iterable[Any] | None = None, *, ncols: int = 4) -> Legend:
    """Put a legend below all panels, outside the data; for figures of the layout ``constrained``.

    Args:
        figure: It gets the legend.
        handles: Artists with labels; by default those of all panels, each label once.
        ncols: Entries in a line.

    Returns:
        The legend.
    """
    if handles is None:
        found = [axes.get_legend_handles_labels() for axes in figure.axes]
        labelled = {label: handle for some, labels in found for handle, label in zip(some, labels, strict=True)}
        return figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=ncols)
    return figure.legend(handles=list(handles), loc="outside lower center", ncols=ncols)
