"""Write the numbers of a benchmark into a document: ``python -m recipes.performance_table benchmark.csv README.md``.

Replaces the text between the lines ``<!-- performance -->`` and ``<!-- /performance -->``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd

from recipes.benchmark.study import DEFAULT
from recipes.reporting.tables import markdown_table

PEERS = ("paper, white box", "curvlinops, eigsh", "plenoptic, power", "plenoptic, SVD")
_PLACE = re.compile(r"(?<=<!-- performance -->\n).*?(?=<!-- /performance -->)", re.DOTALL)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=Path, help="benchmark.csv of recipes.benchmark")
    parser.add_argument("document", type=Path, help="the Markdown file to change")
    arguments = parser.parse_args()
    text = arguments.document.read_text(encoding="utf-8")
    arguments.document.write_text(inserted(text, pd.read_csv(arguments.numbers)), encoding="utf-8")


def inserted(text: str, rows: pd.DataFrame) -> str:
    """Return ``text`` with the table in its place.

    Raises:
        ValueError: If the text does not have exactly one place for it.
    """
    result, count = _PLACE.subn(lambda _: as_markdown(rows) + "\n", text)
    if count != 1:
        raise ValueError(f"Expected one pair of the lines <!-- performance --> and <!-- /performance -->; got {count}.")
    return result


def as_markdown(rows: pd.DataFrame) -> str:
    """Return one line per case: the default estimate, and its speed relative to each other implementation."""
    peers = [name for name in PEERS if name in set(rows.method)]
    head = ["network", "K", "images/s", "forwards", "median, p95 error", "memory", *(f"× {name}" for name in peers)]
    lines = []
    for case, some in rows.groupby("case", sort=False):
        methods = some.set_index("method")
        ours = methods.loc[DEFAULT]
        cells = [
            str(case),
            str(ours.num_classes),
            f"{ours.images_per_second:.0f}",
            f"{ours.forwards:.1f}",
            f"{ours.median_error:.0e}, {ours.p95_error:.0e}",
            f"{ours.memory_ratio:.2f}",
        ]
        for name in peers:
            peer = methods.loc[name]
            cells.append(f"{ours.images_per_second / peer.images_per_second:.0f} ({peer.p95_error:.0e})")
        lines.append(cells)
    return markdown_table(pd.DataFrame(lines, columns=head))


if __name__ == "__main__":
    main()
