"""Put a benchmark's numbers into a document: ``python -m recipes.performance_table benchmark.csv README.md``.

Replaces what stands between the lines ``<!-- performance -->`` and ``<!-- /performance -->``.

Leaves the rest of the document as it is. Takes a few seconds.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd

from recipes.benchmark.study import DEFAULT
from recipes.reporting.tables import markdown_table
from recipes.runtime.help import plain
from recipes.runtime.mistakes import end

PEERS = ("paper, white box", "curvlinops, eigsh", "plenoptic, power", "plenoptic, SVD")
_PLACE = re.compile(r"(?<=<!-- performance -->\n).*?(?=<!-- /performance -->)", re.DOTALL)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=plain(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", type=Path, help="benchmark.csv of recipes.benchmark")
    parser.add_argument("document", type=Path, help="the Markdown file to change")
    arguments = parser.parse_args()
    try:
        text = arguments.document.read_text(encoding="utf-8")
        changed = inserted(text, pd.read_csv(arguments.numbers))
    except (FileNotFoundError, ValueError) as error:
        end(str(error))
    arguments.document.write_text(changed, encoding="utf-8")


def inserted(text: str, rows: pd.DataFrame) -> str:
    """Return ``text`` with the table in its place.

    Raises:
        ValueError: If the text has not exactly one place for it.
    """
    result, count = _PLACE.subn(lambda _: as_markdown(rows) + "\n", text)
    if count != 1:
        raise ValueError(f"Expected one pair of the lines <!-- performance --> and <!-- /performance -->; got {count}.")
    return result


def as_markdown(rows: pd.DataFrame) -> str:
    """Return one line per case: our default, and how many times more images per second it does than each peer."""
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
