"""Figures and tables are made anew from what is kept, and are what is kept."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from recipes.redraw import PARTS, redraw

RESULTS = Path(__file__).parents[2] / "recipes" / "results"
NUMBERS = (".csv", ".json", ".gz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The kept results but for the comparison, without pages, with an empty file in place of each figure."""
    folder = tmp_path_factory.mktemp("kept")
    for path in RESULTS.iterdir():
        if path.suffix in NUMBERS:
            shutil.copy(path, folder)
        elif path.suffix == ".png":
            (folder / path.name).touch()
    assert redraw(folder) == {"compare": "examples.csv.gz"}
    return folder


def test_every_kept_figure_is_drawn_as_wide_as_a_page(folder):
    figures = sorted(path.name for path in RESULTS.glob("*.png"))
    assert len(figures) >= 8
    for name in figures:
        with Image.open(folder / name) as image, Image.open(RESULTS / name) as kept:
            assert image.size == kept.size
            assert 900 <= image.width <= 1200


def test_the_kept_tables_are_those_of_the_kept_numbers(folder):
    pages = sorted(path.name for path in folder.glob("*.md"))
    assert "penalties_vgg.md" in pages
    assert "penalty_scale_digits.md" in pages
    for name in pages:
        assert (folder / name).read_text(encoding="utf-8") == (RESULTS / name).read_text(encoding="utf-8"), name


def test_a_record_keeps_where_its_numbers_come_from(folder):
    new, kept = (json.loads((path / "theory.json").read_text()) for path in (folder, RESULTS))
    assert new["provenance"] == kept["provenance"]
    assert new == kept


def test_no_table_has_an_error_that_is_no_number():
    for path in RESULTS.glob("pen*.md"):
        text = path.read_text(encoding="utf-8")
        assert "± nan" not in text
        assert "e+" not in text
        assert " 0.0156863 " not in text


def test_what_is_missing_is_told_and_nothing_at_all_is_a_mistake(tmp_path, capsys):
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "unknown.csv")
    with pytest.raises(FileNotFoundError, match=r"has nothing to draw.*benchmark\.csv.*Give the folder"):
        redraw(tmp_path)
    shutil.copy(RESULTS / "benchmark.csv", tmp_path)
    missing = redraw(tmp_path)
    assert set(missing) == set(PARTS) - {"benchmark"}
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    assert "rank: left out, there is no rank.csv" in capsys.readouterr().out
