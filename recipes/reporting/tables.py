"""Tables of numbers and text: in Markdown, and on the terminal."""

from __future__ import annotations

import math

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def markdown_table(frame: pd.DataFrame, *, is_right: bool = False) -> str:
    """Return the rows of a frame as a Markdown table, without its index.

    Args:
        frame: The table. Numbers are shown with three digits, and missing values as a dash.
        is_right: Whether the columns after the first are aligned to the right.
    """
    rules = ["---", *["---:" if is_right else "---"] * (len(frame.columns) - 1)]
    lines = [_line(frame.columns), f"|{'|'.join(rules)}|"]
    return "\n".join(lines + [_line(row) for row in frame.itertuples(index=False, name=None)])


def print_table(console: Console, title: str, frame: pd.DataFrame, *, num_left: int = 1) -> None:
    """Print the rows of a frame; the first ``num_left`` columns are left-aligned and stay on one line."""
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for place, name in enumerate(frame.columns):
        is_left = place < num_left
        title = str(name).replace("_", "\n")
        table.add_column(title, justify="left" if is_left else "right", no_wrap=is_left, overflow="fold")
    for row in frame.itertuples(index=False, name=None):
        table.add_row(*map(text_of, row))
    console.print(table)


def text_of(value: object) -> str:
    """Return the text of a cell."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def with_error(mean: float, error: float) -> str:
    """Return ``mean ± error``: the error with one significant digit, and the mean rounded to the same place.

    An error of 0.01 or more whose first digit is 1 has two digits, because rounding to one digit could change it
    by up to a third. Without an error (NaN, for example for a single value) the result is the mean with three digits.

    Example:
        >>> [with_error(78.12, 12.4), with_error(0.5663, 0.0049), with_error(9.51, math.nan), with_error(24.0, 0.0)]
        ['78 ± 12', '0.566 ± 0.005', '9.51', '24.0 ± 0']
    """
    if math.isnan(mean) or math.isnan(error):
        return text_of(mean) if math.isnan(mean) else _significant(mean)
    if error <= _ROUND_OFF * abs(mean):
        return f"{_significant(mean)} ± 0"
    rounded = f"{error:.1e}"  # 0.0996 has the digits of 0.10
    exponent = int(rounded.partition("e")[2])
    places = max(0, int(rounded[0] == "1" and exponent >= -2) - exponent)
    return f"{mean:.{places}f} ± {error:.{places}f}"


def radius_text(radius: float) -> str:
    """Return a length in pixel units as papers write it: ``8/255`` for a small multiple of 1/255.

    Example:
        >>> [radius_text(8 / 255), radius_text(0.0156863), radius_text(0.25)]
        ['8/255', '4/255', '0.25']
    """
    levels = round(255 * radius)
    is_multiple = 1 <= levels <= _MOST_LEVELS and math.isclose(255 * radius, levels, rel_tol=1e-4)
    return f"{levels}/255" if is_multiple else f"{radius:.3g}"


def baseline_first(frame: pd.DataFrame, baseline: str, keys: list[str], column: str = "method") -> pd.DataFrame:
    """Return the rows sorted by ``keys``, with the baseline before other methods; ``column`` is one of the keys."""
    order = frame.assign(_is_other=frame[column] != baseline)
    before = keys[: keys.index(column)]
    ordered = order.sort_values([*before, "_is_other", *keys[len(before) :]], kind="stable", ignore_index=True)
    return ordered.drop(columns="_is_other")


_ROUND_OFF = 1e-9
_MOST_LEVELS = 32
"""Largest numerator of a fraction; 0.2, which is often a weight, would be 51/255."""


def _significant(value: float) -> str:
    """Return three significant digits, without an exponent for ordinary sizes."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:.{max(0, 2 - exponent)}f}" if -4 <= exponent < 6 else f"{value:.3g}"


def _line(cells: tuple[object, ...]) -> str:
    texts = [text_of(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(texts)} |"
