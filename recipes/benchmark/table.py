"""The table of a benchmark: the default estimate, and how it compares with other packages."""

from __future__ import annotations

import pandas as pd

from recipes.benchmark.study import DEFAULT
from recipes.reporting.tables import markdown_table

PEERS = ("paper, white box", "curvlinops, eigsh", "plenoptic, power", "plenoptic, SVD")


def performance(rows: pd.DataFrame) -> str:
    """Return a Markdown table: a row per network, a column per package with the ratio of images per second.

    Args:
        rows: Of ``benchmark.csv``.
    """
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
