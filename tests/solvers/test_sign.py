"""The largest value over a cube: against all of its vertices, and against what is known of it."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from fisher_reg import Exact, NonFiniteJacobianError, SignIteration
from tests.oracles import MatrixOperator, with_singular_values

FEW = SignIteration(num_starts=2, num_trials=4)


def _largest_of_all_vertices(matrix):
    """max over 2^d sign vectors of |A s|^2, (B,)."""
    vertices = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=matrix.shape[2])), dtype=matrix.dtype)
    return (matrix @ vertices.T).square().sum(1).amax(1)


def _random(num_outputs, num_inputs, batch=200):
    return torch.randn(batch, num_outputs, num_inputs, dtype=torch.float64)


@pytest.mark.parametrize("num_outputs", [3, 4, 5, 10])
@pytest.mark.parametrize("num_inputs", [4, 8])
def test_the_default_finds_the_best_of_all_vertices_on_nearly_all_matrices(num_outputs, num_inputs, record_property):
    matrix = _random(num_outputs, num_inputs)
    expected = _largest_of_all_vertices(matrix)
    result = SignIteration().maximize(MatrixOperator(matrix))
    is_found = result.value >= (1 - 1e-4) * expected
    record_property("share_of_maxima", is_found.double().mean().item())
    assert is_found.double().mean() >= 0.98
    assert (result.value <= expected * (1 + 1e-12)).all()


def test_a_space_of_some_outputs_is_nearly_as_good():
    matrix = _random(30, 8) * 0.8 ** torch.arange(30, dtype=torch.float64)[:, None]
    ratio = SignIteration().maximize(MatrixOperator(matrix)).value / _largest_of_all_vertices(matrix)
    assert ratio.median() > 0.999
    assert ratio.min() > 0.9


@pytest.mark.parametrize("solver", [SignIteration(), FEW, SignIteration(num_steps=0, num_starts=1)])
def test_the_value_is_attained_at_the_perturbation(solver):
    matrix = _random(6, 40, 20)
    result = solver.maximize(MatrixOperator(matrix, noise=0.1))  # a difference quotient would be seen
    image = (matrix @ result.perturbation[:, :, None]).squeeze(2)
    assert_close(result.value, image.square().sum(1))
    assert_close(result.left_singular_vector, image / image.norm(dim=1, keepdim=True))
    assert (result.perturbation.abs() == 1).all()
    dual = (matrix.mT @ result.left_singular_vector[:, :, None]).abs().sum((1, 2)).square()
    assert (dual >= result.value * (1 - 1e-12)).all()


def test_stationary_means_that_a_step_changes_no_sign():
    matrix = _random(12, 40, 50)
    result = SignIteration(num_starts=2, num_steps=30, rtol=0.0).maximize(MatrixOperator(matrix))
    assert result.is_stationary.all()
    slope = matrix.mT @ (matrix @ result.perturbation[:, :, None])
    assert_close(slope.squeeze(2).sign(), result.perturbation)
    first = SignIteration(num_starts=1, num_steps=0, rtol=0.0).maximize(MatrixOperator(matrix))
    assert not first.is_stationary.all()
    slope = (matrix.mT @ (matrix @ first.perturbation[:, :, None])).squeeze(2)
    assert_close((slope.sign() == first.perturbation).all(1), first.is_stationary)


def test_the_value_never_falls_with_more_steps():
    matrix = _random(40, 30, 300)
    values = [
        SignIteration(num_starts=1, num_trials=1, num_steps=n, rtol=0.0).maximize(MatrixOperator(matrix)).value
        for n in range(6)
    ]
    for few, many in itertools.pairwise(values):
        assert (many >= few * (1 - 1e-12)).all()
    assert values[-1].mean() > 1.01 * values[0].mean()


def test_the_value_lies_between_the_eigenvalue_and_its_multiple():
    matrix = _random(5, 30, 50)
    value = SignIteration().maximize(MatrixOperator(matrix)).value
    top = Exact().solve(MatrixOperator(matrix))
    of_eigenvector = (matrix.mT @ top.left_singular_vector[:, :, None]).abs().sum((1, 2)).square()
    assert (value >= of_eigenvector * (1 - 1e-12)).all()
    assert (of_eigenvector >= top.eigenvalue).all()
    assert (value <= 30 * top.eigenvalue * (1 + 1e-12)).all()


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e15])
def test_rank_one_is_the_squared_sum_in_single_precision(scale):
    matrix = scale * with_singular_values([1.0], 4, 30)
    result = SignIteration().maximize(MatrixOperator(matrix.float()))
    assert_close(result.left_singular_vector.norm(dim=1), torch.ones(3))
    row = matrix.mT @ result.left_singular_vector.double()[:, :, None]
    assert_close(result.value.double(), row.abs().sum((1, 2)).square(), rtol=1e-5, atol=1e-45)


def test_entries_that_move_nothing_are_at_a_vertex_too():
    matrix = _random(3, 6, 4)
    matrix[:, :, 2] = 0
    assert (SignIteration().maximize(MatrixOperator(matrix)).perturbation.abs() == 1).all()


def test_a_start_that_the_matrix_takes_to_zero_still_finds_the_value():
    matrix = torch.zeros(1, 6, 9, dtype=torch.float64)
    matrix[0, 5] = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.0, 4.0, -4.0])  # zero along ones as well
    start = torch.eye(6, dtype=torch.float64)[:1]
    value = SignIteration(num_starts=2).maximize(MatrixOperator(matrix, start)).value
    assert_close(value, matrix[:, 5].abs().sum(1).square())


def test_a_zero_matrix_has_value_zero_beside_others():
    matrix = torch.cat([torch.zeros(1, 3, 7, dtype=torch.float64), _random(3, 7, 1)])
    result = SignIteration().maximize(MatrixOperator(matrix))
    assert result.value[0] == 0
    assert (result.perturbation[0] == 0).all()
    assert (result.left_singular_vector[0] == 0).all()
    assert result.is_stationary.all()
    assert result.value[1] > 0
    assert (SignIteration().maximize(MatrixOperator(matrix[:1])).value == 0).all()


def test_no_example_depends_on_the_others():
    matrix = torch.cat([_random(15, 20, 4), torch.zeros(1, 15, 20, dtype=torch.float64)])
    together = FEW.maximize(MatrixOperator(matrix))
    for i in range(5):
        alone = FEW.maximize(MatrixOperator(matrix[i : i + 1]))
        assert_close(alone.value, together.value[i : i + 1])
        assert_close(alone.perturbation, together.perturbation[i : i + 1])


def test_the_random_starts_follow_the_generator():
    matrix = _random(30, 20)
    values = [FEW.maximize(MatrixOperator(matrix), torch.Generator().manual_seed(seed)).value for seed in (1, 1, 2)]
    assert_close(values[0], values[1], rtol=0, atol=0)
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize(("num_outputs", "most"), [(2, 3), (5, 6), (10, 11), (100, 12 + 4 + 5)])
def test_the_count_of_applications_is_the_true_one_and_limited(num_outputs, most):
    operator = MatrixOperator(_random(num_outputs, 50, 8))
    result = SignIteration(rtol=0.0).maximize(operator)
    assert result.num_matvecs == operator.count <= most


def test_the_trials_are_split_where_memory_would_be_large(monkeypatch):
    matrix = _random(8, 50, 6)
    whole = SignIteration().maximize(MatrixOperator(matrix))
    monkeypatch.setattr("fisher_reg.solvers.sign._MAX_NUMBERS", 700)
    assert_close(SignIteration().maximize(MatrixOperator(matrix)).value, whole.value)


def test_non_finite_products_are_refused():
    matrix = _random(3, 4, 2)
    matrix[1, 1, 1] = torch.nan
    with pytest.raises(NonFiniteJacobianError, match="1 of 2 examples are finite, but their derivatives"):
        SignIteration().maximize(MatrixOperator(matrix))


@pytest.mark.parametrize("settings", [{"num_steps": -1}, {"num_starts": 0}, {"num_trials": 0}])
def test_counts_that_are_too_small_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"SignIteration needs {name} >="):
        SignIteration(**settings)
