"""The Fisher quadratic form over the linf ball, of networks."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Bernoulli,
    Gaussian,
    Lanczos,
    NonFiniteJacobianError,
    SignIteration,
    fisher_linf_norm,
    fisher_spectral_norm,
)
from tests import cases, oracles


def _linear(num_inputs, num_outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(num_inputs, num_outputs).double()


def _largest_of_all_vertices(matrices):
    """max over 2^d sign vectors of s^T F s, (B,)."""
    vertices = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=matrices.shape[1])), dtype=matrices.dtype)
    return ((vertices @ matrices) * vertices).sum(2).amax(1)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5])
def test_it_is_the_best_of_all_vertices_of_small_linear_models(num_classes):
    x = 2 * torch.randn(20, 8, dtype=torch.float64)
    for seed in range(5):
        model = _linear(8, num_classes, seed)
        expected = _largest_of_all_vertices(oracles.fisher_by_scores(model, x))
        assert_close(fisher_linf_norm(model, x).value, expected, rtol=1e-4, atol=0)


def test_of_two_classes_it_is_the_squared_l1_norm_of_the_slope(digits):
    network = cases.network("vgg", digits).double().eval()
    x = cases.test_images(digits, 4).double().requires_grad_()

    def model(x):
        return network(x)[:, :2]

    logits = model(x)
    (slope,) = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), x)
    p = logits.softmax(1).detach()
    result = fisher_linf_norm(model, x.detach())
    assert_close(result.value, p.prod(1) * slope.flatten(1).abs().sum(1).square(), rtol=1e-9, atol=0)
    assert result.perturbation.shape == x.shape
    assert result.is_stationary.all()


def test_it_lies_between_what_is_known_of_it(trained, digits):
    model, x = trained, cases.test_images(digits, 16)
    result = fisher_linf_norm(model, x)
    of_eigenvector = fisher_spectral_norm(model, x)
    value, d = result.value.double(), x[0].numel()
    rows = oracles.root_jacobian(model, x).double()  # |rows_k|_1^2 = p_k |grad log p_k|_1^2
    assert (value >= of_eigenvector.eigenvalue * (1 - 1e-4)).all()
    assert (value <= d * of_eigenvector.eigenvalue * 1.01).all()
    assert (value <= rows.abs().sum(2).square().sum(1) * (1 + 1e-4)).all()
    attained = (rows @ result.perturbation.double().flatten(1)[:, :, None]).square().sum((1, 2))
    assert_close(value, attained, rtol=1e-3, atol=0)
    assert result.is_stationary.float().mean() > 0.9


def test_half_of_it_is_the_divergence_along_the_perturbation(trained, digits):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 16).double()
    x = x + 0.05 * torch.randn_like(x)  # off the kinks of the flat background
    result = fisher_linf_norm(model, x)
    eps = 1e-6
    with torch.no_grad():
        log_p, log_q = model(x).log_softmax(1), model(x + eps * result.perturbation).log_softmax(1)
    ratio = (log_p.exp() * (log_p - log_q)).sum(1) / (0.5 * result.value * eps**2)
    assert abs(ratio.median() - 1) < 0.01


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(variance=0.25)])
def test_other_likelihoods_are_the_best_of_all_vertices_too(likelihood):
    model, x = _linear(7, 4), torch.randn(5, 7, dtype=torch.float64)
    p = model(x).sigmoid().detach()
    weight = p * (1 - p) if isinstance(likelihood, Bernoulli) else torch.full_like(p, 4.0)
    w = model.weight.detach()
    expected = _largest_of_all_vertices(w.T @ torch.diag_embed(weight) @ w)
    assert_close(fisher_linf_norm(model, x, likelihood=likelihood).value, expected)


def test_input_std_counts_perturbations_in_pixels():
    network, std = cases.tiny_network().double(), torch.rand(6, dtype=torch.float64) + 0.5
    pixels = torch.randn(4, 6, dtype=torch.float64)
    in_pixels = fisher_linf_norm(lambda x: network((x - 0.3) / std), pixels)
    converted = fisher_linf_norm(network, (pixels - 0.3) / std, input_std=std)
    assert_close(converted.value, in_pixels.value)
    assert_close(converted.perturbation.abs(), torch.ones_like(pixels))


def test_a_constant_and_a_saturated_model_give_zero():
    saturated = _linear(6, 3)
    saturated.bias.data[:] = torch.tensor([2000.0, 0.0, 0.0])
    for model in (lambda x: 0 * x[:, :3], saturated):
        result = fisher_linf_norm(model, torch.randn(3, 6, dtype=torch.float64))
        assert_close(result.value, torch.zeros(3, dtype=torch.float64))
        assert (result.perturbation == 0).all()


def test_side_inputs_follow_their_examples():
    model, x, scale = _linear(6, 3), torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    result = fisher_linf_norm(lambda x, scale: model(scale * x), x, side_inputs=scale)
    for i in range(4):
        alone = fisher_linf_norm(lambda x, i=i: model(scale[i] * x), x[i : i + 1])
        assert_close(result.value[i : i + 1], alone.value)


def test_it_works_in_inference_mode_and_carries_no_gradient():
    model, x = cases.tiny_network(batch_norm=True, dropout=True).train(), torch.randn(3, 6)
    expected = fisher_linf_norm(model, x)
    with torch.inference_mode():
        result = fisher_linf_norm(model, x)
    assert_close(result.value, expected.value)
    assert not expected.value.requires_grad
    assert not expected.perturbation.requires_grad
    assert model.training


def test_the_cost_does_not_grow_with_the_number_of_classes():
    x = torch.randn(3, 50)
    costs = [fisher_linf_norm(nn.Linear(50, k), x).num_matvecs for k in (2, 10, 50, 500)]
    assert costs[0] <= 3
    assert costs[1] <= 11
    assert max(costs) <= 21


def test_a_value_outside_the_range_of_the_numbers_is_told():
    model = nn.Linear(6, 3, bias=False)
    model.weight.data *= 1e-25
    with pytest.warns(UserWarning, match="2 values are too small and 0 too large for torch.float32"):
        fisher_linf_norm(model, torch.randn(2, 6))


def test_infinite_derivatives_are_named():
    with pytest.raises(NonFiniteJacobianError, match="derivatives with respect to the inputs are not"):
        fisher_linf_norm(lambda x: x.abs().sqrt()[:, :3], torch.zeros(2, 6))


@pytest.mark.parametrize("solver", [SignIteration, Lanczos(), "sign"])
def test_another_solver_is_refused(solver):
    with pytest.raises(TypeError, match=r"fisher_linf_norm needs solver .* Write solver=SignIteration\(\)"):
        fisher_linf_norm(nn.Linear(6, 3), torch.randn(2, 6), solver=solver)


def test_a_result_is_one_line():
    result = fisher_linf_norm(_linear(6, 2), torch.zeros(2, 6, dtype=torch.float64), solver=SignIteration(num_starts=2))
    assert repr(result).startswith("SignResult(2 examples: value median ")
    assert "0 not stationary; " in repr(result)
