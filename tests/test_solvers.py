from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fisher_reg import Exact, HutchinsonMax, Lanczos, PowerIteration
from tests.oracles import MatrixOperator, with_singular_values

SOLVERS = [Exact(), Lanczos(num_steps=10, rtol=1e-3), PowerIteration(rtol=1e-3)]


def _exact(matrix):
    return torch.linalg.matrix_norm(matrix, 2) ** 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_finds_a_prescribed_top_eigenvalue(solver):
    operator = MatrixOperator(with_singular_values([3.0, 1.0, 0.5, 0.1], 6, 20))
    result = solver.solve(operator)
    assert_close(result.eigenvalue, torch.full((3,), 9.0, dtype=torch.float64), rtol=1e-5, atol=0)
    assert result.converged.all()
    assert result.solver == solver


@pytest.mark.parametrize("solver", [*SOLVERS, Lanczos(), Lanczos(1, rtol=0.0), HutchinsonMax(5)])
def test_the_evidence_is_what_it_says(solver):
    matrix = with_singular_values([2.0, 1.9, 1.8, 0.3, 0.2], 8, 12)
    result = solver.solve(MatrixOperator(matrix))
    u, v, theta = result.left_singular_vector[:, :, None], result.eigenvector[:, :, None], result.eigenvalue
    one = torch.ones(3, dtype=torch.float64)
    assert_close(u.norm(dim=1)[:, 0], one)
    assert_close(v.norm(dim=1)[:, 0], one)
    assert_close((matrix.mT @ u).square().sum((1, 2)), theta)
    assert_close(matrix.mT @ u, theta.sqrt()[:, None, None] * v)
    gram = matrix @ matrix.mT
    residual = (gram @ u - theta[:, None, None] * u).norm(dim=1)[:, 0]
    assert (residual <= result.residual * (1 + 1e-7) + 1e-12).all()
    is_measured = result.random_start.open_diagonal.isnan()  # else the last product with A was not taken
    assert_close(residual[is_measured], result.residual[is_measured], atol=1e-12, rtol=1e-7)
    distance = (torch.linalg.eigvalsh(gram) - theta[:, None]).abs().amin(1)
    assert (distance <= result.residual + 1e-12).all()


@pytest.mark.parametrize("solver", [Lanczos(1), Lanczos(2), Lanczos(3), PowerIteration(2), HutchinsonMax(3)])
def test_a_ritz_value_never_exceeds_the_eigenvalue(solver):
    matrix = torch.randn(50, 9, 30, dtype=torch.float64)
    assert (solver.solve(MatrixOperator(matrix)).eigenvalue <= _exact(matrix) * (1 + 1e-12)).all()


def test_a_space_of_all_outputs_is_exact_and_stops_there():
    matrix = torch.randn(5, 6, 30, dtype=torch.float64)
    result = Lanczos(num_steps=50, rtol=0.0).solve(MatrixOperator(matrix))
    assert_close(result.eigenvalue, _exact(matrix))
    assert (result.num_steps <= 6).all()  # five vectors beside the start, and none is left


def test_steps_beyond_the_rank_are_not_taken_and_the_result_says_so():
    operator = MatrixOperator(with_singular_values([3.0, 2.0], 30, 40))
    result = Lanczos(num_steps=20, num_starts=1, rtol=0.0).solve(operator)
    assert_close(result.eigenvalue, torch.full((3,), 9.0, dtype=torch.float64))
    # the start, one vector inside the range of A and one that finds nothing left
    assert (result.num_steps <= 3).all()
    assert result.num_matvecs == operator.count


def test_lanczos_beats_power_iteration_at_equal_cost():
    matrix = torch.randn(200, 10, 30, dtype=torch.float64)

    def error(solver):
        return (1 - solver.solve(MatrixOperator(matrix)).eigenvalue / _exact(matrix)).mean()

    u = torch.ones(200, 10, 1, dtype=torch.float64)
    for _ in range(4):
        u = matrix @ (matrix.mT @ u)
        u = u / u.norm(dim=1, keepdim=True)
    power = 1 - (matrix.mT @ u).square().sum((1, 2)) / _exact(matrix)
    assert error(Lanczos(4, rtol=0.0)) < 0.5 * power.mean()


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


@pytest.mark.parametrize("solver", [Lanczos(num_starts=1, rtol=1e-3), PowerIteration(rtol=1e-3)])
def test_a_start_orthogonal_to_the_top_still_finds_it(solver):
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.2], dtype=torch.float64))[None]
    start = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(solver.solve(MatrixOperator(matrix, start)).eigenvalue.item(), 9.0, rtol=1e-3, atol=0)


def test_a_tiny_gap_converges_to_within_it_or_says_that_it_has_not():
    matrix = with_singular_values([1.0 - 1e-2 * k for k in range(20)], 40, 60)
    early = Lanczos(num_steps=1, rtol=1e-3).solve(MatrixOperator(matrix))
    assert not early.converged.any()
    assert (early.residual > 1e-3 * early.eigenvalue).all()
    late = Lanczos(num_steps=20, rtol=1e-3).solve(MatrixOperator(matrix))
    assert late.converged.all()
    assert_close(late.eigenvalue, torch.ones(3, dtype=torch.float64), rtol=2e-2, atol=0)


@pytest.mark.parametrize("solver", [*SOLVERS, Lanczos(2, rtol=0.0), HutchinsonMax(4)])
def test_the_count_of_applications_is_the_true_one(solver):
    operator = MatrixOperator(with_singular_values([3.0, 1.0], 5, 7))
    assert solver.solve(operator).num_matvecs == operator.count


def _easy_and_hard():
    """Two rank-one matrices, whose start is the top, and two that take many steps."""
    matrix = torch.zeros(4, 20, 30, dtype=torch.float64)
    matrix[:2, 0, 0] = 2.0
    matrix[2:] = torch.randn(2, 20, 30, dtype=torch.float64)
    start = torch.zeros(4, 20, dtype=torch.float64)
    start[:, 0] = 1.0
    return matrix, start


def test_converged_examples_are_not_worked_on_again():
    operator = MatrixOperator(*_easy_and_hard())
    result = Lanczos(num_steps=8, num_starts=1, rtol=1e-2).solve(operator)
    assert (result.num_steps[:2] < result.num_steps[2:].min()).all()
    # the start, a second vector, which ends the search in two of them, and no pass of all examples after that
    assert operator.counter[:4] == [4, 4, 4, 4]
    assert set(operator.counter[4:]) <= {1, 2}


def test_no_example_depends_on_the_others():
    matrix, start = _easy_and_hard()
    for solver in (Lanczos(num_steps=4, rtol=1e-2), PowerIteration(rtol=1e-2), Exact()):
        together = solver.solve(MatrixOperator(matrix, start))
        for index in range(4):
            alone = solver.solve(MatrixOperator(matrix[index : index + 1], start[index : index + 1]))
            for name in ("eigenvalue", "residual", "converged", "num_steps"):
                assert_close(getattr(together, name)[index], getattr(alone, name)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [Exact(), Lanczos(num_steps=10, rtol=1e-4)])
def test_several_eigenpairs_are_found_with_their_multiplicity(solver):
    values = [3.0, 2.0, 2.0, 1.0, 0.5]
    matrix = with_singular_values(values, 9, 20)
    result = solver.eigenpairs(MatrixOperator(matrix), 4)
    expected = torch.tensor(values[:4], dtype=torch.float64).square().expand(3, -1)
    assert_close(result.eigenvalue, expected, rtol=1e-6, atol=0)
    assert result.converged.all()
    v = result.eigenvector
    assert_close(v @ v.mT, torch.eye(4, dtype=torch.float64).expand(3, -1, -1), atol=1e-3, rtol=0)
    product = (matrix.mT @ (matrix @ v.mT)).mT
    assert_close(product, expected[:, :, None] * v, atol=2e-3, rtol=0)


def test_trace_and_ritz_values_bound_the_eigenvalue_from_above():
    matrix = torch.randn(40, 9, 30, dtype=torch.float64)
    trace, exact = matrix.square().sum((1, 2)), _exact(matrix)
    gaps = []
    for steps in (1, 3, 5):
        result = Lanczos(steps, rtol=0.0).solve(MatrixOperator(matrix))
        upper = result.interval(trace=trace).upper
        assert (upper >= exact).all()
        gaps.append((upper - exact).mean())
    assert gaps[0] > gaps[1] > gaps[2]
    for solver in (Exact(), Lanczos(9, rtol=0.0)):
        assert_close(solver.solve(MatrixOperator(matrix)).interval(trace=trace).upper, exact)


def test_the_paper_s_quotients_are_biased_low_and_the_more_the_larger_k():
    ratios = []
    for num_outputs in (5, 50):
        matrix = torch.randn(20, num_outputs, 60, dtype=torch.float64) * torch.logspace(
            0, -2, num_outputs, dtype=torch.float64
        ).view(1, -1, 1)
        result = HutchinsonMax(100).solve(MatrixOperator(matrix))
        ratios.append((result.eigenvalue / _exact(matrix)).mean())
    assert ratios[0] < 1
    assert ratios[1] < 0.6 * ratios[0]


def test_an_inexact_apply_costs_steps_and_not_accuracy():
    matrix = with_singular_values([3.0, 2.0, 1.0, 0.5, 0.1], 30, 40, batch=50)
    exact = _exact(matrix)
    solver = Lanczos(num_steps=10, num_starts=1, rtol=0.1)
    noisy = solver.solve(MatrixOperator(matrix, noise=2e-3))
    assert (noisy.eigenvalue <= exact * (1 + 1e-12)).all()
    # a residual of 10 % at a relative gap of 5/9
    assert_close(noisy.eigenvalue, exact, rtol=0.1**2 / (5 / 9), atol=0)
    assert noisy.converged.all()
    gram, u = matrix @ matrix.mT, noisy.left_singular_vector[:, :, None]
    residual = (gram @ u - noisy.eigenvalue[:, None, None] * u).norm(dim=1)[:, 0]
    # noise of 2e-3 per output over 30 outputs: 1.1 % of the eigenvalue
    assert ((noisy.residual - residual).abs() <= 0.03 * exact).all()


def test_an_apply_that_is_far_off_is_taken_exactly_where_it_is():
    matrix = with_singular_values([3.0, 2.0, 1.0], 6, 20, batch=4)

    class FarOff(MatrixOperator):
        def apply(self, v, exact=False, slope=None):
            image = super().apply(v, exact=True)
            return image if exact or len(v) == 1 else image * torch.tensor([1.0, 1.0, 2.0, 1.0])[: len(v), None]

        def restrict(self, keep):
            return FarOff(self.matrix[keep], self.start[keep], counter=self.counter)

    result = Lanczos(num_starts=1, rtol=1e-3).solve(FarOff(matrix))
    assert_close(result.eigenvalue, _exact(matrix), rtol=1e-5, atol=0)
    assert result.converged.all()


def test_maps_that_are_no_transposes_are_refused():
    class Unrelated(MatrixOperator):
        def apply(self, v, exact=False, slope=None):
            return torch.ones(len(v), 5, dtype=v.dtype)

        def restrict(self, keep):
            return Unrelated(self.matrix[keep])

    with pytest.raises(ValueError, match="not transposes of each other"):
        Lanczos().solve(Unrelated(torch.randn(2, 5, 7, dtype=torch.float64)))


def test_the_random_vector_follows_the_generator():
    operator = MatrixOperator(torch.randn(6, 8, 9, dtype=torch.float64))
    first, again, other = (
        Lanczos().solve(operator, torch.Generator().manual_seed(s)).random_start.roots.nan_to_num() for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Lanczos(0),
        lambda: Lanczos(num_starts=0),
        lambda: PowerIteration(0),
        lambda: HutchinsonMax(0),
        lambda: replace(Lanczos(), num_steps=-1),
    ],
)
def test_counts_below_one_are_refused(build):
    with pytest.raises(ValueError, match="needs num_.* >= 1; got|needs max_iterations >= 1; got"):
        build()
