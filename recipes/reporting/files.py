"""Write the result files of a study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console

from recipes.reporting.records import without_folders
from recipes.runtime.provenance import provenance
from recipes.runtime.settings import resolved

DOTS_PER_INCH = 150


def write(
    folder: Path,
    stem: str,
    config: DictConfig | Mapping[str, Any],
    *,
    rows: pd.DataFrame | None = None,
    record: dict[str, Any] | None = None,
    page: str | None = None,
    figure: Figure | None = None,
    digits: int = 4,
) -> None:
    """Write those of ``stem.csv``, ``stem.json``, ``stem.md`` and ``stem.png`` whose content is given.

    Args:
        folder: The folder; it is created if it does not exist.
        stem: The name of the files without the extension.
        config: The configuration; its :func:`~recipes.runtime.provenance.provenance` is added to the record.
        rows: The table, written without its index.
        record: Values that JSON can represent; a ``provenance`` of its own is kept.
        page: The text in Markdown.
        figure: The figure.
        digits: The number of significant digits in the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        rows.to_csv(folder / f"{stem}.csv", index=False, float_format=f"%.{digits}g")
    if record is not None:
        made = {"provenance": record.get("provenance") or provenance(config)}
        text = json.dumps(record | made, indent=2)
        (folder / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    if page is not None:
        (folder / f"{stem}.md").write_text(page, encoding="utf-8")
    if figure is not None:
        figure.savefig(folder / f"{stem}.png", dpi=DOTS_PER_INCH)


def settings_of(config: DictConfig) -> Any:
    """Return a configuration that JSON can represent, with file names instead of paths."""
    return without_folders(resolved(config))


def show(text: str, folder: Path) -> None:
    """Print a text without markup, and the folder of the files."""
    Console().print(f"{text}\nFiles: {folder}", soft_wrap=True, highlight=False, markup=False)
