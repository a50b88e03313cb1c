"""What a review found wrong once."""

import pytest
import torch
from torch.testing import assert_close

from fisher_reg import (
    BlackBox,
    Categorical,
    Exact,
    Gaussian,
    Lanczos,
    MarginTempered,
    PowerIteration,
    blackbox_spectral_norm,
    fisher_eigenpairs,
    fisher_spectral_norm,
)
from fisher_reg.solvers import EigenResult, unit
from tests.oracles import MatrixOperator


class _FirstOutputs(Gaussian):
    """Starts at the first outputs."""

    def candidates(self, logits, count):
        return torch.eye(logits.shape[1])[:count].expand(len(logits), -1, -1)


@pytest.mark.parametrize("num_steps", [8, 40])
def test_a_pair_outside_the_starts_takes_the_place_of_a_smaller_one(num_steps):
    values = torch.cat([torch.tensor([10.0, 1.0, 2.0]), torch.linspace(0, 0.95, 197)])
    found = fisher_eigenpairs(
        lambda x: values.sqrt() * x, torch.zeros(1, 200), 2, solver=Lanczos(num_steps), likelihood=_FirstOutputs()
    )
    # a Ritz value is at most the eigenvalue of its rank, and 1 is what the starts hold
    assert_close(found.eigenvalue, torch.tensor([[10.0, 2.0]]), rtol=0.05, atol=0)


@pytest.mark.parametrize("solver", [None, PowerIteration(), Exact(), Lanczos(is_exact=True)])
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_an_exact_trace_encloses_also_where_backward_passes_round(solver, size):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        jacobian = torch.randn(20, 30, generator=generator) + size * torch.randn(30, generator=generator)
        x = 1e-6 * torch.randn(2, 30, generator=generator)
        p = (x @ jacobian.T).double().softmax(1)
        covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        fisher = jacobian.double().T @ covariance @ jacobian.double()
        top, trace = torch.linalg.eigvalsh(fisher)[:, -1], fisher.diagonal(dim1=1, dim2=2).sum(1)
        found = fisher_spectral_norm(lambda x, j=jacobian: x @ j.T, x, solver=solver).interval(trace=trace)
        # the logits themselves are rounded, by up to 1e-6
        assert (found.lower <= top * (1 + 1e-5)).all()
        assert (found.upper >= top * (1 - 1e-5)).all()


def test_a_trace_of_another_shape_is_refused():
    result = fisher_spectral_norm(lambda x: x[:, :3], torch.zeros(2, 6), solver=Exact())
    with pytest.raises(ValueError, match=r"trace must be a tensor of shape \(2,\), one number per example; got \(1,\)"):
        result.interval(trace=torch.ones(1))
    with pytest.raises(ValueError, match="got float"):
        result.interval(trace=1.0)


class _OneVector:
    """A solver of a user's own, which knows nothing of probes."""

    def solve(self, operator, generator=None):
        u = unit(operator.starts(1)[:, 0])
        row = operator.adjoint(u)
        value = row.square().sum(1)
        return EigenResult(
            eigenvalue=value,
            eigenvector=unit(row),
            left_singular_vector=u,
            residual=torch.full_like(value, torch.nan),
            converged=torch.zeros_like(value, dtype=torch.bool),
            ritz_values=value[:, None],
            num_steps=torch.zeros(len(value), dtype=torch.long),
            num_matvecs=1,
            solver=self,
        )


def test_a_solver_of_one_s_own_need_not_say_more_than_its_pair():
    weight, x = torch.randn(5, 8), torch.randn(3, 8)
    result = fisher_spectral_norm(lambda x: x @ weight.T, x, solver=_OneVector())
    p = (x @ weight.T).double().softmax(1)
    fisher = weight.double().T @ (torch.diag_embed(p) - p[:, :, None] * p[:, None]) @ weight.double()
    top = torch.linalg.eigvalsh(fisher)[:, -1]
    found = result.interval(trace=fisher.diagonal(dim1=1, dim2=2).sum(1))
    assert (found.lower <= top).all()
    assert (found.upper >= top).all()
    with pytest.raises(ValueError, match="difference quotients, which give no guarantee"):
        result.interval()


@pytest.mark.parametrize("scale", [1e-16, 1e-25])
def test_equal_margins_do_not_see_tiny_logits(scale):
    weight, x = torch.randn(10, 30), torch.randn(4, 30)
    one, tiny = (
        fisher_spectral_norm(lambda x, s=s: s * (x @ weight.T), x, likelihood=MarginTempered()).eigenvalue
        for s in (1.0, scale)
    )
    assert_close(tiny, one, rtol=1e-4, atol=0)


@pytest.mark.parametrize("likelihood", [Categorical(), MarginTempered()])
@pytest.mark.parametrize(("size", "step"), [(20, 1e-3), (200, 1e-2), (1, 1e-6)])
def test_the_divergence_of_near_predictions_does_not_cancel(likelihood, size, step):
    z = size * torch.randn(64, 10)
    moved = z + step * torch.randn(64, 10)
    exact = likelihood.divergence(z.double(), moved.double())
    # the smallest normal number is 1.2e-38
    assert_close(likelihood.divergence(z, moved).double(), exact, rtol=1e-4, atol=1e-37)


def test_few_queries_do_not_give_zero_with_certainty():
    weight = torch.randn(5, 12)
    result = blackbox_spectral_norm(lambda x: (x @ weight.T).softmax(1), torch.randn(200, 12), estimator=BlackBox(4))
    assert (result.eigenvalue > 0).all()
    assert (result.standard_error > 0).all()


@pytest.mark.parametrize("solver", [Lanczos(), Lanczos(is_exact=True)])
@pytest.mark.parametrize("num_outputs", [8, 10])
def test_an_eigenvalue_that_is_repeated_outside_the_starts_is_found_twice(solver, num_outputs):
    # the first vector found is the random one's shadow in the eigenspace; the second is orthogonal to that shadow
    values = torch.linspace(1, 0.5, num_outputs, dtype=torch.float64)
    values[-2:] = 10.0
    result = solver.eigenpairs(MatrixOperator(values.sqrt().diag()[None], torch.eye(num_outputs)[:1].double()), 2)
    assert result.converged.all()
    assert_close(result.eigenvalue, torch.full((1, 2), 10.0, dtype=torch.float64), rtol=0.05, atol=0)


@pytest.mark.parametrize("solver", [Lanczos(rtol=1e-3), Lanczos(is_exact=True), PowerIteration()])
def test_a_unit_that_rounds_to_the_other_side_in_a_smaller_batch_refuses_nothing(solver):
    weight = torch.randn(9, 30, generator=torch.Generator().manual_seed(1))
    x = torch.zeros(6, 30)
    x[1:, 0] = 0.1  # the first example is at the kink

    def model(x):
        side = 1e-9 if len(x) == 6 else -1e-9  # as the rounding errors of a product of matrices
        return torch.cat([x @ weight.T, 30 * (x[:, :1] + side).relu()], 1)

    result = fisher_spectral_norm(model, x, solver=solver)
    assert_close(
        result.eigenvalue[1:], fisher_spectral_norm(model, x, solver=Exact()).eigenvalue[1:], rtol=0.05, atol=0
    )
