"""What is verified of a model before its numbers are believed."""

import pytest
import torch
from torch import nn

from fisher_reg import Bernoulli, KLPenalty, SpectralPenalty, check_model, fisher_spectral_norm, fisher_trace
from tests import cases


class _Probe(nn.Module):
    """A frozen backbone with a trainable head, as transfer learning is often written."""

    def __init__(self, outputs, skip=False):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 7), nn.Tanh()).requires_grad_(False)
        self.skip = nn.Linear(6, 7) if skip else None
        self.head = nn.Linear(7, outputs)

    def forward(self, x):
        with torch.no_grad():
            hidden = self.backbone(x)
        return self.head(hidden if self.skip is None else hidden + self.skip(x))


class _StraightThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden + (hidden.round() - hidden).detach())


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] * gradient


class _Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.network, self.function = cases.tiny_network(), function

    def forward(self, x):
        return self.function(self.network, x)


def _softmax(network, x):
    return network(x).softmax(1)


def _always_drops(network, x):
    return nn.functional.dropout(network(x), 0.5, training=True)


def _over_the_batch(network, x):
    return network(x - x.mean(0))


def _squares(network, x):
    return network(_WrongBackward.apply(x))


def _casts(network, x):
    return network(x).bfloat16().float()


def _in_autocast(network, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return network(x)


def _failed(model, **options):
    torch.manual_seed(0)
    return [finding.name for finding in check_model(model, torch.randn(4, 6), **options).failures]


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_ordinary_network_passes(dtype, is_training):
    model = cases.tiny_network(batch_norm=True, dropout=True).to(dtype).train()
    x = torch.randn(4, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert check_model(model, x, is_training=is_training).failures == ()
    assert _failed(cases.tiny_network(), likelihood=Bernoulli()) == []


@pytest.mark.parametrize(
    ("model", "failed"),
    [
        (_Probe(4), ["path"]),
        (_Probe(9), ["path"]),
        (_Probe(4, skip=True), ["derivative"]),
        (_StraightThrough(), ["derivative"]),
        (_Lambda(_squares), ["derivative"]),
        (_Lambda(_softmax), ["not probabilities"]),
        (_Lambda(_always_drops), ["repeatability"]),
        (_Lambda(_over_the_batch), ["independence"]),
        (_Lambda(lambda network, x: {"logits": network(x)}), ["logits"]),
        (_Lambda(lambda network, x: (-1 - network(x).abs()).log()), ["logits"]),
        (_Lambda(lambda network, x: network(x[:, :3])), ["logits"]),
        (_Lambda(_casts), []),  # the copy of a module computes in full precision
        (_Lambda(_in_autocast), []),
    ],
)
def test_each_fault_is_found_and_only_it(model, failed):
    assert _failed(model) == failed


def test_batch_norm_over_one_value_per_example_is_no_wrong_derivative():
    # the end of a network for large images: of two examples each channel would be -1 and 1
    torch.manual_seed(0)
    blocks = [part for _ in range(4) for part in (nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU())]
    check = check_model(
        nn.Sequential(nn.Flatten(), *blocks, nn.Linear(48, 5)), torch.rand(8, 3, 4, 4), is_training=True
    )
    assert check.passed, check


@pytest.mark.parametrize("build", [lambda: _Probe(4, skip=True), _StraightThrough, lambda: _Lambda(_squares)])
def test_a_wrong_derivative_is_found_whatever_the_weights(build):
    for seed in range(20):
        torch.manual_seed(seed)
        assert _failed(build()) == ["derivative"], seed


def test_half_precision_in_a_function_is_found():
    weight = torch.randn(6, 4, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"half precision inside.*model.float\(\)"):
        assert "full precision" in _failed(lambda x: (x.bfloat16() @ weight).float())


def test_a_failure_is_printed_with_its_remedy():
    table = str(check_model(_Probe(4), torch.randn(2, 6)))
    assert "path               FAILED   no differentiable path" in table
    assert "Freeze weights with requires_grad_(False)" in table


@pytest.mark.parametrize("outputs", [4, 9])
def test_a_backbone_under_no_grad_is_an_error_and_not_a_zero(outputs):
    model, x = _Probe(outputs), torch.randn(4, 6)
    for call in (fisher_spectral_norm, fisher_trace, KLPenalty(), SpectralPenalty(), SpectralPenalty(3)):
        with pytest.raises(ValueError, match="no differentiable path.*requires_grad_"):
            call(model, x)


def test_a_quantised_network_is_an_error_and_not_a_zero():
    model = torch.ao.quantization.quantize_dynamic(cases.tiny_network().eval(), {nn.Linear})
    with pytest.raises(ValueError, match="quantised.*blackbox_spectral_norm"):
        fisher_spectral_norm(model, torch.randn(4, 6))


@pytest.mark.parametrize(
    ("function", "likelihood"), [(_softmax, None), (lambda network, x: network(x).sigmoid(), Bernoulli())]
)
def test_probabilities_are_warned_of(function, likelihood):
    options = {} if likelihood is None else {"likelihood": likelihood}
    with pytest.warns(UserWarning, match="probabilities and not logits.*before softmax"):
        fisher_spectral_norm(_Lambda(function), torch.randn(4, 6), **options)


@pytest.mark.parametrize("outputs", [4, 9])
def test_a_random_forward_is_refused_whatever_the_number_of_classes(outputs):
    model = nn.Sequential(nn.Linear(6, 30), _Lambda(_always_drops), nn.Linear(4, outputs)).eval()
    model[1].network = nn.Linear(30, 4)
    with pytest.raises(ValueError, match=r"random, also in evaluation mode.*if self.training"):
        fisher_spectral_norm(model, torch.randn(4, 6))
