"""The divergence of two near predictions, against two hundred digits."""

import copy

import mpmath
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import Bernoulli, Categorical, Gaussian, KLPenalty, MarginTempered, fisher_spectral_norm
from fisher_reg.divergence import categorical_divergence, exp_remainder
from tests import cases

mpmath.mp.dps = 200


def _in_many_digits(logits, moved):
    """KL and its derivative to both, of one row, from the definition."""
    z, w = ([mpmath.mpf(value) for value in row.tolist()] for row in (logits, moved))
    p, q = ([mpmath.exp(a - mpmath.log(sum(map(mpmath.exp, row)))) for a in row] for row in (z, w))
    ratio = [mpmath.log(a / b) for a, b in zip(p, q, strict=True)]
    value = sum(a * r for a, r in zip(p, ratio, strict=True))
    to_logits = [a * (r - value) for a, r in zip(p, ratio, strict=True)]
    to_moved = [b - a for a, b in zip(p, q, strict=True)]
    return float(value), torch.tensor([float(entry) for entry in to_logits + to_moved], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("confidence", [0.0, 10.0, 20.0, 60.0])
@pytest.mark.parametrize("step", [1e-6, 1e-3, 0.3, 5.0, 50.0])
def test_the_divergence_has_all_digits_of_the_logits_in_value_and_gradient(dtype, confidence, step):
    logits = torch.randn(4, 5, dtype=dtype)
    logits[:, 1] += confidence
    moved = logits + step * torch.randn(4, 5, dtype=dtype)
    logits.requires_grad_()
    moved.requires_grad_()
    for z, w in zip(logits, moved, strict=True):
        value = categorical_divergence(z[None], w[None])
        gradient = torch.cat(torch.autograd.grad(value.sum(), (z, w))).double()
        expected, expected_gradient = _in_many_digits(z, w)
        # log p has an error of some roundings of the largest logit
        rtol = 6 * torch.finfo(dtype).eps * (5 + float(torch.stack([z, w]).detach().abs().max()))
        assert abs(value.item() / expected - 1) < rtol
        assert (gradient - expected_gradient).norm() < rtol * expected_gradient.norm()


def test_the_remainder_of_the_exponential_and_its_derivative_have_all_digits():
    d = torch.cat([torch.linspace(-3, 1, 41), torch.tensor([1e-12, -1e-5, 0.5, 0.5001])]).double().requires_grad_()
    value = exp_remainder(d)
    (derivative,) = torch.autograd.grad(value.sum(), d)
    exact = [mpmath.mpf(float(entry)) for entry in d]
    expected = torch.tensor([float(mpmath.expm1(entry) - entry) for entry in exact], dtype=torch.float64)
    assert_close(value, expected, rtol=4e-15, atol=0)
    assert_close(derivative, torch.expm1(d), rtol=4e-15, atol=0)


def test_a_prediction_that_turns_far_beyond_the_range_of_the_exponential_has_its_divergence():
    logits = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    moved = torch.tensor([[-300.0, 0.0, 300.0]], requires_grad=True)
    value = categorical_divergence(logits, moved)
    assert_close(value, torch.tensor([600.0]))
    gradients = torch.autograd.grad(value.sum(), (logits, moved))
    assert_close(gradients[1], torch.tensor([[-1.0, 0.0, 1.0]]))
    assert torch.isfinite(gradients[0]).all()


def test_classes_left_out_add_nothing_and_one_that_is_lost_makes_the_divergence_infinite():
    z, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    keep = torch.tensor([True, False, True, True])
    out = torch.tensor(-torch.inf, dtype=torch.float64)
    for likelihood in (Categorical(), MarginTempered(), Bernoulli()):
        full = [value.where(keep, out).requires_grad_() for value in (z, w)]
        part = [value[:, keep].clone().requires_grad_() for value in (z, w)]
        found, expected = likelihood.divergence(*full), likelihood.divergence(*part)
        assert_close(found, expected)
        for gradient, want in zip(
            torch.autograd.grad(found.sum(), full), torch.autograd.grad(expected.sum(), part), strict=True
        ):
            assert_close(gradient[:, keep], want)
            assert (gradient[:, 1] == 0).all()
    assert (categorical_divergence(z, w.where(keep, out)) == torch.inf).all()
    # a class that comes into being takes its mass from the others
    assert_close(
        categorical_divergence(z.where(keep, out), w),
        _kl(z[:, keep].softmax(1), w.softmax(1)[:, keep]),
        rtol=1e-12,
        atol=0,
    )


def _kl(p, q):
    return (p * (p / q).log()).sum(1)


def _penalty_and_gradient(network, x, step, likelihood):
    value = KLPenalty(step=step, likelihood=likelihood)(network, x)
    gradients = torch.autograd.grad(value, list(network.parameters()))
    return value.detach().double(), torch.cat([gradient.flatten().double() for gradient in gradients])


def _fitted_network(confidence):
    x = torch.randn(64, 20)
    network = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 6))
    labels = network(torch.randn(64, 20) + x).argmax(1)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()
    network[2].bias.data[0] += 2 * confidence
    return network, x


@pytest.mark.parametrize("likelihood", [Categorical(), MarginTempered(), Bernoulli(), Gaussian()])
@pytest.mark.parametrize("confidence", [0.0, 20.0])
def test_the_penalty_in_single_precision_is_that_in_double(likelihood, confidence):
    network, x = _fitted_network(confidence)
    if confidence and likelihood == Categorical():
        assert (1 - network(x).double().softmax(1).amax(1)).median() < 1e-8
    for step in (1e-3, 1e-2, 0.1, 1.0):
        value, gradient = _penalty_and_gradient(network, x, step, likelihood)
        exact_value, exact = _penalty_and_gradient(copy.deepcopy(network).double(), x.double(), step, likelihood)
        assert abs(value / exact_value - 1) < 1e-3
        # the gradient is a difference of two backward passes, at x and beside it: eps |z| / step of it is rounding
        assert (gradient - exact).norm() < max(1e-3, 2e-6 / step) * exact.norm()


def test_the_value_of_a_tiny_step_is_that_of_the_matrix():
    network, x = _fitted_network(0.0)
    v = fisher_spectral_norm(copy.deepcopy(network).double(), x.double()).eigenvector
    with torch.no_grad():
        found = 2e8 * Categorical().divergence(network(x), network(x + 1e-4 * v.float())).double()
    exact = fisher_spectral_norm(copy.deepcopy(network).double(), x.double()).eigenvalue
    assert abs(found.mean() / exact.mean() - 1) < 2e-3  # O(step) of the definition, and the forward's rounding


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-38])
def test_a_slope_of_zero_is_no_step_and_a_denormal_one_a_step_of_the_right_length(scale):
    network, x = cases.tiny_network(), torch.randn(3, 6)
    network[-1].weight.data *= scale
    seen = []
    value = KLPenalty(step=0.5)(lambda y: (seen.append(y.detach().clone()), network(y))[1], x)
    gradients = torch.autograd.grad(value, list(network.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert_close((seen[-1] - x).norm(dim=1), torch.full((3,), 0.5 if scale else 0.0))
    if scale == 0:
        assert value == 0
        assert all((gradient == 0).all() for gradient in gradients)
