"""The penalty against the published training step, written by hand."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fisher_reg import FisherRegularizer, NonFiniteLogitsError, NuclearNormPenalty
from fisher_reg.penalty.nuclear_norm import nuclear_norm
from fisher_reg.sampling import signs
from tests import cases

LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def _inputs():
    return torch.rand(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _generator():
    return torch.Generator().manual_seed(3)


def _gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _published(function, x, labels, attack_weight, std=1.0, bounds=(0.0, 1.0)):
    """The regulariser of NuAT with steps of 8/255 from noise of 4/255."""
    batch_size, radius = len(x), 8 / 255 / std
    start = (x + 4 / 255 / std * signs(x, _generator())).clamp(*bounds).requires_grad_()
    logits, clean = function(start), function(x).detach()
    norm = torch.linalg.matrix_norm(clean - logits, "nuc")
    objective = cross_entropy(logits, labels) + attack_weight * norm / batch_size
    (slope,) = torch.autograd.grad(objective, start)
    stepped = (start.detach() + radius * slope.sign()).clamp(*bounds)
    moved = (x + (stepped - x).clamp(-radius, radius)).clamp(*bounds)
    return torch.linalg.matrix_norm(function(x) - function(moved), "nuc") / batch_size


@pytest.mark.parametrize(("share", "attack_weight"), [(1.0, 4.5), (0.0, 0.0)])
def test_value_and_gradient_are_those_of_the_published_step(share, attack_weight):
    torch.manual_seed(0)
    model, x = cases.tiny_network().double(), _inputs()
    expected = _published(model, x, LABELS, attack_weight)
    penalty = NuclearNormPenalty(attack_share=share)(model, x, labels=LABELS, generator=_generator())
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model))


def test_pixel_units_are_those_of_the_inputs_before_normalisation():
    torch.manual_seed(0)
    model, x = cases.tiny_network().double(), 4 * _inputs() - 2
    expected = _published(model, x, LABELS, 4.5, std=0.25, bounds=(-torch.inf, torch.inf))
    penalty = NuclearNormPenalty(attack_share=1.0, bounds=None, input_std=0.25)
    value = penalty(model, x, labels=LABELS, generator=_generator())
    assert_close(value, expected)
    assert_close(_gradient(value, model), _gradient(expected, model))


def test_batch_norm_in_training_keeps_the_statistics_of_the_clean_batch():
    torch.manual_seed(0)
    model, x = cases.tiny_network(batch_norm=True).double().train(), _inputs()
    first, norm, _, _, last = model
    hidden = first(x)
    mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)

    def function(inputs):
        return last(((first(inputs) - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).tanh())

    expected = _published(function, x, LABELS, 4.5)
    penalty = NuclearNormPenalty(attack_share=1.0)(model, x, labels=LABELS, generator=_generator())
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model), rtol=1e-6, atol=1e-12)
    assert norm.num_batches_tracked == 0


def test_a_trainer_does_the_step_that_is_written_by_hand(tmp_path):
    torch.manual_seed(0)
    network = cases.tiny_network().double()
    by_hand = cases.tiny_network().double()
    by_hand.load_state_dict(network.state_dict())
    x, y = _inputs(), LABELS
    # a step without noise needs no random number of the trainer
    penalty = NuclearNormPenalty(noise=0.0, attack_share=0.0)
    slope = torch.autograd.grad(cross_entropy(by_hand(inputs := x.clone().requires_grad_()), y), inputs)[0]
    moved = (x + 8 / 255 * slope.sign()).clamp(0, 1)
    loss = cross_entropy(by_hand(x), y) + 4.5 / 8 * torch.linalg.matrix_norm(by_hand(moved) - by_hand(x), "nuc")
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    regularizer = FisherRegularizer(penalty.default_weight, penalty, every_n_steps=1, batch_fraction=1.0)
    cases.trainer(tmp_path, callbacks=[regularizer]).fit(cases.Plain(network), batches)
    for ours, theirs in zip(network.parameters(), by_hand.parameters(), strict=True):
        assert_close(ours, theirs)


def test_attacked_inputs_stay_within_the_radius_and_the_bounds():
    seen = []

    def model(inputs):
        seen.append(inputs.detach())
        return inputs @ torch.eye(6, 4, dtype=torch.float64)

    x = _inputs()
    x[0] = 0.0
    x[1] = 1.0
    NuclearNormPenalty(epsilon=0.05, noise=0.2)(model, x, labels=LABELS, generator=_generator())
    assert (seen[-1] - x).abs().max() <= 0.05 + 1e-12
    assert seen[-1].min() >= 0
    assert seen[-1].max() <= 1
    assert (seen[-1] - x).abs().max() > 0.04


def test_the_share_is_that_of_the_calls_whose_attack_sees_the_norm():
    torch.manual_seed(0)
    model, x, values = cases.tiny_network().double(), _inputs(), {}
    for share in (0.0, 0.5, 1.0):
        penalty = NuclearNormPenalty(attack_share=share, attack_weight=1e3)
        values[share] = [
            penalty(model, x, labels=LABELS, generator=torch.Generator().manual_seed(seed)).item() for seed in range(40)
        ]
    with_norm = [half == whole for half, whole in zip(values[0.5], values[1.0], strict=True)]
    without = [half == none for half, none in zip(values[0.5], values[0.0], strict=True)]
    assert 10 < sum(with_norm) < 30
    assert all(one or other for one, other in zip(with_norm, without, strict=True))
    assert values[0.0] != values[1.0]


def test_the_nuclear_norm_is_that_of_torch_with_its_gradient():
    matrix = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.linalg.matrix_norm(matrix, "nuc")
    value = nuclear_norm(matrix)
    assert_close(value, expected)
    assert_close(torch.autograd.grad(value, matrix), torch.autograd.grad(expected, matrix))


@pytest.mark.parametrize(
    "matrix", [torch.zeros(3, 4), torch.eye(4), torch.ones(3, 4), torch.diag(torch.tensor([2.0, 2.0, 0.0, 0.0]))]
)
def test_zero_and_repeated_singular_values_have_the_subgradient_of_least_norm(matrix):
    matrix = matrix.double().requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(matrix), matrix)
    values = torch.linalg.svdvals(gradient.detach())
    rank = torch.linalg.matrix_rank(matrix.detach())
    assert_close(values, (torch.arange(len(values)) < rank).double())  # an isometry of the row space, zero beyond
    assert_close((gradient * matrix).sum(), torch.linalg.matrix_norm(matrix, "nuc"))


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_constant_and_saturated_logits_have_a_finite_value_and_gradient(scale):
    weight = (scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    x, labels = torch.full((2, 6), 0.5), torch.tensor([0, 3])
    value = NuclearNormPenalty()(lambda inputs: inputs @ weight.T, x, labels=labels)
    (gradient,) = torch.autograd.grad(value, weight)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert (value == 0) == (scale == 0)


def test_classes_left_out_do_not_count():
    torch.manual_seed(0)
    network, x, labels = nn.Linear(6, 4).double(), _inputs(), LABELS % 3
    options = {"labels": labels, "generator": _generator()}
    masked = NuclearNormPenalty()(
        lambda inputs: network(inputs).masked_fill(torch.arange(4) == 3, -torch.inf), x, **options
    )
    options["generator"] = _generator()
    plain = NuclearNormPenalty()(lambda inputs: network(inputs)[:, :3], x, **options)
    assert_close(masked, plain)
    assert_close(_gradient(masked, network), _gradient(plain, network))


def test_half_precision_parameters_receive_the_gradient():
    model, x = cases.tiny_network().bfloat16(), _inputs().bfloat16()
    NuclearNormPenalty()(model, x, labels=LABELS).backward()
    assert torch.isfinite(model[0].weight.grad).all()


def test_bad_arguments_are_refused_with_what_to_write():
    with pytest.raises(ValueError, match=r"finite epsilon > 0, in the input unit, such as 8/255 .*; got 0"):
        NuclearNormPenalty(epsilon=0)
    with pytest.raises(ValueError, match=r"finite noise >= 0 and a finite attack_weight >= 0; got -0.1 and 4.5"):
        NuclearNormPenalty(noise=-0.1)
    with pytest.raises(ValueError, match=r"0 <= attack_share <= 1; got 2"):
        NuclearNormPenalty(attack_share=2)
    with pytest.raises(ValueError, match=r"two numbers, the smaller first.*got \(1.0, 0.0\)"):
        NuclearNormPenalty(bounds=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"NuclearNormPenalty needs labels=, class indices"):
        NuclearNormPenalty()(cases.tiny_network(), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"within bounds=\(0, 1\); these are from -1 to -1.*bounds=None"):
        NuclearNormPenalty()(cases.tiny_network(), -torch.ones(2, 6), labels=torch.tensor([0, 1]))


def test_logits_that_overflow_after_the_step_are_counted():
    def model(inputs):
        return torch.where(inputs > 0.5, torch.inf, inputs)[:, :4]

    with pytest.raises(NonFiniteLogitsError, match=r"[1-8] of 8 examples have logits .* after the adversarial step"):
        NuclearNormPenalty(epsilon=0.5, attack_share=0.0, noise=0.0)(
            model, torch.full((8, 6), 0.4, dtype=torch.float64), labels=LABELS % 4
        )
