import json

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from recipes.summarize import SHOWN, as_markdown, read_runs


def _write(folder, seed, weight, value):
    folder.mkdir(parents=True)
    summary = {
        "model": "vgg",
        "data": "Digits",
        "penalty": "KLPenalty",
        "penalty_weight": weight,
        "seed": seed,
    } | dict.fromkeys(SHOWN, value)
    (folder / "summary.json").write_text(json.dumps(summary))


def test_rows_are_runs_and_the_table_has_means_and_standard_errors(tmp_path):
    for seed, value in enumerate((1.0, 2.0, 3.0)):
        _write(tmp_path / f"{seed}", seed, 0.0, value)
    _write(tmp_path / "deep" / "er", 0, 0.5, 9.0)
    runs = read_runs(tmp_path)
    assert len(runs) == 4
    header, _, plain, penalised = as_markdown(runs).splitlines()
    assert header.count("|") == plain.count("|")
    assert "| 0.0 | 3 | 2.0 ± 0.6 |" in plain  # the standard deviation 1 over the root of 3
    assert "| 0.5 | 1 | 9.00 | 9.00 |" in penalised
    runs.to_csv(tmp_path / "a.csv", index=False)
    assert_frame_equal(pd.read_csv(tmp_path / "a.csv"), runs)


def test_a_folder_without_runs_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no summary.json of a finished run below"):
        read_runs(tmp_path)
