import pytest
import torch
from torch.testing import assert_close

from fisher_reg import Exact, Hutchinson, Lanczos, PowerIteration
from fisher_reg.solvers import random_signs
from tests.oracles import MatrixOperator, with_singular_values

SOLVERS = [Exact(), Lanczos(num_steps=4), PowerIteration()]


@pytest.mark.parametrize("solver", SOLVERS)
def test_finds_a_prescribed_top_eigenvalue(solver):
    operator = MatrixOperator(with_singular_values([3.0, 1.0, 0.5, 0.1], 6, 20))
    result = solver.solve(operator)
    assert_close(result.eigenvalue, torch.full((3,), 9.0, dtype=torch.float64), rtol=1e-4, atol=0)
    assert result.converged.all()
    assert result.solver == solver


@pytest.mark.parametrize("solver", SOLVERS)
def test_residual_is_that_of_the_bare_operator_and_the_value_is_a_rayleigh_quotient(solver):
    matrix = with_singular_values([2.0, 1.9, 1.8, 0.3, 0.2], 8, 12)
    result = solver.solve(MatrixOperator(matrix))
    fisher, v = matrix.mT @ matrix, result.eigenvector[:, :, None]
    assert_close(v.norm(dim=1)[:, 0], torch.ones(3, dtype=torch.float64))
    assert_close((v.mT @ fisher @ v)[:, 0, 0], result.eigenvalue)
    assert_close((fisher @ v - result.eigenvalue[:, None, None] * v).norm(dim=1)[:, 0], result.residual)


@pytest.mark.parametrize("solver", [Lanczos(1), Lanczos(2), Lanczos(3), PowerIteration(2)])
def test_a_ritz_value_never_exceeds_the_eigenvalue(solver):
    matrix = torch.randn(50, 9, 30, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix, 2) ** 2
    assert (solver.solve(MatrixOperator(matrix)).eigenvalue <= exact * (1 + 1e-12)).all()


def test_lanczos_with_as_many_steps_as_the_rank_is_exact():
    matrix = torch.randn(5, 6, 30, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix, 2) ** 2
    assert_close(Lanczos(6).solve(MatrixOperator(matrix)).eigenvalue, exact)


def test_lanczos_beats_power_iteration_at_equal_cost():
    matrix = torch.randn(200, 10, 30, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix, 2) ** 2

    def error(solver):
        return (1 - solver.solve(MatrixOperator(matrix)).eigenvalue / exact).mean()

    assert error(Lanczos(4)) < 0.5 * error(PowerIteration(4))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_spectra_are_handled_per_example(solver, dtype):
    zero = torch.zeros(1, 6, 9, dtype=torch.float64)
    rank_one = with_singular_values([2.0], 6, 9, batch=1)
    repeated = with_singular_values([2.0, 2.0, 2.0, 1.0], 6, 9, batch=1)
    tiny = with_singular_values([2e-12, 1e-12], 6, 9, batch=1)
    result = solver.solve(MatrixOperator(torch.cat([zero, rank_one, repeated, tiny]).to(dtype)))
    expected = torch.tensor([0.0, 4.0, 4.0, 4e-24], dtype=dtype)
    assert_close(result.eigenvalue, expected, rtol=1e-3, atol=0)
    assert result.converged.all()
    assert torch.isfinite(result.eigenvector).all()


@pytest.mark.parametrize("solver", [Lanczos(num_steps=6), PowerIteration()])
def test_a_start_orthogonal_to_the_top_still_finds_it(solver):
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.2], dtype=torch.float64))[None]
    start = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(solver.solve(MatrixOperator(matrix, start)).eigenvalue.item(), 9.0, rtol=1e-3, atol=0)


def test_an_unconverged_result_says_so():
    matrix = with_singular_values([1.0 - 1e-2 * k for k in range(20)], 40, 60)
    result = Lanczos(num_steps=2).solve(MatrixOperator(matrix))
    assert not result.converged.any()
    assert (result.residual > 1e-2 * result.eigenvalue).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_count_of_applications_is_the_true_one(solver):
    operator = MatrixOperator(with_singular_values([3.0, 1.0], 5, 7))
    assert solver.solve(operator).num_matvecs == operator.count


def test_the_start_does_not_depend_on_the_other_examples():
    matrix = torch.randn(6, 5, 9, dtype=torch.float64)
    together = Lanczos(2).solve(MatrixOperator(matrix)).eigenvalue
    alone = torch.cat([Lanczos(2).solve(MatrixOperator(one[None])).eigenvalue for one in matrix])
    assert_close(together, alone)


def test_hutchinson_is_unbiased_with_the_variance_of_its_formula():
    # Var(e' G e) = 2 sum_{i != j} G_ij^2 for random signs; 4,000 samples of one matrix.
    matrix = torch.randn(1, 5, 8, dtype=torch.float64)
    gram = (matrix @ matrix.mT)[0]
    copies = MatrixOperator(matrix.expand(4000, -1, -1))
    samples = Hutchinson(1).trace(copies, torch.Generator().manual_seed(0))
    variance = 2 * (gram.square().sum() - gram.diagonal().square().sum())
    standard_error = (variance / 4000).sqrt()
    assert abs(samples.mean() - gram.trace()) < 4 * standard_error
    # the variance of a sample variance of near-normal values: relative 2 / n, at most doubled by heavier tails
    assert_close(samples.var(), variance, rtol=0.2, atol=0)


def test_exact_trace_is_the_sum_of_squares():
    matrix = torch.randn(3, 5, 8, dtype=torch.float64)
    assert_close(Exact().trace(MatrixOperator(matrix)), (matrix.mT @ matrix).diagonal(dim1=1, dim2=2).sum(1))


def test_random_signs_follow_the_generator():
    like = torch.zeros(50, 3)
    first, again = (random_signs(like, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert set(first.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("build", [lambda: Lanczos(0), lambda: PowerIteration(0), lambda: Hutchinson(-1)])
def test_counts_below_one_are_refused(build):
    with pytest.raises(ValueError, match=">= 1; got"):
        build()
