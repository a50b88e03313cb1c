"""Gradients of the penalties against autograd through the dense Fisher matrix."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from fisher_reg import (
    L2,
    Bernoulli,
    BoundPenalty,
    Categorical,
    Exact,
    Gaussian,
    KLPenalty,
    LabelContrastPenalty,
    LInf,
    SpectralPenalty,
    TracePenalty,
    fisher_bound,
    fisher_spectral_norm,
    fisher_trace,
    mean_log1p,
)
from fisher_reg.penalty import TrainingPoint
from fisher_reg.penalty import trace as trace_module
from tests import cases


def _dense_fisher(model, x):
    """F per example with a graph to the parameters, from forward-over-reverse-free dense Jacobians. (B, K, d)."""

    def g(example):
        return 2 * (0.5 * model(example[None]).log_softmax(1)).exp()[0]

    with sdpa_kernel(SDPBackend.MATH):
        jacobians = [torch.autograd.functional.jacobian(g, example, create_graph=True).flatten(1) for example in x]
    return [jacobian @ jacobian.T for jacobian in jacobians]


def _gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_gradient_of_the_converged_penalty_is_that_of_the_dense_eigenvalue(trained, digits, record_property):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 3).double()
    dense = torch.stack([torch.linalg.eigvalsh(gram)[-1] for gram in _dense_fisher(model, x)]).mean()
    expected = _gradient(dense, model)
    penalty = SpectralPenalty(num_steps=9)(model, x)
    gradient = _gradient(penalty, model)
    error = ((gradient - expected).norm() / expected.norm()).item()
    record_property("relative_gradient_error", error)
    assert_close(penalty, dense, rtol=1e-8, atol=0)
    assert error < 1e-6


def test_gradient_of_log1p_is_that_of_the_dense_one(trained, digits):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 2).double()
    dense = torch.stack([torch.linalg.eigvalsh(gram)[-1] for gram in _dense_fisher(model, x)]).log1p().mean()
    penalty = SpectralPenalty(num_steps=9, reduction=mean_log1p)(model, x)
    assert_close(_gradient(penalty, model), _gradient(dense, model), rtol=1e-5, atol=1e-8)


def test_closed_form_is_the_two_class_one_with_its_full_gradient(trained, digits):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 4).double().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(x)
    pair = logits.topk(2, dim=1)
    p = logits.softmax(1).gather(1, pair.indices)
    (slope,) = torch.autograd.grad((pair.values[:, 0] - pair.values[:, 1]).sum(), x, create_graph=True)
    expected = (p[:, 0] * p[:, 1] * slope.flatten(1).square().sum(1)).mean()
    penalty = SpectralPenalty()(model, x)
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model))
    assert penalty <= fisher_spectral_norm(model, x.detach()).eigenvalue.mean()


def test_value_is_the_estimate(trained, digits):
    x = cases.test_images(digits, 8)
    penalty = SpectralPenalty(num_steps=9)(trained, x)
    exact = fisher_spectral_norm(trained, x, solver=Exact()).eigenvalue.mean()
    assert_close(penalty, exact, rtol=1e-4, atol=0)


def test_trace_penalty_is_unbiased_in_value_and_gradient(monkeypatch):
    # all 2^K sign vectors at once make the expectation exact
    model, x = cases.tiny_network().double(), torch.randn(3, 6, dtype=torch.float64)
    signs = iter(torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64))
    monkeypatch.setattr(trace_module, "signs", lambda like, generator: next(signs).expand_as(like))
    penalty = TracePenalty(num_samples=16)(model, x)
    dense = torch.stack([gram.trace() for gram in _dense_fisher(model, x)]).mean()
    assert_close(penalty, dense)
    assert_close(penalty.detach(), fisher_trace(model, x).mean())
    assert_close(_gradient(penalty, model), _gradient(dense, model))


def test_trace_penalty_follows_its_generator():
    model, x = cases.tiny_network(), torch.randn(3, 6)
    first, again, other = (TracePenalty()(model, x, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert_close(first, again, rtol=0, atol=0)
    assert first != other


def _hand_written_batch_norm(model, x):
    """mean_i of lambda_max for Linear, BatchNorm, Tanh, Identity, Linear, statistics constant in x, live in theta."""
    first, norm, _, _, last = model
    hidden = first(x)
    mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)
    scale = norm.weight / (variance + norm.eps).sqrt()
    normal = (hidden - mean) * scale + norm.bias
    p = last(normal.tanh()).softmax(1)
    values = []
    for slope, q in zip(1 - normal.tanh() ** 2, p, strict=True):
        jacobian = last.weight @ torch.diag(slope) @ torch.diag(scale) @ first.weight
        values.append(torch.linalg.eigvalsh(jacobian.T @ (torch.diag(q) - torch.outer(q, q)) @ jacobian)[-1])
    return torch.stack(values).mean()


def test_in_training_mode_the_penalty_sees_the_batch_statistics_and_their_gradient():
    model, x = cases.tiny_network(batch_norm=True).double().train(), torch.randn(8, 6, dtype=torch.float64)
    nn.init.normal_(model[1].weight)
    expected = _hand_written_batch_norm(model, x)
    penalty = SpectralPenalty(num_steps=4)(model, x)
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model), rtol=1e-6, atol=1e-12)


def test_rescaling_a_weight_before_batch_norm_changes_nothing():
    # The trained function is invariant, so the gradient along the weight is zero (up to eps in the batch norm).
    model, x = cases.tiny_network(batch_norm=True).double().train(), torch.randn(8, 6, dtype=torch.float64)
    model[1].eps = 1e-14
    weight = model[0].weight
    (gradient,) = torch.autograd.grad(SpectralPenalty()(model, x), weight)
    assert gradient.norm() > 1e-3
    assert abs((gradient * weight).sum()) < 1e-10


def test_running_statistics_do_not_move_and_the_modes_stay():
    model, x = cases.tiny_network(batch_norm=True, dropout=True).train(), torch.randn(8, 6)
    state = copy.deepcopy(model.state_dict())
    for penalty in (SpectralPenalty(), SpectralPenalty(num_steps=2), TracePenalty()):
        penalty(model, x).backward()
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())
    assert model[1].track_running_stats


def test_gradients_that_are_there_are_added_to_and_not_deleted():
    model, x = cases.tiny_network(), torch.randn(4, 6)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    SpectralPenalty(num_steps=2)(model, x)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())


@pytest.mark.parametrize("penalty", [SpectralPenalty(), SpectralPenalty(num_steps=3), TracePenalty(), KLPenalty()])
@pytest.mark.parametrize("logits", ["constant", "saturated", "tied"])
def test_degenerate_points_have_finite_gradients(penalty, logits):
    weight = {
        "constant": torch.zeros(4, 6),
        "saturated": 1e3 * torch.randn(4, 6),
        "tied": torch.eye(4, 6),  # the top eigenvalue at x = 0 is repeated three times
    }[logits].requires_grad_()
    value = penalty(lambda x: x @ weight.T, torch.zeros(2, 6) if logits == "tied" else torch.ones(2, 6))
    (gradient,) = torch.autograd.grad(value, weight)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_works_under_no_grad_and_inference_mode_and_autocast():
    model, x = cases.tiny_network(), torch.randn(4, 6)
    expected = SpectralPenalty()(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(SpectralPenalty()(model, x), expected, rtol=0, atol=0)
    with torch.no_grad():
        assert_close(SpectralPenalty()(model, x), expected, rtol=0, atol=0)


def test_half_precision_parameters_receive_the_gradient():
    model, x = cases.tiny_network().bfloat16(), torch.randn(4, 6, dtype=torch.bfloat16)
    SpectralPenalty(num_steps=2)(model, x).backward()
    assert all(parameter.grad is not None for parameter in (model[0].weight, model[4].weight))
    assert model[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_value_can_be_had_in_inference_mode(dtype):
    model, x = cases.tiny_network(batch_norm=True).train().to(dtype), torch.randn(4, 6)
    expected = SpectralPenalty()(model, x.to(dtype))
    with torch.inference_mode():
        assert_close(SpectralPenalty()(model, x.to(dtype)).detach().clone(), expected.detach())


def test_gaussian_penalty_is_its_closed_form():
    model, x = nn.Linear(6, 3).double(), torch.randn(2, 6, dtype=torch.float64)
    penalty = SpectralPenalty(num_steps=3, likelihood=Gaussian(variance=2.0))(model, x)
    assert_close(penalty, torch.linalg.matrix_norm(model.weight, 2) ** 2 / 2)


def test_dropout_keeps_one_mask_during_a_solve():
    # with another mask per application the solver would meet a different operator each time and not converge
    model, x = cases.tiny_network(dropout=True).double().train(), torch.randn(3, 6, dtype=torch.float64)
    penalties = []
    for _ in range(20):
        state = torch.get_rng_state()
        penalties.append(SpectralPenalty(num_steps=4)(model, x))
        torch.set_rng_state(state)
        logits_mask = model[3](torch.ones(3, 5, dtype=torch.float64))
        frozen = lambda y, mask=logits_mask: model[4](mask * model[2](model[0](y)))  # noqa: E731
        assert_close(penalties[-1].detach(), fisher_spectral_norm(frozen, x).eigenvalue.mean())
    assert len({round(value.item(), 9) for value in penalties}) > 1


def test_bad_settings_and_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="num_steps >= 0; got -1"):
        SpectralPenalty(num_steps=-1)
    with pytest.raises(ValueError, match="num_samples >= 1; got 0"):
        TracePenalty(num_samples=0)
    with pytest.raises(ValueError, match="floating-point"):
        SpectralPenalty()(cases.tiny_network(), torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="K = 1"):
        SpectralPenalty()(nn.Linear(6, 1), torch.zeros(2, 6))


def test_functional_parameters_receive_the_gradient():
    model, x = cases.tiny_network().double(), torch.randn(2, 6, dtype=torch.float64)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    value = SpectralPenalty()(lambda y: functional_call(model, parameters, (y,)), x)
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    assert_close(gradients[0], torch.autograd.grad(SpectralPenalty()(model, x), model[0].weight)[0])


def _spectral_normed_products(model):
    """2 log of the product of singular values and of the distance of the last rows, less log 4, for two layers."""
    first, last = model[0].weight.double(), model[-1].weight.double()
    distances = (last[:, None] - last[None]).square().sum(2)
    return 2 * torch.linalg.matrix_norm(first, 2).log() + distances.max().log() - math.log(4)


def test_the_bound_penalty_is_the_log_of_the_bound_with_its_gradient():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(3, 6)
    penalty = BoundPenalty()(model, x)
    assert_close(penalty.item() / math.log(10), fisher_bound(model, x).log10_value, rtol=1e-9, atol=0)
    expected = _spectral_normed_products(model)
    assert_close(penalty.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(penalty, [model[0].weight, model[2].weight]),
        torch.autograd.grad(expected, [model[0].weight, model[2].weight]),
        strict=True,
    ):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    std = torch.full((6,), 0.5)
    assert_close(BoundPenalty(input_std=std)(model, x), penalty + 2 * math.log(2))


def test_descending_the_bound_penalty_lowers_the_bound_of_each_family(family, digits):
    model, x = cases.network(family, digits), cases.test_images(digits, 4)
    if family == "vit":
        nn.init.normal_(model.network.heads.head.weight)
    model.eval()
    before = fisher_bound(model, x).log10_value
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        BoundPenalty()(model, x).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
    assert fisher_bound(model, x).log10_value < before - 0.01


def test_the_bound_penalty_gains_nothing_from_a_weight_that_batch_norm_rescales():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, eps=1e-9), nn.ReLU(), nn.Linear(5, 3)).double().train()
    x = torch.randn(16, 6, dtype=torch.float64)
    (slope,) = torch.autograd.grad(BoundPenalty()(model, x), model[0].weight)
    assert_close((slope * model[0].weight).sum().item(), 0.0, rtol=0, atol=1e-6)  # eps over the variance
    assert slope.norm() > 1e-3
    assert model[1].num_batches_tracked == 0
    (frozen_slope,) = torch.autograd.grad(BoundPenalty()(model.eval(), x), model[0].weight)
    assert (frozen_slope * model[0].weight).sum() > 1  # with running statistics it would shrink the weight instead


def test_the_bound_penalty_refuses_a_function():
    with pytest.raises(ValueError, match="needs the weights of an nn.Module; got function"):
        BoundPenalty()(lambda x: x, torch.zeros(1, 2))


def _runner_up_step(model, x, step, std=1.0):
    """x + step v / std for the unit v along which the two likeliest logits approach each other fastest."""
    x = x.detach().requires_grad_()
    pair = model(x).topk(2, dim=1).values
    (slope,) = torch.autograd.grad((pair[:, 1] - pair[:, 0]).sum(), x)
    slope = slope / std
    lengths = slope.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
    return x.detach() + step * slope / lengths / std


@pytest.mark.parametrize("std", [1.0, 0.25])
def test_gradient_of_the_kl_penalty_is_that_of_the_divergence_at_a_fixed_step(trained, digits, std):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 4).double()
    log_p, log_q = model(x).log_softmax(1), model(_runner_up_step(model, x, 0.3, std)).log_softmax(1)
    expected = 2 / 0.3**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
    input_std = None if std == 1 else torch.tensor(std, dtype=torch.float64)
    penalty = KLPenalty(step=0.3, input_std=input_std)(model, x)
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model), rtol=1e-6, atol=1e-10)


def test_the_kl_penalty_tends_to_the_quadratic_form_in_the_first_order():
    torch.manual_seed(0)
    model, x = cases.tiny_network().double(), torch.randn(5, 6, dtype=torch.float64)
    unit = _runner_up_step(model, x, 1.0) - x
    limit = torch.stack(
        [
            v @ jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian @ v
            for v, jacobian, p in zip(
                unit,
                (torch.autograd.functional.jacobian(model, example) for example in x),
                model(x).softmax(1),
                strict=True,
            )
        ]
    ).mean()
    errors = [abs(float(KLPenalty(step=step)(model, x) - limit)) for step in (1e-2, 1e-3)]
    assert_close(math.log10(errors[0] / errors[1]), 1.0, rtol=0, atol=0.1)
    assert limit <= fisher_spectral_norm(model, x, solver=Exact()).eigenvalue.mean()


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(variance=2.0)])
def test_the_kl_penalty_of_each_likelihood_is_bounded_by_the_eigenvalue_for_short_steps(likelihood):
    torch.manual_seed(0)
    model, x = cases.tiny_network().double(), torch.randn(5, 6, dtype=torch.float64)
    penalty = KLPenalty(step=1e-4, likelihood=likelihood)(model, x)
    top = fisher_spectral_norm(model, x, solver=Exact(), likelihood=likelihood).eigenvalue.mean()
    assert 0 < penalty < top * 1.001


def test_the_kl_penalty_moves_with_the_dropout_masks_of_its_point():
    # other masks would leave a divergence that does not vanish with the step
    model, x = cases.tiny_network(dropout=True).double().train(), torch.randn(64, 6, dtype=torch.float64)
    values = [KLPenalty(step=step)(model, x).item() for step in (1e-2, 1e-4)]
    assert values[1] < 10 * values[0]
    before = torch.get_rng_state()
    KLPenalty()(model, x)
    assert torch.equal(torch.get_rng_state(), before)  # no forward leaves a trace


def test_the_kl_penalty_in_training_mode_keeps_the_batch_statistics_of_its_point():
    torch.manual_seed(0)
    model, x = cases.tiny_network(batch_norm=True).double().train(), torch.randn(8, 6, dtype=torch.float64)
    first, norm, _, _, last = model

    def function(inputs, mean, variance):
        return last(((first(inputs) - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).tanh())

    hidden = first(x)
    mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)
    moved = _runner_up_step(lambda inputs: function(inputs, mean.detach(), variance.detach()), x, 0.5)
    log_p, log_q = (function(inputs, mean, variance).log_softmax(1) for inputs in (x, moved))
    expected = 8 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
    penalty = KLPenalty(step=0.5)(model, x)
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model), rtol=1e-6, atol=1e-12)


def test_a_saturated_network_hides_from_the_fisher_penalties_and_not_from_the_others():
    def slopes(confidence):
        weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        model, x = (lambda x: confidence * (x @ weight.T)), torch.tensor([[1.0, 0.0]])
        logit_penalties = (
            TracePenalty(likelihood=Gaussian())(model, x),
            LabelContrastPenalty()(model, x, labels=torch.tensor([0])),
        )
        return [SpectralPenalty()(model, x), TracePenalty()(model, x), *logit_penalties]

    calm, confident = slopes(1.0), slopes(100.0)
    assert confident[0] < 1e-6 < calm[0]
    assert confident[1] < 1e-6 < calm[1]
    assert_close(confident[2], 1e4 * calm[2])
    assert_close(confident[3], 1e4 * calm[3])


def test_the_label_contrast_is_the_squared_slope_of_the_margin(trained, digits):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 4).double().requires_grad_()
    labels = torch.tensor([3, 1, 4, 1])
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(x)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    margin = logits.gather(1, labels[:, None]).squeeze(1) - others
    (slope,) = torch.autograd.grad(margin.sum(), x, create_graph=True)
    expected = slope.flatten(1).square().sum(1).mean()
    penalty = LabelContrastPenalty()(model, x, labels=labels)
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model))


def test_the_trace_of_the_gaussian_is_the_frobenius_norm_of_the_jacobian(monkeypatch):
    model, x = cases.tiny_network().double(), torch.randn(3, 6, dtype=torch.float64)
    signs = iter(torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64))
    monkeypatch.setattr(trace_module, "signs", lambda like, generator: next(signs).expand_as(like))
    penalty = TracePenalty(num_samples=16, likelihood=Gaussian())(model, x)
    jacobians = [torch.autograd.functional.jacobian(model, example, create_graph=True) for example in x]
    expected = torch.stack([jacobian.square().sum() for jacobian in jacobians]).mean()
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels="),
        (torch.tensor([0.5, 0.5]), r"2 class indices below 4; got torch.float32 \(2,\) from 0.5 to 0.5.*labels_fn"),
        (torch.tensor([0, 4]), "from 0 to 4"),
        (torch.tensor([0]), r"got torch.int64 \(1,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        LabelContrastPenalty()(cases.tiny_network(), torch.zeros(2, 6), labels=labels)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_that_is_no_length_is_refused(step):
    with pytest.raises(ValueError, match=f"finite step > 0, in the input unit; got {step}"):
        KLPenalty(step=step)


def test_the_step_is_a_share_of_the_distance_between_the_classes():
    inputs = torch.tensor([[0.0, 0.0], [0.1, 0.0], [3.0, 4.0], [3.1, 4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    nearest = sorted([5.0, (2.9**2 + 16) ** 0.5, (2.9**2 + 16) ** 0.5, 5.0])[1]  # the lower median
    penalty = KLPenalty.from_batch(inputs, labels, share=0.1)
    assert penalty.step == pytest.approx(0.1 * nearest, rel=1e-6)
    assert penalty.default_weight == pytest.approx(0.8 * penalty.step**2 / 2)
    scaled = KLPenalty.from_batch(inputs / 2, labels, share=0.1, input_std=2.0)
    assert scaled.step == pytest.approx(penalty.step)
    assert scaled.input_std == 2.0
    assert KLPenalty.from_batch(inputs, labels.flip(0), share=0.1).step == pytest.approx(penalty.step)


def test_a_sign_step_from_a_batch_has_the_euclidean_length():
    inputs, labels = torch.rand(8, 3, 4, 4), torch.arange(8) % 2
    l2, linf = (KLPenalty.from_batch(inputs, labels, geometry=geometry) for geometry in (L2(), LInf()))
    assert linf.step * 48**0.5 == pytest.approx(l2.step)
    assert linf.default_weight == pytest.approx(6 * linf.step**2 / 2)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.rand(4, 3), torch.zeros(4, dtype=torch.long), "4 inputs of 1 classes"),
        (torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), "needs different inputs of two classes"),
        (torch.rand(4, 3), torch.rand(4), r"class indices of the 4 inputs, \(4,\); got torch.float32"),
        (torch.rand(4, 3), torch.tensor([0, 1]), r"got torch.int64 \(2,\)"),
    ],
)
def test_a_batch_without_a_distance_between_classes_is_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        KLPenalty.from_batch(inputs, labels)


def test_a_graph_that_is_used_once_is_freed():
    network = cases.tiny_network()
    x = torch.rand(4, 6, requires_grad=True)
    logits = network(x)
    point = TrainingPoint(network, x, logits, logits.detach().requires_grad_(), is_used_once=True)
    KLPenalty().at(point).backward()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(logits.sum(), x)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_sign_step_and_its_gradient_are_those_of_a_dense_expression(batch_norm):
    torch.manual_seed(3)
    network, x = cases.tiny_network(batch_norm).double().eval(), torch.randn(5, 6, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: network(one[None])[0]))(x).detach()
    z = network(x)
    first, second = z.topk(2, dim=1).indices.unbind(1)
    rows = torch.arange(5)
    direction = -(jacobian[rows, first] - jacobian[rows, second]).sign()
    log_p, log_q = z.log_softmax(1), network(x + 0.1 * direction).log_softmax(1)
    expected = 2 / 0.1**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
    value = KLPenalty(step=0.1, geometry=LInf())(network, x)
    assert_close(value, expected)
    parameters = list(network.parameters())
    assert_close(
        torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters), rtol=1e-6, atol=1e-10
    )


def test_the_two_class_form_in_linf_and_its_gradient_are_those_of_a_dense_expression():
    torch.manual_seed(3)
    network, x = cases.tiny_network().double(), torch.randn(5, 6, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: network(one[None])[0]))(x)
    z = network(x)
    p, index = z.softmax(1).topk(2, dim=1)
    rows = torch.arange(5)
    contrast = jacobian[rows, index[:, 0]] - jacobian[rows, index[:, 1]]
    expected = (p[:, 0] * p[:, 1] * contrast.abs().sum(1).square()).mean()
    value = SpectralPenalty(geometry=LInf())(network, x)
    assert_close(value, expected)
    parameters = list(network.parameters())
    assert_close(
        torch.autograd.grad(value, parameters),
        torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True),
        rtol=1e-6,
        atol=1e-10,
    )
