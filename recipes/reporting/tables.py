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
        frame: Text is shown as it is, numbers with three digits, and what is missing as a dash.
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
    """Return what a cell shows."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _line(cells: tuple[object, ...]) -> str:
    texts = [text_of(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(texts)} |"
