import math

import pytest

from fisher_reg import bound_versus_empirical


def _entry(epoch, bound, value):
    values = {f"fisher/lambda_max_{name}": value for name in ("mean", "median", "p95", "max")}
    return {"epoch": epoch, "fisher/log10_bound_global": bound} | values


def test_every_curve_is_drawn_with_its_numbers():
    figure = bound_versus_empirical([_entry(0, 5.0, 10.0), _entry(2, 6.0, 0.1)])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert len(lines) == 5
    assert list(lines["global upper bound"].get_ydata()) == [5.0, 6.0]
    assert list(lines[r"$\lambda_{\max}(F)$, max"].get_ydata()) == [1.0, -1.0]
    assert list(lines[r"$\lambda_{\max}(F)$, max"].get_xdata()) == [0, 2]


def test_values_without_a_logarithm_leave_a_gap():
    figure = bound_versus_empirical([_entry(0, 5.0, 0.0), _entry(1, math.inf, math.nan)])
    (line,) = [line for line in figure.axes[0].lines if line.get_label().endswith("mean")]
    assert all(math.isnan(value) for value in line.get_ydata())


def test_a_history_without_bounds_is_drawn():
    entry = _entry(0, 5.0, 1.0)
    del entry["fisher/log10_bound_global"]
    assert len(bound_versus_empirical([entry]).axes[0].lines) == 4


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="history is empty"):
        bound_versus_empirical([])
