import json
import math

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console

from recipes.reporting.files import settings_of, write
from recipes.reporting.tables import markdown_table, print_table

FRAME = pd.DataFrame({"name": ["a | b", None], "num_runs": [3, 40000], "value": [1.23456, math.nan]})


def test_a_markdown_table_has_three_digits_and_dashes_and_escapes_bars():
    assert markdown_table(FRAME).splitlines() == [
        "| name | num_runs | value |",
        "|---|---|---|",
        "| a \\| b | 3 | 1.23 |",
        "| – | 40000 | – |",
    ]
    assert markdown_table(FRAME, is_right=True).splitlines()[1] == "|---|---:|---:|"


def test_a_printed_table_shows_the_same_cells():
    console = Console(width=60, record=True, file=None, quiet=False)
    with console.capture() as captured:
        print_table(console, "the title", FRAME)
    text = captured.get()
    for part in ("the title", "a | b", "40000", "1.23", "–"):
        assert part in text


def test_only_the_files_that_are_given_are_written(tmp_path):
    folder = tmp_path / "new"
    write(folder, "one", {"seed": 3}, rows=FRAME, page="# ü\n", record={"a": 1})
    assert sorted(path.name for path in folder.iterdir()) == ["one.csv", "one.json", "one.md"]
    assert (folder / "one.csv").read_text().splitlines()[1] == "a | b,3,1.235"
    record = json.loads((folder / "one.json").read_text())
    assert record["a"] == 1
    assert record["provenance"]["seed"] == 3
    write(folder, "two", {}, figure=Figure())
    assert (folder / "two.png").read_bytes().startswith(b"\x89PNG")


def test_settings_name_files_without_their_folders():
    config = OmegaConf.create({"root": "data/mnist", "seed": 0})
    assert settings_of(config) == {"root": "mnist", "seed": 0}
