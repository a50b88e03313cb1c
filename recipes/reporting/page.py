"""One self-contained HTML page from texts, tables and figures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from recipes.reporting.files import DOTS_PER_INCH

_PROSE = 36  # a cell with more characters is prose


@dataclass(frozen=True)
class Section:
    """A section of the page; all fields except the title are optional.

    Attributes:
        title: The heading.
        paragraphs: The text before table and figure.
        items: A list after the table.
        table: A table, shown without its index and with four digits.
        figure: A figure, embedded in the page.
        caption: The text below the figure.
        signatures: Roles and names, with lines for date and signature. Without a name there is also a line for it.
    """

    title: str
    paragraphs: Sequence[str] = ()
    table: pd.DataFrame | None = None
    figure: Figure | None = None
    caption: str = ""
    items: Sequence[str] = ()
    signatures: Sequence[tuple[str, str | None]] = ()


def render(title: str, paragraphs: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the page as HTML, which needs no other file and no network."""
    environment = Environment(
        loader=PackageLoader("recipes.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["table"] = _table
    environment.filters["image"] = _image
    return environment.get_template("page.html").render(title=title, paragraphs=paragraphs, sections=sections)


@dataclass(frozen=True)
class _Table:
    """The cells of a table as texts; a column with a long text is prose, whose lines are wrapped."""

    columns: list[str]
    rows: list[list[str]]
    is_prose: list[bool]


def _table(frame: pd.DataFrame) -> _Table:
    rows = [[_text(cell) for cell in row] for row in frame.itertuples(index=False, name=None)]
    is_prose = [any(len(row[place]) > _PROSE for row in rows) for place in range(len(frame.columns))]
    return _Table([str(name) for name in frame.columns], rows, is_prose)


def _text(cell: object) -> str:
    if cell is None or cell is pd.NA or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return base64.b64encode(buffer.getvalue()).decode()
