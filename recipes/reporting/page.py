"""One self-contained HTML page from texts, tables and figures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jinja2 import Environment
from matplotlib.figure import Figure


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
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["table"] = _table
    environment.filters["image"] = _image
    return environment.from_string(_TEMPLATE).render(title=title, paragraphs=paragraphs, sections=sections)


def markdown_table(frame: pd.DataFrame) -> str:
    """Return the rows of a frame as a Markdown table: text as it is, numbers with three digits."""
    lines = [list(frame.columns), ["---", *["---:"] * (len(frame.columns) - 1)]]
    lines += [[_text(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3g}"
    return str(value)


def _table(frame: pd.DataFrame) -> str:
    return frame.to_html(index=False, border=0, float_format="{:.4g}".format, na_rep="–")  # which escapes


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return base64.b64encode(buffer.getvalue()).decode()


_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d0d7de; }
p { max-width: 50rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #eaeef2; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
figcaption { color: #57606a; font-size: 0.9rem; max-width: 50rem; }
figure { margin: 1rem 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for text in paragraphs %}
<p>{{ text }}</p>
{% endfor %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for text in section.paragraphs %}
<p>{{ text }}</p>
{% endfor %}
{% if section.table is not none %}
<div class="wide">{{ section.table | table | safe }}</div>
{% endif %}
{% if section.figure is not none %}
<figure>
<img src="data:image/png;base64,{{ section.figure | image }}" alt="{{ section.caption or section.title }}">
<figcaption>{{ section.caption }}</figcaption>
</figure>
{% endif %}
{% endfor %}
</body>
</html>
"""
