"""The function that is evaluated: layout, side inputs, parts of a batch, noise, precision."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fisher_reg import (
    Exact,
    FisherSpectralNorm,
    FisherTrace,
    KLPenalty,
    LogitsOf,
    SpectralPenalty,
    TracePenalty,
    fisher_effective_rank,
    fisher_eigenpairs,
    fisher_spectral_norm,
    fisher_trace,
)
from fisher_reg.evaluation import WithSideInputs, deployed, in_fast_layout, twice_differentiable
from fisher_reg.evaluation.layout import ChannelsLast
from fisher_reg.operator import InputFisher
from tests import cases


class _Images(nn.Module):
    """A convolution and a head that may read its memory."""

    def __init__(self, read):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.read = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 36, 9), read

    def forward(self, x):
        return self.head(self.read(self.conv(x).relu()))


def _contiguous_only(hidden):
    if not hidden.is_contiguous():
        raise RuntimeError("expected contiguous input")  # as compiled extensions do
    return hidden.flatten(1)


_READS = {
    "as_strided": lambda hidden: torch.as_strided(hidden, (len(hidden), 144), (144, 1)),
    "view": lambda hidden: hidden.view(len(hidden), -1),
    "contiguous only": _contiguous_only,
    "complex": lambda hidden: torch.view_as_real(torch.view_as_complex(hidden.unflatten(-1, (3, 2)))).flatten(1),
}


@pytest.mark.parametrize("name", _READS)
def test_a_forward_that_reads_memory_gets_its_images_as_they_are(name):
    x = torch.randn(3, 2, 6, 6)
    expected = fisher_spectral_norm(_Images(lambda hidden: hidden.flatten(1)), x, solver=Exact()).eigenvalue
    model = _Images(_READS[name])
    assert_close(fisher_spectral_norm(model, x, solver=Exact()).eigenvalue, expected)
    assert not isinstance(in_fast_layout(WithSideInputs(deployed(model, x), None, 3), x), ChannelsLast)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_convolutions_get_images_whose_strides_say_channels_last(num_channels):
    strides = []

    class Watched(nn.Conv2d):
        def forward(self, x):
            strides.append(x.stride())
            out = super().forward(x)
            strides.append(out.stride())
            return out

    model = nn.Sequential(Watched(num_channels, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 4))
    x = torch.randn(3, num_channels, 8, 8)
    function = in_fast_layout(WithSideInputs(deployed(model, x), None, 3), x)
    strides.clear()
    function(x)
    assert strides == [(num_channels * 64, 1, 8 * num_channels, num_channels), (180, 1, 30, 5)]


def test_an_ordinary_network_runs_in_the_fast_layout():
    model, x = _Images(lambda hidden: hidden.flatten(1)), torch.randn(3, 2, 6, 6)
    assert isinstance(in_fast_layout(WithSideInputs(deployed(model, x), None, 3), x), ChannelsLast)


class _Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.network = nn.Embedding(5, 6), nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 9))

    def forward(self, x, condition, shift=None):
        return self.network(x * (1 + self.embed(condition)) + (0 if shift is None else shift))


_X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
_C = torch.arange(8) % 5


@pytest.mark.parametrize(
    "side_inputs", [_C, (_C,), {"condition": _C}, (_C, torch.zeros(6)), {"condition": _C, "shift": None}]
)
def test_side_inputs_follow_their_examples(side_inputs):
    model = _Conditional().eval()
    expected = torch.cat(
        [
            fisher_spectral_norm(lambda x, c=c: model(x, c), x[None], solver=Exact()).eigenvalue
            for x, c in zip(_X, _C[:, None], strict=True)
        ]
    )
    for wrapped in (model, LogitsOf(model, lambda module, x, *args, **kwargs: module(x, *args, **kwargs))):
        got = fisher_spectral_norm(wrapped, _X, side_inputs=side_inputs)
        assert (got.eigenvalue <= expected * (1 + 1e-5)).all()
        assert_close(got.eigenvalue, expected, rtol=5e-2, atol=0)
    exact = {"solver": Exact(), "side_inputs": side_inputs}
    assert_close(fisher_spectral_norm(model, _X, **exact).eigenvalue, expected)
    assert_close(fisher_eigenpairs(model, _X, 2, **exact).eigenvalue[:, 0], expected)
    trace = fisher_trace(model, _X, estimator=Exact(), side_inputs=side_inputs)
    assert_close(fisher_effective_rank(model, _X, estimator=Exact(), **exact), trace / expected)
    for metric, value in ((FisherSpectralNorm(solver=Exact()), expected), (FisherTrace(estimator=Exact()), trace)):
        metric.update(model, _X, side_inputs)
        assert_close(metric.compute(), value.mean())
    for penalty in (KLPenalty(), SpectralPenalty(), SpectralPenalty(2)):
        assert_close(penalty(model, _X, side_inputs=side_inputs), penalty(lambda x: model(x, _C), _X))


class _WholeBatch(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 9)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x).view(8, 2, 4)).reshape(8, 8))


def test_a_model_that_takes_only_the_whole_batch_is_evaluated_on_it():
    whole = _WholeBatch().eval()
    free = nn.Sequential(whole.first, nn.Tanh(), whole.last)
    exported = torch.export.export(free, (_X,)).module()
    conditional = _Conditional().eval()
    closed = {"view": whole, "exported": exported, "closure": lambda x: conditional(x, _C)}
    same = {"view": free, "exported": free, "closure": lambda x: WithSideInputs(conditional, _C, 8)(x)}
    for name, model in closed.items():
        for solver in (None, Exact()):
            expected = fisher_spectral_norm(same[name], _X, solver=solver).eigenvalue
            assert_close(fisher_spectral_norm(model, _X, solver=solver).eigenvalue, expected, rtol=1e-3, atol=0)


def test_the_operator_has_no_memory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x, v, u = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 4)
    from fisher_reg import Categorical

    fisher = InputFisher(model, x, Categorical(), quotients=True)
    u[1] = 0
    expected = fisher.apply(v)
    fisher.adjoint(u)
    assert torch.equal(fisher.apply(v), expected)
    assert_close(fisher.apply(v, slope=torch.ones(2)), expected, rtol=1e-2, atol=1e-4)
    assert_close(fisher.mv(v), fisher.adjoint(fisher.apply(v)), rtol=0, atol=0)


class _LayerDrop(nn.Module):
    """Leaves out a layer at random, by several generators."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 9)])
        self.kind, self.own = kind, torch.Generator().manual_seed(0)
        self.of_python, self.of_numpy = random.Random(0), np.random.default_rng(0)

    def forward(self, x):
        hidden = torch.tanh(self.layers[0](x))
        if self.training:
            hidden = hidden + (self._draw(len(x)) < 0.5) * torch.tanh(self.layers[1](hidden))
        return self.layers[2](hidden)

    def _draw(self, count):
        draw = {
            "torch": lambda: torch.rand(count, 1),
            "python": lambda: torch.tensor([[random.random()] for _ in range(count)]),
            "numpy": lambda: torch.from_numpy(np.random.rand(count, 1)),
            "own": lambda: torch.rand(count, 1, generator=self.own),
            "own of python": lambda: torch.tensor([[self.of_python.random()] for _ in range(count)]),
            "own of numpy": lambda: torch.from_numpy(self.of_numpy.random((count, 1))),
        }
        return draw[self.kind]().float()


@pytest.mark.parametrize("kind", ["torch", "python", "numpy", "own", "own of python", "own of numpy"])
def test_two_evaluations_that_are_compared_see_the_same_noise(kind):
    random.seed(1)
    np.random.seed(1)
    model = _LayerDrop(kind).double().train()
    values = [KLPenalty(step=step)(model, _X.double()).item() for step in (1e-1, 1e-3)]
    assert values[1] == pytest.approx(values[0], rel=0.05)  # other noise would leave a divergence over 1e-6
    with torch.no_grad():
        assert not torch.equal(model(_X.double()), model(_X.double()))


@pytest.mark.parametrize("mask", ["tril", "padding"])
def test_attention_by_math_masks_as_the_fused_kernel_does(mask):
    query = torch.randn(2, 2, 5, 4)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    if mask == "padding":
        allowed = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]
    expected = nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=allowed)
    with twice_differentiable():
        got = nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=allowed)
    assert_close(got, expected)


def test_spectral_norm_in_training_has_the_weights_of_one_forward():
    torch.manual_seed(0)
    spectral_norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(spectral_norm(nn.Linear(6, 20)), nn.Tanh(), spectral_norm(nn.Linear(20, 9))).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vector = model[0].parametrizations.weight[0]._u.clone()
    values = [KLPenalty(step=step)(model, _X.double()) for step in (0.5, 1e-3)]
    assert torch.equal(model[0].parametrizations.weight[0]._u, vector)
    model(_X.double())
    expected = [KLPenalty(step=step)(model.eval(), _X.double()) for step in (0.5, 1e-3)]
    assert_close(values, expected)


class _Attention(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head, self.checkpointed = nn.Linear(24, 4), checkpointed

    def forward(self, x):
        hidden = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(hidden.flatten(1))


@pytest.mark.parametrize("penalty", [KLPenalty(), SpectralPenalty(), SpectralPenalty(2), TracePenalty()])
def test_checkpointed_attention_has_the_same_gradient(penalty):
    x, found = torch.randn(2, 3, 8), []
    for checkpointed in (False, True):
        model = _Attention(checkpointed).train()
        penalty(model, x, generator=torch.Generator().manual_seed(0)).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert_close(found[1], found[0])


def _in_autocast(network, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return network(x)


class _KnowsItsDtype(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network, self.dtype = cases.tiny_network(), torch.bfloat16

    def forward(self, x):
        return self.network(x.to(self.dtype)).to(self.dtype)


@pytest.mark.parametrize(
    "function",
    [
        lambda network, x: network(x).double(),
        _in_autocast,
        lambda network, x: _in_autocast(network, x).float(),
        lambda network, x: network(x.bfloat16().float()).half(),
        lambda network, x: network(x.to(torch.float16).float()).type(torch.float16),
        lambda network, x: network(x.to(dtype=torch.float16).float()) + torch.zeros(4, dtype=torch.float16),
    ],
)
def test_the_pass_is_in_full_precision_whatever_the_forward_casts_to(function):
    network, x = cases.tiny_network(), torch.randn(4, 6)
    expected = fisher_spectral_norm(network, x).eigenvalue
    got = fisher_spectral_norm(LogitsOf(network, function), x).eigenvalue
    assert_close(got, expected, rtol=1e-6, atol=0)
    assert got.dtype == torch.float32


def test_a_half_precision_module_that_knows_its_precision_is_promoted_as_a_whole():
    model, x = _KnowsItsDtype().bfloat16(), torch.randn(4, 6)
    expected = fisher_spectral_norm(model.network.float(), x).eigenvalue
    model.bfloat16()
    assert_close(fisher_spectral_norm(model, x).eigenvalue, expected, rtol=2e-2, atol=0)
    half = LogitsOf(cases.tiny_network().half(), lambda module, x: module(x.half()).float())
    expected = fisher_spectral_norm(half.module.float(), x).eigenvalue
    half.module.half()
    assert_close(fisher_spectral_norm(half, x).eigenvalue, expected, rtol=1e-2, atol=0)
