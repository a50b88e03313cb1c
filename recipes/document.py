"""Write the tables of the documents from the files of results: ``python -m recipes.document``.

Writes into ``README.md`` and ``recipes/results/README.md`` of a clone, between the lines ``<!-- name -->`` and
``<!-- /name -->`` for each name in :data:`TABLES`. Takes a few seconds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from recipes import penalty_cost, penalty_scale
from recipes.benchmark.table import performance
from recipes.compare.report import short_markdown
from recipes.penalties import report as penalties
from recipes.reference import study as reference
from recipes.reporting.tables import markdown_table
from recipes.runtime.help import plain

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"
DOCUMENTS = (ROOT / "README.md", RESULTS / "README.md")
_STEPS = {
    "plain product": "all off: product of the norms of the layers",
    "batch norm folded": "`folded`: batch norm in the layer before it",
    "head with softmax": "`head`: last layer with the softmax",
    "diagonals merged": "`merged`: other diagonal maps in the layer after them",
    "dense matrices": "`dense`: small convolutions by their matrix (the default)",
    "balanced": "`balancing_steps=100`: diagonal scaling of hidden channels",
    "blocks averaged": "`averaged`: blocks with the mean slope of their activation",
}


def main() -> None:
    """Read the command line."""
    argparse.ArgumentParser(
        description=plain(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for path in DOCUMENTS:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


def updated(text: str) -> str:
    """Return a document with its tables written anew.

    Raises:
        ValueError: For the name of a table that is not known.
    """
    return re.sub(r"<!-- (\w[\w ]*) -->\n.*?<!-- /\1 -->", _block, text, flags=re.DOTALL)


def _block(match: re.Match[str]) -> str:
    name = match[1]
    if name not in TABLES:
        raise ValueError(f"There is no table {name!r} for a document; there are {', '.join(TABLES)}.")
    return f"<!-- {name} -->\n{TABLES[name]().strip()}\n<!-- /{name} -->"


def _read(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / name)


def _compare() -> str:
    return short_markdown(*(_read(f"compare/{name}.csv") for name in ("per_example", "per_model", "networks")))


def _penalties() -> str:
    names = ("penalties_frontier_vgg.csv", "penalties_frontier_resnet.csv")
    return "\n".join(penalties.markdown(penalties.summarize(_read(name))) for name in names)


def _reference() -> str:
    examples, radii = reference.read(RESULTS / "compare", ["auto_attack_near", "auto_attack"])
    table = reference.short_table(examples, radii)
    return markdown_table(table.drop(columns="λ: robust, ℓ₂ 0.25"))


def _tightness() -> str:
    rows = _read("tightness.csv")
    bounds = rows[rows.level == "global"].pivot(index="step", columns="network", values="log10_bound")
    largest = rows.groupby("network").log10_lambda_max.first()
    networks = list(rows.network.unique())
    lines = [[title, *(f"{bounds.loc[step, name]:.2f}" for name in networks)] for step, title in _STEPS.items()]
    lines.append(["λ, largest of the images", *(f"{largest[name]:.2f}" for name in networks)])
    return markdown_table(pd.DataFrame(lines, columns=["`Tightening(…)`", *networks]))


TABLES: dict[str, Callable[[], str]] = {
    "performance": lambda: performance(_read("benchmark.csv")),
    "compare": _compare,
    "penalty cost": lambda: penalty_cost.markdown(_read("penalty_cost.csv")),
    "penalties": _penalties,
    "penalty scale": lambda: penalty_scale.markdown(_read("penalty_scale_digits.csv")),
    "reference": _reference,
    "tightness": _tightness,
}
"""Markdown by the name of the place."""

if __name__ == "__main__":
    main()
