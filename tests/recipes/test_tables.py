"""Cells of tables: a mean with its error, a radius, and the baseline first."""

import math

import pandas as pd
import pytest

from recipes.reporting.tables import baseline_first, radius_text, with_error


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (78.1, 12.4, "78 ± 12"),
        (78.1, 9.6, "78 ± 10"),
        (1234.5, 70.0, "1234 ± 70"),
        (78.1, 0.26, "78.1 ± 0.3"),
        (0.5663, 0.0049, "0.566 ± 0.005"),
        (0.5932, 0.0014, "0.593 ± 0.001"),
        (0.63333, 0.033, "0.63 ± 0.03"),
        (0.063, 0.0142, "0.063 ± 0.014"),
        (0.9944, 8e-17, "0.994 ± 0"),
        (24.0, 0.0, "24.0 ± 0"),
        (-3.25, 0.5, "-3.2 ± 0.5"),
        (9.512, math.nan, "9.51"),
        (148.2, math.nan, "148"),
        (0.0, math.nan, "0"),
        (math.nan, math.nan, "–"),
        (1.5e-7, math.nan, "1.5e-07"),
    ],
)
def test_a_mean_is_as_precise_as_its_error(mean, error, text):
    assert with_error(mean, error) == text


@pytest.mark.parametrize(
    ("radius", "text"),
    [(8 / 255, "8/255"), (0.0156863, "4/255"), (0.0314, "0.0314"), (0.25, "0.25"), (0.2, "0.2"), (0.0, "0"), (2, "2")],
)
def test_a_radius_is_a_fraction_of_grey_levels_where_it_is_one(radius, text):
    assert radius_text(radius) == text


def test_the_baseline_is_before_the_other_methods_of_its_group():
    frame = pd.DataFrame({"model": ["b", "a", "a", "a"], "method": ["none", "pgd", "none", "kl"], "seed": [0, 0, 0, 0]})
    done = baseline_first(frame, "none", ["model", "method", "seed"])
    assert list(zip(done.model, done.method, strict=True)) == [("a", "none"), ("a", "kl"), ("a", "pgd"), ("b", "none")]
    assert list(done.columns) == ["model", "method", "seed"]
