"""The penalty against autograd through the cross-entropy itself."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fisher_reg import L2, FisherRegularizer, GradientNormPenalty, LInf
from tests import cases

LABELS = torch.tensor([0, 1, 2, 3, 0])


def _inputs():
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _input_gradient(function, x, labels):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(function(x), labels, reduction="sum"), x, create_graph=True)
    return gradient


@pytest.mark.parametrize(("geometry", "order"), [(LInf(), 1), (L2(), 2)])
@pytest.mark.parametrize("std", [None, 0.25])
def test_value_and_gradient_are_those_of_the_dual_norm_of_the_input_gradient(geometry, order, std):
    torch.manual_seed(0)
    model, x = cases.tiny_network().double(), _inputs()
    gradient = _input_gradient(model, x, LABELS) / (std or 1.0)
    expected = 0.1 * torch.linalg.vector_norm(gradient, order, dim=1).mean()
    penalty = GradientNormPenalty(epsilon=0.1, input_std=std, geometry=geometry)(model, x, labels=LABELS)
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model))


def test_the_value_is_the_increase_of_the_loss_to_first_order():
    torch.manual_seed(0)
    model, x = cases.tiny_network().double(), _inputs()
    errors = []
    for epsilon in (1e-2, 1e-3):
        moved = x + epsilon * _input_gradient(model, x, LABELS).sign()
        increase = cross_entropy(model(moved), LABELS) - cross_entropy(model(x), LABELS)
        errors.append(float((GradientNormPenalty(epsilon)(model, x, labels=LABELS) - increase).detach().abs()))
    assert_close(torch.tensor(errors[0] / errors[1]).log10(), torch.tensor(2.0), rtol=0, atol=0.1)


def test_batch_norm_in_training_keeps_its_statistics_constant_in_the_inputs():
    torch.manual_seed(0)
    model, x = cases.tiny_network(batch_norm=True).double().train(), _inputs()
    first, norm, _, _, last = model
    hidden = first(x)
    mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)

    def function(inputs):
        return last(((first(inputs) - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).tanh())

    expected = 4 / 255 * _input_gradient(function, x, LABELS).abs().sum(1).mean()
    penalty = GradientNormPenalty()(model, x, labels=LABELS)
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model), rtol=1e-6, atol=1e-12)
    assert norm.num_batches_tracked == 0


def test_a_trainer_does_the_step_that_is_written_by_hand(tmp_path):
    torch.manual_seed(0)
    network = cases.tiny_network().double()
    by_hand = cases.tiny_network().double()
    by_hand.load_state_dict(network.state_dict())
    x, y = _inputs()[:4], LABELS[:4]
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    loss = cross_entropy(by_hand(x), y) + 1.5 * 4 / 255 * _input_gradient(by_hand, x, y).abs().sum(1).mean()
    loss.backward()
    optimizer.step()
    penalty = GradientNormPenalty()
    regularizer = FisherRegularizer(penalty.default_weight, penalty, every_n_steps=1, batch_fraction=1.0)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    cases.trainer(tmp_path, callbacks=[regularizer]).fit(cases.Plain(network), batches)
    for ours, theirs in zip(network.parameters(), by_hand.parameters(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("geometry", [LInf(), L2()])
@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_constant_and_saturated_logits_have_a_finite_value_and_gradient(geometry, scale):
    weight = (scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    x, labels = torch.ones(2, 6), torch.tensor([0, 3])
    value = GradientNormPenalty(geometry=geometry)(lambda inputs: inputs @ weight.T, x, labels=labels)
    (gradient,) = torch.autograd.grad(value, weight)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert (value == 0) == (scale == 0)


def test_a_saturated_slope_is_known_beyond_the_round_off_of_one():
    # p_y - 1 = -3e-11 rounds to zero in single precision
    weight = torch.tensor([[12.0, 0.0], [-12.0, 0.0]])
    value = GradientNormPenalty(epsilon=1.0)(lambda x: x @ weight.T, torch.ones(1, 2), labels=torch.tensor([0]))
    assert_close(value.item(), 24 * torch.tensor(-24.0, dtype=torch.float64).sigmoid().item(), rtol=1e-5, atol=0)


def test_classes_left_out_do_not_count():
    torch.manual_seed(0)
    network, x, labels = nn.Linear(6, 4).double(), _inputs(), torch.tensor([0, 1, 2, 2, 0])
    masked = GradientNormPenalty()(
        lambda inputs: network(inputs).masked_fill(torch.arange(4) == 3, -torch.inf), x, labels=labels
    )
    plain = GradientNormPenalty()(lambda inputs: network(inputs)[:, :3], x, labels=labels)
    assert_close(masked, plain)
    assert_close(_gradient(masked, network), _gradient(plain, network))


def test_the_derivative_at_a_gradient_of_zero_is_zero():
    scale = torch.zeros((), requires_grad=True)
    value = GradientNormPenalty()(lambda x: scale * x[:, :2], torch.ones(1, 3), labels=torch.tensor([0]))
    assert value == 0
    assert torch.autograd.grad(value, scale)[0] == 0


def test_bad_arguments_are_refused_with_what_to_write():
    with pytest.raises(ValueError, match=r"finite epsilon > 0, in the input unit, such as 4/255 .*; got -1"):
        GradientNormPenalty(epsilon=-1)
    with pytest.raises(TypeError, match=r"geometry to be an instance such as L2\(\).*geometry=LInf\(\)"):
        GradientNormPenalty(geometry=LInf)
    with pytest.raises(ValueError, match=r"GradientNormPenalty needs labels=, class indices"):
        GradientNormPenalty()(cases.tiny_network(), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"2 class indices below 4; got torch.int64 \(2,\) from 0 to 4"):
        GradientNormPenalty()(cases.tiny_network(), torch.zeros(2, 6), labels=torch.tensor([0, 4]))
