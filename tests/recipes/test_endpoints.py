import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from recipes.statistics.endpoints import _SHAPES, upper_ends
from recipes.statistics.simplex import nelder_mead


def _maxima(count, num_batches, batch_size, pool_factor=10, scale=1.0, seed=0):
    """Maxima over resamples of a pool, many of them equal: (count, num_batches), float32."""
    draw = np.random.default_rng(seed)
    pool = scale * draw.gamma(20, size=(count, pool_factor * batch_size)).astype(np.float32) / 20
    places = draw.integers(0, pool.shape[1], (num_batches, batch_size))
    return pool[:, places].max(2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_fit_is_that_of_the_authors_release():
    maxima = np.concatenate(
        [_maxima(4, 40, 32, pool_factor=40).astype(float), -np.random.default_rng(0).weibull(2, (2, 40))]
    )

    def optimizer(function, start, args, disp):
        return scipy.optimize.fmin(lambda theta, x: function(theta, x) + 0.01 * theta[2] ** 2, start, args, disp=disp)

    expected = []
    for row in maxima:
        top, width = row.max(), np.ptp(row)
        results = []
        for shape in _SHAPES:  # superfit: the start that scipy had then
            law = scipy.stats.weibull_min.fit((top - row) / width, shape, superfit=True, optimizer=optimizer)
            end = top - width * law[1]
            results.append((scipy.stats.kstest(-row, "weibull_min", (law[0], -end, width * law[2])).pvalue, end))
        fitness, end = max(results, key=lambda result: result[0])
        assert fitness > 0.001
        expected.append(end)
    np.testing.assert_allclose(upper_ends(maxima), expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_fit_finds_the_end_of_a_known_law():
    sample = 7 - 2 * np.random.default_rng(0).weibull(3, (5, 2000))
    assert abs(upper_ends(sample) - 7).max() < 0.2  # the standard error is about scale n^(-1/shape)


def test_equal_maxima_are_their_own_end():
    maxima = np.full((3, 20), [[0.3], [7.0], [0.0]], dtype=np.float32)
    maxima[1, 4] *= 1 + 2e-7
    np.testing.assert_allclose(upper_ends(maxima), [0.3, 7.0, 0.0], rtol=1e-6)


def test_samples_are_fitted_the_same_in_parts(monkeypatch):
    maxima = _maxima(7, 20, 16)
    whole = upper_ends(maxima)
    monkeypatch.setattr("recipes.statistics.endpoints._MAX_NUMBERS", 2 * 20)
    np.testing.assert_array_equal(upper_ends(maxima), whole)


def test_the_simplices_move_as_those_of_scipy():
    steepness = np.array([1.0, 10.0, 100.0, 3.0])

    def value(parameters, rows):  # Rosenbrock's valleys
        x, y = parameters.T
        return (1 - x) ** 2 + steepness[rows] * (y - x**2) ** 2

    start = np.array([[-1.2, 1.0], [0.0, 0.0], [3.0, -4.0], [1.0, 1.0]])
    expected = [
        scipy.optimize.minimize(lambda p, i=i: value(p[None], [i])[0], start[i], method="Nelder-Mead").x
        for i in range(4)
    ]
    np.testing.assert_allclose(nelder_mead(value, start), expected, rtol=1e-9)


def test_a_slope_without_end_is_left_after_its_steps():
    calls = []

    def value(parameters, rows):
        calls.extend(rows)
        return -np.sqrt(np.abs(parameters[:, 0]))

    assert nelder_mead(value, np.array([[0.1]]))[0, 0] > 1e9
    assert len(calls) == 2 + 2 * 200
