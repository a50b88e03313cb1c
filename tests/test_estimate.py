"""The estimates against the definition, on trained networks of all four families."""

import copy

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
    fisher_spectral_norm,
    fisher_trace,
)
from fisher_reg import estimate as estimate_module
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


def test_three_lanczos_steps_are_within_one_per_cent_and_never_above(trained, digits, record_property):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 256).double()
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue
    lanczos = fisher_spectral_norm(model, x, solver=Lanczos(num_steps=3))
    error = 1 - lanczos.eigenvalue / exact
    record_property("error_p95", error.quantile(0.95).item())
    record_property("error_median", error.median().item())
    record_property("converged", lanczos.converged.float().mean().item())
    assert error.quantile(0.95) <= 0.01
    assert error.min() > -1e-10


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
    for solver in (Exact(), Lanczos(3)):
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
    assert isinstance(fisher_spectral_norm(nn.Linear(6, 10), x).solver, Exact)
    assert isinstance(fisher_spectral_norm(nn.Linear(6, 50), x).solver, Lanczos)


def test_the_cost_of_lanczos_does_not_depend_on_the_number_of_classes():
    x = torch.randn(2, 6)
    counts = {fisher_spectral_norm(nn.Linear(6, k), x, solver=Lanczos(3)).num_matvecs for k in (10, 1000)}
    assert counts == {8}


def test_chunks_change_nothing(monkeypatch):
    model, x = cases.tiny_network(), torch.randn(7, 6)
    whole, trace = fisher_spectral_norm(model, x, solver=Exact()), fisher_trace(model, x)
    monkeypatch.setattr(estimate_module, "_MAX_DENSE_NUMBERS", 2 * 4 * 6)  # two examples
    chunked = fisher_spectral_norm(model, x, solver=Exact())
    assert_close(chunked.eigenvalue, whole.eigenvalue)
    assert chunked.eigenvector.shape == x.shape
    assert chunked.num_matvecs == 4 * whole.num_matvecs
    assert_close(fisher_trace(model, x), trace)


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
    weight, x = torch.randn(6, 4), torch.randn(3, 6)

    def partly_without_gradient(x):
        with torch.no_grad():
            rest = 5 * x
        return (x + rest) @ weight

    with pytest.raises(ValueError, match="not transposes of each other.*no_grad"):
        fisher_spectral_norm(partly_without_gradient, x)
    detached = fisher_spectral_norm(lambda x: (x + 5 * x.detach()) @ weight, x)
    assert_close(detached.eigenvalue, fisher_spectral_norm(lambda y: (y + 5 * x) @ weight, x).eigenvalue)


def test_infinite_derivatives_are_named():
    with pytest.raises(NonFiniteJacobianError, match="logits of 2 of 2 examples are finite, but their derivatives"):
        fisher_spectral_norm(lambda x: 1e25 * x[:, :3], torch.zeros(2, 6))
