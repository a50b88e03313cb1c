"""Recurrent layers: without cuDNN where it has no derivative, with the same numbers."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from fisher_reg import Categorical, Exact, KLPenalty, Lanczos, SpectralPenalty, fisher_spectral_norm
from fisher_reg.evaluation import Rules, deployed
from fisher_reg.evaluation.recurrent import recurrent_rules
from fisher_reg.operator import InputFisher, double_backward, forward_mode

_LAYERS = {
    "lstm": (nn.LSTM, {}),
    "lstm in both directions": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.fixture(params=_LAYERS)
def layer(request):
    kind, options = _LAYERS[request.param]
    return kind(4, 5, **options)


class _OfSequences(nn.Module):
    def __init__(self, layer):
        super().__init__()
        layer.batch_first = True
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (1 + layer.bidirectional), 9)

    def forward(self, x):
        return self.head(self.layer(x)[0].mean(1))


class _Noting(torch.overrides.TorchFunctionMode):
    """Notes whether cuDNN is enabled when a recurrent function runs."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in recurrent_rules():
            self.found.append(torch.backends.cudnn.enabled)
        return function(*args, **(kwargs or {}))


def _enabled(call, **options):
    noting = _Noting()
    with noting, Rules(recurrent_rules(**options)):
        result = call()
    assert torch.backends.cudnn.enabled
    return noting.found, result


def _always(tensor):
    return True


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_layer_in_evaluation_mode_runs_without_cudnn_and_gives_the_same_numbers(layer, is_packed):
    x = torch.randn(3, 2, 4)
    sequence = pack_padded_sequence(x, [3, 2]) if is_packed else x
    expected = layer(sequence)
    found, result = _enabled(lambda: layer.eval()(sequence), is_of_cudnn=_always)
    assert found == [False]
    assert_close(result, expected, rtol=0, atol=0)
    assert _enabled(lambda: layer.train()(sequence), is_of_cudnn=_always)[0] == [True]
    assert _enabled(lambda: layer(sequence), is_of_cudnn=_always, differentiates_twice=True)[0] == [False]


def test_cudnn_stays_on_a_cpu_and_where_no_gradient_is_wanted(layer):
    x = torch.randn(3, 2, 4)
    assert _enabled(lambda: layer.eval()(x))[0] == [True]
    with torch.no_grad():
        assert _enabled(lambda: layer.eval()(x), is_of_cudnn=_always)[0] == [True]


def test_cudnn_is_on_again_after_an_error(layer):
    with pytest.raises(RuntimeError, match="size"):
        _enabled(lambda: layer.eval()(torch.randn(3, 2, 7)), is_of_cudnn=_always)
    with pytest.raises(TypeError, match="argument"):
        _enabled(lambda: torch.lstm(torch.randn(3, 2, 4), 1), is_of_cudnn=_always)
    assert torch.backends.cudnn.enabled


def test_the_deployed_function_is_asked_for_every_recurrent_layer(layer, monkeypatch):
    rules = partial(recurrent_rules, is_of_cudnn=_always)
    monkeypatch.setattr("fisher_reg.evaluation.evaluated.recurrent_rules", rules)
    model, x, noting = _OfSequences(layer), torch.randn(2, 3, 4), _Noting()
    with noting:
        deployed(model, x)(x)
    assert noting.found == [False]


def test_derivatives_through_recurrent_layers_agree(layer):
    model, x = _OfSequences(layer).double().eval(), torch.randn(3, 6, 4, dtype=torch.float64)
    exact = fisher_spectral_norm(model, x, solver=Exact())
    assert_close(
        fisher_spectral_norm(model, x, solver=Lanczos(num_steps=9, rtol=0)).eigenvalue,
        exact.eigenvalue,
        rtol=1e-4,
        atol=0,
    )
    v = torch.randn(3, 24, dtype=torch.float64)
    pushed = [InputFisher(model, x, Categorical(), linearize=rule).apply(v) for rule in (forward_mode, double_backward)]
    assert_close(*pushed)
    jacobians = [torch.autograd.functional.jacobian(lambda one: model(one[None])[0], one) for one in x]
    rows = torch.stack(jacobians).flatten(2)
    jacobian_v = (rows @ v[:, :, None]).squeeze(2)
    assert_close(pushed[0], Categorical().whiten(model(x).detach(), jacobian_v.detach()))


@pytest.mark.parametrize("penalty", [KLPenalty(), SpectralPenalty()])
def test_penalties_of_recurrent_layers_have_gradients(layer, penalty):
    model, x = _OfSequences(layer), torch.randn(3, 6, 4)
    penalty(model, x).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
