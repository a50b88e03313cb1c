"""The composed bound: valid, equal to the closed forms of the families, and clear where it does not exist."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Bernoulli,
    Exact,
    Gaussian,
    NoBoundError,
    NonFiniteWeightsError,
    SpectralPenalty,
    Tightening,
    fisher_bound,
    fisher_spectral_norm,
    lipschitz_bound,
    register_bound_rule,
)
from fisher_reg.bounds.rules.slopes import GELU_SLOPE
from tests import cases


def _largest(model, x):
    return max(fisher_spectral_norm(model, part, solver=Exact()).eigenvalue.max().item() for part in x.split(100))


def _ascend(model, x, steps=50):
    """Gradient ascent on the eigenvalue over the input; the best point on the way, per example."""
    best, best_value = x, torch.zeros(len(x))
    for _ in range(steps):
        shift = torch.zeros_like(x, requires_grad=True)
        values = []

        def keep(value, values=values):
            values.append(value.detach())
            return value.sum()

        penalty = SpectralPenalty(num_steps=3, reduction=keep)
        (slope,) = torch.autograd.grad(penalty(lambda y, shift=shift: model(y + shift), x), shift)
        better = values[0] > best_value
        best_value = torch.where(better, values[0], best_value)
        best = torch.where(better[:, None, None, None], x, best)
        x = x + 0.1 * nn.functional.normalize(slope.flatten(1)).view_as(x)
    return best


@pytest.mark.parametrize("weights", ["random", "trained"])
def test_the_bound_is_above_the_exact_eigenvalue(family, trained, digits, weights, record_property):
    model = copy.deepcopy(trained) if weights == "trained" else cases.network(family, digits, seed=1).eval()
    if weights == "random" and family == "vit":
        nn.init.normal_(model.network.heads.head.weight)  # torchvision starts it at zero
    bound = fisher_bound(model, cases.test_images(digits, 1))
    assert bound.certified
    noise = torch.rand(200, *cases.test_images(digits, 1).shape[1:])
    climbed = _ascend(model, cases.test_images(digits, 8))
    start, random, optimised = (_largest(model, x) for x in (cases.test_images(digits, 8), noise, climbed))
    record_property("log10_bound", bound.log10_value)
    record_property("log10_random_inputs", math.log10(random))
    record_property("log10_optimised_inputs", math.log10(optimised))
    assert optimised > start
    assert math.log10(max(start, random, optimised)) <= bound.log10_value


def test_a_linear_model_is_tight_for_each_likelihood():
    model, x = nn.Linear(6, 2).double(), torch.zeros(1, 6, dtype=torch.float64)
    nn.init.zeros_(model.bias)  # p = 1/2 at the origin
    for likelihood in (Gaussian(variance=0.5), Bernoulli()):
        bound = fisher_bound(model, x, likelihood=likelihood).value
        exact = fisher_spectral_norm(model, x, likelihood=likelihood, solver=Exact()).eigenvalue.item()
        assert_close(bound, exact)
    assert_close(fisher_bound(model, x).value, fisher_spectral_norm(model, x).eigenvalue.item())
    std = torch.tensor([0.5, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert_close(fisher_bound(model, x, input_std=std).value, 4 * fisher_bound(model, x).value)


class _Arithmetic(nn.Module):
    """Every function with a rule that an image network may use between its layers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, -3.0, 1.0, 0.5, 1.0, 1.0]))

    def forward(self, x):
        y = torch.relu(x * self.scale) / 2 - 0.1
        y = torch.cat([y, nn.functional.gelu(x)], 1)
        y = y + torch.tanh(y) + 1
        y = nn.functional.dropout(y.reshape(-1, 3, 4).permute(0, 2, 1), training=self.training)
        return y.mean(2) + x.sigmoid()[:, :1].expand(-1, 4)


def test_functions_between_layers_are_bounded():
    model = _Arithmetic().double().eval()
    bound = lipschitz_bound(model, torch.zeros(1, 6, dtype=torch.float64)).value
    # cat(relu(3 x) / 2, gelu(x)); twice that by the sum; mean over 3; four copies of a sigmoid
    expected = math.hypot(1.5, GELU_SLOPE) * 2 / math.sqrt(3) + 0.25 * 2
    plain = lipschitz_bound(model, torch.zeros(1, 6, dtype=torch.float64), tightening=Tightening(merged=False)).value
    assert_close(plain, expected)
    x = torch.randn(50, 6, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda y: model(y[None])[0]))(x)
    assert torch.linalg.matrix_norm(jacobians, 2).max() <= bound


def _head(linear):
    weight = linear.weight.detach().double()
    return torch.linalg.matrix_norm(weight - weight.mean(0), 2).item()


def test_linear_on_tokens_is_not_folded_into_a_batch_norm_over_tokens():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(15, 2)).double().eval()
    model[1].running_var.uniform_(0.1, 2)
    bound = lipschitz_bound(model, torch.zeros(1, 3, 4, dtype=torch.float64))
    scale = model[1].running_var.add(model[1].eps).rsqrt().max().item()
    first = torch.linalg.matrix_norm(model[0].weight, 2).item()
    assert bound.value <= first * scale * _head(model[3]) * (1 + 1e-9)
    jacobian = torch.autograd.functional.jacobian(model, torch.zeros(1, 3, 4, dtype=torch.float64)).reshape(2, 12)
    assert torch.linalg.matrix_norm(jacobian - jacobian.mean(0), 2) <= bound.value


def test_terms_name_the_layers_and_multiply_to_the_bound():
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double()
    bound = lipschitz_bound(model, torch.zeros(1, 4, dtype=torch.float64))
    assert [term.name for term in bound.terms] == ["0", "1", "2"]
    assert_close(math.prod(term.norm for term in bound.terms), bound.value)
    assert "with the softmax" in str(bound)
    assert "certified" in str(bound)


def test_an_overflowing_bound_keeps_its_logarithm():
    layers = [layer for _ in range(60) for layer in (nn.Linear(4, 4), nn.LayerNorm(4, eps=1e-12))]
    bound = fisher_bound(nn.Sequential(*layers, nn.Linear(4, 2)), torch.zeros(1, 4))
    assert bound.value == math.inf
    assert 308 < bound.log10_value < 1000


def test_zero_weights_give_a_zero_bound():
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    assert fisher_bound(model, torch.zeros(1, 4)).value == 0


def test_the_model_is_left_as_it_was_found():
    model = cases.tiny_network(batch_norm=True, dropout=True).train()
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        fisher_bound(model, torch.zeros(1, 6))
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(module.training for module in model.modules())


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x):
        return self.cell(x)[0]


class _Exotic(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_an_unknown_part_is_named_with_the_remedy():
    with pytest.raises(
        NoBoundError, match=r"No bound rule for LSTMCell at 'cell'(.|\n)*register_bound_rule\(YourModule\)"
    ):
        fisher_bound(_Recurrent(), torch.zeros(1, 4))
    model = nn.Sequential(_Exotic(), nn.Linear(4, 3))
    with pytest.raises(NoBoundError, match=r"the function special_bessel_j0(.|\n)*register_bound_rule"):
        fisher_bound(model, torch.zeros(1, 4))

    @register_bound_rule(_Exotic)
    def _(module, layer):
        return 2 / math.sqrt(math.pi)

    assert_close(lipschitz_bound(model, torch.zeros(1, 4)).value, 2 / math.sqrt(math.pi) * _head(model[1]))


def test_what_cannot_have_a_bound_is_refused():
    class Product(nn.Module):
        def forward(self, x):
            return x * x

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NoBoundError, match="two values that depend on the input"):
        fisher_bound(Product(), torch.zeros(1, 4))
    with pytest.raises(NoBoundError, match="Branching cannot be traced"):
        fisher_bound(Branching(), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="nn.Module; got function"):
        fisher_bound(lambda x: x, torch.zeros(1, 4))
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, torch.nan)
    with pytest.raises(
        NonFiniteWeightsError, match=r"'the model itself' \(Linear\) has NaN or infinite values in weight"
    ):
        fisher_bound(model, torch.zeros(1, 4))
