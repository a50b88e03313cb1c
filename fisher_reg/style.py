"""The style of the figures: a palette for colour-blind readers, one text size, legends outside the data.

Public: figures of other numbers in the same style.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

__all__ = [
    "COLOURS",
    "FILLS",
    "HIGHLIGHT",
    "LINES",
    "MARKERS",
    "WIDTH",
    "legend_below",
    "legend_beside",
    "legend_under",
    "look",
    "panels",
    "plain_ticks",
    "style",
]

WIDTH = 8.0
"""Width of a figure in inches; its text is readable on a page of 800 pixels."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of Okabe and Ito (2008), "Color Universal Design": distinct under every common colour vision deficiency.

Their yellow is left out, because thin yellow lines are hard to see on white.
"""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
LINES = ("-", "--", "-.", ":")
FILLS = ("full", "none", "left", "top")
"""Fill styles of markers: a second distinction, which is also visible in grey."""

HIGHLIGHT: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 1.6, "markersize": 9, "zorder": 5}
"""Style of a marker for the method that a reader should look at first."""

_TEXT = 9  # points: 12 pixels on a page of 800
_SETTINGS: Any = {
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
    """Context manager, or decorator of a function, in which matplotlib draws in this style.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    from matplotlib import rc_context

    with rc_context(_SETTINGS):
        yield


@style()
def panels(
    num_rows: int = 1, num_columns: int = 1, *, height: float, width: float = WIDTH, **options: Any
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """Return a figure outside pyplot's state, and its panels with a pale grid.

    Args:
        num_rows: Number of rows of panels.
        num_columns: Number of columns of panels.
        height: Height of the figure in inches.
        width: Width of the figure in inches.
        options: Options of :meth:`matplotlib.figure.Figure.subplots`, such as ``sharex`` and ``width_ratios``.

    Returns:
        The figure, and the axes ``(num_rows, num_columns)``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, **options)
    for axes in grid.flat:  # ticks are created when the figure is drawn, possibly outside the style
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=_TEXT)
    return figure, grid


def look(number: int) -> dict[str, Any]:
    """Return colour, marker and line of the n-th series of a figure, from 0: the first 70 differ in colour or marker.

    Marker and line distinguish the series in grey.

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
    """Put a legend below all panels, outside the data, in a figure with the layout ``constrained``.

    Args:
        figure: The figure.
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


def legend_under(axes: Axes, handles: Iterable[Any] | None = None, *, ncols: int = 1) -> Legend:
    """Put the legend of one panel under it, outside the data.

    Args:
        axes: The panel.
        handles: Artists with labels; by default its own.
        ncols: Entries in a line.

    Returns:
        The legend.
    """
    given = {} if handles is None else {"handles": list(handles)}
    return axes.legend(loc="upper center", bbox_to_anchor=(0.5, _BELOW_LABELS), ncols=ncols, **given)


def legend_beside(axes: Axes, handles: Iterable[Any] | None = None) -> Legend:
    """Put the legend of one panel on its right, outside the data.

    Args:
        axes: The panel.
        handles: Artists with labels; by default its own.

    Returns:
        The legend.
    """
    given = {} if handles is None else {"handles": list(handles)}
    return axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), **given)


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis over at most three powers of ten with plain numbers: 0.1, 0.2, 0.5, 1.

    Args:
        axis: ``xaxis`` or ``yaxis`` of a panel.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


_BELOW_LABELS = -0.2
"""Lower end of the labels of the horizontal axis, in heights of a panel."""
