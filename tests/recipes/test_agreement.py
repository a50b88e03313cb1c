import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recipes.statistics.agreement import (
    agreement,
    every_network,
    grid,
    interval,
    mean_over_seeds,
    p_value,
    quantiles,
    rho,
    tau,
)


@pytest.mark.parametrize(("ours", "theirs"), [(tau, stats.kendalltau), (rho, stats.spearmanr)])
@pytest.mark.parametrize("levels", [4, 1000])
def test_rank_correlations_of_many_pairs_at_once_are_those_of_scipy(ours, theirs, levels):
    one, other = np.random.default_rng(0).integers(levels, size=(2, 6, 11)).astype(float)  # with and without ties
    expected = [theirs(*pair).statistic for pair in zip(one, other, strict=True)]
    np.testing.assert_allclose(ours(one, other), expected, rtol=1e-12, atol=1e-15)


def test_infinite_values_are_equal_and_above_all_others():
    one, other = np.array([1.0, 2.0, math.inf, math.inf]), np.array([1.0, 2.0, 3.0, 3.0])
    assert tau(one, other) == pytest.approx(1)
    assert rho(one, other) == pytest.approx(1)


def test_a_constant_has_no_order_and_is_left_out_of_the_mean_over_groups():
    rising, constant = np.arange(4.0)[:, None], np.ones((4, 1))
    assert math.isnan(agreement([(constant, rising)], tau, mean_over_seeds))
    assert agreement([(constant, rising), (rising, rising)], rho, mean_over_seeds) == 1
    assert math.isnan(p_value([(constant, rising)], tau, mean_over_seeds, 10))


def test_groups_with_the_same_models_are_one_observation_of_them():
    rising = np.arange(4.0)[:, None]
    for groups in (1, 3):
        p = p_value([(rising, rising)] * groups, tau, mean_over_seeds, 1000)
        assert p == pytest.approx(2 / math.factorial(4))
    generator = np.random.default_rng(0)
    pair = generator.normal(size=(12, 1)), generator.normal(size=(12, 1))
    assert interval([pair] * 3, rho, mean_over_seeds, 50) == pytest.approx(interval([pair], rho, mean_over_seeds, 50))


def test_models_that_are_alike_in_every_group_are_not_taken_for_evidence():
    generator = np.random.default_rng(0)
    rejected = 0
    for _ in range(200):
        one, other = generator.normal(size=(2, 12, 1))  # what a model is like in all groups, unrelated
        noise = 0.3 * generator.normal(size=(4, 2, 12, 2))
        rejected += p_value([(one + a, other + b) for a, b in noise], rho, mean_over_seeds, 200) <= 0.05
    assert rejected <= 20  # 10 expected; groups permuted by themselves reject about 50


def test_an_interval_draws_models_and_seeds_of_both_sides_alike():
    generator = np.random.default_rng(1)
    values = generator.normal(size=(12, 3))
    assert interval([(values, values)], tau, every_network, 50) == (1, 1)
    noisy = values + generator.normal(size=values.shape)
    low, high = interval([(values, noisy)], rho, mean_over_seeds, 200)
    assert low < agreement([(values, noisy)], rho, mean_over_seeds) < high


def test_a_grid_has_models_by_seeds_in_the_order_of_the_rows():
    rows = pd.DataFrame({"model": ["b", "b", "a", "a"], "seed": [1, 0, 0, 1], "x": [1.0, 2.0, 3.0, 4.0]})
    assert grid(rows, "x").tolist() == [[2, 1], [3, 4]]
    assert every_network(grid(rows, "x")).tolist() == [2, 1, 3, 4]
    assert quantiles(np.array([math.nan, 1.0])) == (1, 1)
    assert all(math.isnan(end) for end in quantiles(np.array([math.nan])))
