"""The theory recipe as a user starts it, small, and what it must find."""

import json
import math
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from recipes.runtime.command import composed
from recipes.theory import BREAKS, check, crossing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory")
    small = ["num_images=8", "num_repeats=40", "num_labels=[8,64,512]", "num_probes=[1,8]", "num_lengths=16"]
    with redirect_stdout(StringIO()) as output:
        check(composed("theory", ["trainer.max_epochs=2", *small, f"output_dir={folder}"]))
    assert "theory and measurement" in output.getvalue()
    return folder


def test_every_rate_is_the_one_of_theory(folder):
    summary = json.loads((folder / "theory.json").read_text())
    assert summary["label_variance_slope"] == pytest.approx(-0.5, abs=0.05)
    for direction in ("top_eigenvector", "random_direction"):
        # log(1 + deviation) has slopes up to 0.1 / 1.1 where the deviation reaches 10 % and the fit ends
        assert summary[f"divergence_slope_{direction}"] == pytest.approx(2, abs=0.05)
        assert summary[f"deviation_slope_{direction}"] == pytest.approx(1, abs=0.15)
        assert 1e-3 < summary[f"breaks_at_{direction}"] < 10
    assert summary["breaks_at_top_eigenvector"] < summary["breaks_at_random_direction"]
    for probe in ("Rademacher", "StandardNormal"):
        # 8 images x 40 repeats x 2 counts: a root mean square with a standard error of about 5 %, heavy tails more
        assert summary[f"trace_error_over_formula_{probe}"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("power", "factor"), [(1.0, 2.0), (2.0, 0.3)])
def test_the_crossing_of_a_power_law_is_exact_between_the_lengths(power, factor):
    lengths = np.logspace(-4, 1, 21)
    found = crossing(pd.Series(factor * lengths**power, index=lengths), BREAKS)
    assert found == pytest.approx((BREAKS / factor) ** (1 / power), rel=1e-9)
    assert found not in lengths


def test_a_curve_that_begins_above_or_never_exceeds_crosses_at_its_ends():
    assert crossing(pd.Series([0.2, 0.3], index=[0.5, 1.0]), 0.1) == 0.5
    assert crossing(pd.Series([0.01, 0.05], index=[0.5, 1.0]), 0.1) == math.inf


def test_the_medians_differ_by_ten_per_cent_where_the_figure_says(folder):
    curves, summary = pd.read_csv(folder / "theory.csv"), json.loads((folder / "theory.json").read_text())
    for name in ("top eigenvector", "random direction"):
        part = curves[(curves.check == "deviation") & (curves.series == name)].groupby("x").value.median()
        there = np.interp(np.log(summary[f"breaks_at_{name.replace(' ', '_')}"]), np.log(part.index), np.log(part))
        assert np.exp(there) == pytest.approx(BREAKS, rel=1e-4)


def test_the_curves_and_the_figure_are_there(folder):
    curves = pd.read_csv(folder / "theory.csv")
    assert set(curves.check) == {"label variance", "divergence", "deviation", "trace error", "trace error, formula"}
    deviation = curves[(curves.check == "deviation") & (curves.series == "top eigenvector")]
    medians = deviation.groupby("x").value.median()
    assert medians.iloc[0] < BREAKS < medians.iloc[-1]
    with Image.open(folder / "theory.png") as image:
        assert image.width > 1000
