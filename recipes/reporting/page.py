"""One self-contained HTML page from texts, tables and figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from recipes.reporting.files import DOTS_PER_INCH


@dataclass(frozen=True)
class Section:
    """A part of the page: any of its fields may be left out.

    Attributes:
        title: Heading.
        paragraphs: Text before table and figure.
        table: Shown without its index; text as it is, numbers with four digits.
        figure: Drawn into the page.
        caption: Below the figure.
    """

    title: str
    paragraphs: Sequence[str] = ()
    table: pd.DataFrame | None = None
    figure: Figure | None = None
    caption: str = ""


def render(title: str, paragraphs: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the page; it needs no other file and no network."""
    environment = Environment(
        loader=PackageLoader("recipes.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["table"] = _table
    environment.filters["image"] = _image
    return environment.get_template("page.html").render(title=title, paragraphs=paragraphs, sections=sections)


def _table(frame: pd.DataFrame) -> str:
    return str(frame.to_html(index=False, border=0, float_format="{:.4g}".format, na_rep="–"))  # which escapes


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return base64.b64encode(buffer.getvalue()).decode()
