"""The tables of the README are those of the kept files."""

from pathlib import Path

import pandas as pd
import pytest

from recipes import penalty_cost, penalty_scale
from recipes.compare.report import short_markdown
from recipes.penalties.report import markdown
from recipes.penalties.report import summarize as over_seeds

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes" / "results"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("penalty_cost.csv", penalty_cost.markdown),
        ("penalties_frontier_vgg.csv", lambda frame: markdown(over_seeds(frame))),
        ("penalties_frontier_resnet.csv", lambda frame: markdown(over_seeds(frame))),
        ("penalty_scale_digits.csv", penalty_scale.markdown),
    ],
)
def test_the_table_is_that_of_its_file(name, table):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    frame = pd.read_csv(RESULTS / name)
    assert table(frame).strip() in readme


def test_the_table_of_the_comparison_is_that_of_its_files():
    names = ("per_example", "per_model", "networks")
    frames = [pd.read_csv(RESULTS / "compare" / f"{name}.csv") for name in names]
    assert short_markdown(*frames) in (ROOT / "README.md").read_text(encoding="utf-8")
