"""The estimates against the definition, on trained networks of all four families."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Bernoulli,
    Exact,
    Gaussian,
    Hutchinson,
    Lanczos,
    NonFiniteJacobianError,
    PowerIteration,
    fisher_effective_rank,
    fisher_eigenpairs,
    fisher_spectral_norm,
    fisher_trace,
)
from tests import cases, oracles


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_exact_agrees_with_two_independent_oracles(trained, digits, dtype, tolerance, record_property):
    model, x = copy.deepcopy(trained).to(dtype), cases.test_images(digits, 32).to(dtype)
    estimate = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue
    by_jacobian = torch.linalg.matrix_norm(oracles.root_jacobian(model, x), 2) ** 2
    by_scores = oracles.top_eigenvalue(oracles.fisher_by_scores(model, x))
    for name, oracle in (("jacrev", by_jacobian), ("scores", by_scores)):
        error = ((estimate - oracle).abs() / oracle).max().item()
        record_property(f"max_relative_error_{name}", error)
        assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_is_within_one_per_cent_and_never_above(trained, digits, dtype, record_property):
    model, x = copy.deepcopy(trained).to(dtype), cases.test_images(digits, 256).to(dtype)
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue
    default = fisher_spectral_norm(model, x)
    error = 1 - default.eigenvalue / exact
    record_property("error_p95", error.quantile(0.95).item())
    record_property("error_median", error.median().item())
    record_property("converged", default.converged.float().mean().item())
    record_property("steps", default.num_steps.float().mean().item())
    assert isinstance(default.solver, Lanczos)
    assert error.quantile(0.95) <= 0.01
    assert error.min() > -100 * torch.finfo(dtype).eps
    assert default.converged.float().mean() > 0.98


def test_the_residual_of_difference_quotients_is_the_exact_one_to_a_few_per_cent(trained, digits):
    x = cases.test_images(digits, 64)
    result = fisher_spectral_norm(trained, x, solver=Lanczos(num_steps=1, rtol=0.0))
    rows = oracles.root_jacobian(copy.deepcopy(trained).double(), x.double())
    u = result.left_singular_vector.double()[:, :, None]
    exact = (rows @ (rows.mT @ u) - result.eigenvalue.double()[:, None, None] * u).norm(dim=1)[:, 0]
    off = (result.residual - exact).abs() / result.eigenvalue
    assert off.median() < 0.01
    assert off.max() < 0.15


def test_both_sides_bracket_the_eigenvalue(trained, digits):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 32).double()
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue
    result = fisher_spectral_norm(model, x, solver=Lanczos(num_steps=1, rtol=0.0))
    found = result.interval(trace=fisher_trace(model, x, estimator=Exact()))
    assert found.failure_probability == 0
    assert (found.lower <= exact).all()
    assert (exact <= found.upper).all()


def test_eigenvector_turns_the_distribution_as_the_eigenvalue_says(trained, digits):
    # KL(p_x || p_{x + eps v}) = lambda eps^2 / 2 + O(eps^3): the ratio must approach 1 linearly in eps.
    # The noise moves the flat background of the digits off the kinks of max pooling.
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 16).double()
    x = x + 0.05 * torch.randn_like(x)
    result = fisher_spectral_norm(model, x, solver=Exact())

    def ratio(step):
        log_p, log_q = model(x).log_softmax(1), model(x + step * result.eigenvector).log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(1)
        return divergence / (0.5 * result.eigenvalue * step**2)

    with torch.no_grad():
        # the median stands for the examples whose step crosses no kink
        coarse, fine = ((ratio(step) - 1).abs().median() for step in (1e-4, 1e-5))
    assert coarse < 0.01
    assert 5 < coarse / fine < 20


def test_trace_agrees_with_the_definition_and_bounds_the_eigenvalue(trained, digits):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 8).double()
    expected = oracles.fisher_by_scores(model, x).diagonal(dim1=1, dim2=2).sum(1)
    assert_close(fisher_trace(model, x), expected, rtol=1e-10, atol=0)
    sampled = fisher_trace(model, x, estimator=Hutchinson(400))
    assert ((sampled - expected).abs() <= 5 * (2 / 400) ** 0.5 * expected).all()
    assert (fisher_spectral_norm(model, x).eigenvalue <= expected * (1 + 1e-10)).all()


def test_closed_form_of_a_linear_two_class_model():
    # z = W x has F = p (1 - p) (w0 - w1)(w0 - w1)^T
    model, x = nn.Linear(7, 2).double(), torch.randn(5, 7, dtype=torch.float64)
    p = model(x).softmax(1)[:, 0]
    contrast = model.weight[0] - model.weight[1]
    result = fisher_spectral_norm(model, x)
    assert_close(result.eigenvalue, (p * (1 - p) * contrast.square().sum()).detach())
    alignment = (result.eigenvector @ contrast / contrast.norm()).abs()
    assert_close(alignment.detach(), torch.ones(5, dtype=torch.float64))


def test_bernoulli_and_gaussian_have_their_closed_forms():
    model, x = nn.Linear(7, 3, bias=False).double(), torch.randn(4, 7, dtype=torch.float64)
    w = model.weight.detach()
    gaussian = fisher_spectral_norm(model, x, likelihood=Gaussian(variance=0.25), solver=Exact())
    assert_close(gaussian.eigenvalue, (4 * torch.linalg.matrix_norm(w, 2) ** 2).expand(4))
    p = model(x).sigmoid().detach()
    expected = torch.stack([torch.linalg.eigvalsh(w.T @ torch.diag(q * (1 - q)) @ w)[-1] for q in p])
    for solver in (Exact(), Lanczos(3, rtol=1e-6)):
        assert_close(fisher_spectral_norm(model, x, likelihood=Bernoulli(), solver=solver).eigenvalue, expected)


def test_input_std_converts_to_pixel_units():
    network, std = cases.tiny_network().double(), torch.rand(6, dtype=torch.float64) + 0.5
    pixels = torch.randn(4, 6, dtype=torch.float64)
    in_pixels = fisher_spectral_norm(lambda x: network((x - 0.3) / std), pixels)
    converted = fisher_spectral_norm(network, (pixels - 0.3) / std, input_std=std)
    assert_close(converted.eigenvalue, in_pixels.eigenvalue)
    assert_close(
        fisher_trace(network, (pixels - 0.3) / std, input_std=std),
        fisher_trace(lambda x: network((x - 0.3) / std), pixels),
    )


def test_the_cheaper_solver_is_chosen_and_told():
    x = torch.randn(2, 6)
    assert isinstance(fisher_spectral_norm(nn.Linear(6, 5), x).solver, Exact)
    assert isinstance(fisher_spectral_norm(nn.Linear(6, 10), x).solver, Lanczos)


def test_the_cost_of_lanczos_does_not_depend_on_the_number_of_classes():
    x = torch.randn(2, 6)
    solver = Lanczos(num_steps=2, rtol=0.0)
    counts = {fisher_spectral_norm(nn.Linear(6, k), x, solver=solver).num_matvecs for k in (10, 1000)}
    assert counts == {1 + 2 * 2 + 1}


def test_a_constant_direction_and_a_saturated_softmax_give_zero_and_not_nan():
    flat = fisher_spectral_norm(lambda x: x.sum(1, keepdim=True) * torch.ones(1, 3), torch.randn(2, 6))
    assert_close(flat.eigenvalue, torch.zeros(2), rtol=0, atol=1e-10)
    sure = fisher_spectral_norm(lambda x: 1e4 * x[:, :3], torch.tensor([[1.0, 0.0, -1.0, 0.0]]))
    assert_close(sure.eigenvalue, torch.zeros(1))
    assert sure.converged.all()


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return gradient * x.cos()


def test_an_operation_without_forward_mode_is_differentiated_twice_instead():
    weight, x = torch.randn(6, 4), torch.randn(3, 6)
    result = fisher_spectral_norm(lambda x: _NoForwardMode.apply(x) @ weight, x, solver=Lanczos(3))
    assert_close(result.eigenvalue, fisher_spectral_norm(lambda x: x.sin() @ weight, x, solver=Lanczos(3)).eigenvalue)


def test_a_part_under_no_grad_is_refused_and_a_detached_one_is_right():
    weight, x = torch.randn(6, 5), torch.randn(3, 6)

    def partly_without_gradient(x):
        with torch.no_grad():
            rest = 5 * x
        return (x + rest) @ weight

    with pytest.raises(ValueError, match="not transposes of each other.*no_grad"):
        fisher_spectral_norm(partly_without_gradient, x, solver=Lanczos())
    for solver in (Exact(), Lanczos()):
        detached = fisher_spectral_norm(lambda x: (x + 5 * x.detach()) @ weight, x, solver=solver)
        expected = fisher_spectral_norm(lambda y: (y + 5 * x) @ weight, x, solver=solver)
        assert_close(detached.eigenvalue, expected.eigenvalue)


@pytest.mark.parametrize("solver", [Exact(), Lanczos(num_steps=10, rtol=1e-4)])
def test_several_eigenpairs_agree_with_the_definition(trained, digits, solver):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 4).double()
    dense = oracles.fisher_by_scores(model, x)
    expected = torch.linalg.eigvalsh(dense).flip(1)[:, :3]
    result = fisher_eigenpairs(model, x, 3, solver=solver)
    assert_close(result.eigenvalue, expected, rtol=1e-4, atol=1e-12)
    assert result.eigenvector.shape == (4, 3, *x.shape[1:])
    v = result.eigenvector.flatten(2)
    assert_close((v @ dense).norm(dim=2), expected, rtol=1e-3, atol=1e-10)


def test_more_eigenpairs_than_outputs_are_refused():
    with pytest.raises(ValueError, match="between 1 and K = 4; got 5"):
        fisher_eigenpairs(cases.tiny_network(), torch.randn(2, 6), 5)


def test_effective_rank_is_the_trace_over_the_norm_and_zero_without_either(trained, digits):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 8).double()
    rank = fisher_effective_rank(model, x, solver=Exact(), estimator=Exact())
    dense = oracles.fisher_by_scores(model, x)
    assert_close(rank, dense.diagonal(dim1=1, dim2=2).sum(1) / oracles.top_eigenvalue(dense))
    assert_close(fisher_effective_rank(lambda x: 0 * x[:, :3], torch.randn(2, 6)), torch.zeros(2))


def test_infinite_derivatives_are_named():
    with pytest.raises(NonFiniteJacobianError, match="logits of 2 of 2 examples are finite, but their derivatives"):
        fisher_spectral_norm(lambda x: x[:, :3].sqrt(), torch.zeros(2, 6))


@pytest.mark.parametrize("solver", [Exact(), Lanczos(), PowerIteration()])
@pytest.mark.parametrize(
    ("slope", "value", "count"), [(1e25, torch.inf, "0 .* small and 2"), (1e-25, 0.0, "2 .* small")]
)
def test_an_eigenvalue_outside_the_range_of_the_numbers_is_told_and_does_not_count_as_converged(
    solver, slope, value, count
):
    with pytest.warns(UserWarning, match=count):
        result = fisher_spectral_norm(lambda x: slope * x[:, :3], torch.zeros(2, 6), solver=solver)
    assert result.eigenvalue.tolist() == [value, value]
    assert not result.converged.any()


@pytest.mark.parametrize("solver", [Exact(), Lanczos(), PowerIteration()])
@pytest.mark.parametrize("scale", [1.0, 10.0, 20.0, 80.0])
def test_a_saturated_prediction_keeps_its_small_eigenvalue_in_single_precision(solver, scale):
    torch.manual_seed(0)
    weight, x = torch.randn(10, 30, dtype=torch.float64), torch.randn(8, 30, dtype=torch.float64)
    z = scale * x @ weight.T
    jacobian = scale * weight.expand(8, 10, 30)
    log_p = z.log_softmax(1)
    pairs = [  # sum over pairs of p_j p_k (v_j - v_k)^2: no cancellation
        (log_p[:, j] + log_p[:, k]).exp()[:, None, None]
        * torch.einsum("bi,bj->bij", *[jacobian[:, j] - jacobian[:, k]] * 2)
        for j in range(10)
        for k in range(j)
    ]
    expected = torch.linalg.eigvalsh(sum(pairs))[:, -1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*eigenvalues are too small")
        found = fisher_spectral_norm(lambda x: scale * x @ weight.float().T, x.float(), solver=solver).eigenvalue
    assert_close(found.double(), expected, rtol=0.02, atol=1e-36)  # where its squares leave the range of the numbers
