import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import LogitsOf, fisher_spectral_norm, fisher_trace
from tests import cases


def _mixed_modes():
    model = cases.tiny_network(batch_norm=True, dropout=True)
    model.train()
    model[3].eval()
    return model


def _state(model):
    modes = [module.training for module in model.modules()]
    return modes, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_module_is_left_as_it_was_found():
    model, x = _mixed_modes(), torch.randn(8, 6)
    model(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    x_before, (modes, state) = x.clone(), _state(model)
    random_state = torch.get_rng_state()
    fisher_spectral_norm(model, x)
    fisher_trace(model, x)
    assert _state(model)[0] == modes
    assert_close(_state(model)[1], state, rtol=0, atol=0)
    assert_close([parameter.grad for parameter in model.parameters()], gradients, rtol=0, atol=0)
    assert_close(x, x_before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_modes_come_back_after_an_exception():
    model = _mixed_modes()
    modes, _ = _state(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fisher_spectral_norm(model, torch.randn(8, 7))
    assert _state(model)[0] == modes
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_autograd_is_off(context):
    model, x = cases.tiny_network(), torch.randn(3, 6)
    expected = fisher_spectral_norm(model, x).eigenvalue
    with context():
        inputs = torch.empty_like(x).copy_(x)
        result = fisher_spectral_norm(model, inputs).eigenvalue
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert_close(result, expected)


def test_autocast_does_not_round_the_estimate():
    model, x = cases.tiny_network(), torch.randn(3, 6)
    expected = fisher_spectral_norm(model, x).eigenvalue
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(fisher_spectral_norm(model, x).eigenvalue, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_promoted(dtype):
    model, x = cases.tiny_network(batch_norm=True).eval().to(dtype), torch.randn(3, 6).to(dtype)
    result = fisher_spectral_norm(model, x)
    reference = fisher_spectral_norm(cases.tiny_network(batch_norm=True).eval(), x.float())  # another network
    assert result.eigenvalue.dtype == torch.float32
    assert next(model.parameters()).dtype == dtype
    promoted = fisher_spectral_norm(model.float(), x.float())
    assert_close(result.eigenvalue, promoted.eigenvalue)
    assert not torch.allclose(result.eigenvalue, reference.eigenvalue)


def test_fused_attention_is_differentiated():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 4)).eval()
    result = fisher_spectral_norm(model, torch.randn(2, 3, 8))
    assert result.converged.all()


def test_a_compiled_module_runs_eagerly():
    model, x = cases.tiny_network(), torch.randn(3, 6)
    compiled = torch.compile(model, backend="eager")
    assert_close(fisher_spectral_norm(compiled, x).eigenvalue, fisher_spectral_norm(model, x).eigenvalue)


def test_in_place_activation_on_the_input():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), torch.randn(4, 6)
    before = x.clone()
    assert (fisher_spectral_norm(model, x).eigenvalue > 0).all()
    assert_close(x, before, rtol=0, atol=0)


def test_batch_norm_without_running_statistics_is_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="has no running statistics.*track_running_stats=True"):
        fisher_spectral_norm(model, torch.randn(4, 6))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 6, dtype=torch.long), "floating-point tensor.*int64.*embeddings"),
        (torch.zeros(2, 6, dtype=torch.uint8), "uint8"),
        ([[0.0] * 6], "got list"),
        (torch.zeros(0, 6), r"non-empty batch.*\(0, 6\)"),
        (torch.zeros(6), r"got shape \(6,\)"),
    ],
)
def test_bad_inputs_are_refused_before_the_model_runs(inputs, message):
    def model(x):
        raise AssertionError("the model was called")

    with pytest.raises(ValueError, match=message):
        fisher_spectral_norm(model, inputs)


def test_logits_of_keeps_the_module_visible():
    inner = cases.tiny_network(batch_norm=True).train()
    model = LogitsOf(inner, lambda module, x: {"logits": module(x)}["logits"])
    fisher_spectral_norm(model, torch.randn(4, 6))
    assert inner[1].num_batches_tracked == 0
    assert inner.training


def test_detached_logits_are_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="carry no gradient"):
        fisher_spectral_norm(lambda x: (x @ torch.randn(6, 3)).detach(), torch.randn(2, 6))
