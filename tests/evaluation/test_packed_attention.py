"""Self-attention in an estimate: the numbers of torch, without tensors of zeros in the backward pass."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fisher_reg import Exact, Lanczos, fisher_spectral_norm
from fisher_reg.evaluation.packed_attention import packed_attention_rules
from fisher_reg.evaluation.rules import Rules


class _Attention(nn.Module):
    """A classifier of sequences by one attention layer."""

    def __init__(self, batch_first=True, bias=True, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias).double()
        self.head = nn.Linear(8, 5).double()
        self.options = {"need_weights": False} | options

    def forward(self, x):
        return self.head(self.attention(x, x, x, **self.options)[0].mean(1))


MASK = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
SETTINGS = [
    {},
    {"bias": False},
    {"batch_first": False},
    {"need_weights": True},
    {"attn_mask": MASK},
    {"attn_mask": MASK, "is_causal": True},
    {"key_padding_mask": torch.tensor([[False, False, True]] * 3)},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_values_and_gradients_are_those_of_torch(settings):
    model, x = _Attention(**settings).eval(), torch.randn(3, 3, 8, dtype=torch.float64, requires_grad=True)
    expected = model(x)
    with Rules(packed_attention_rules()):
        found = model(x)
    assert_close(found, expected, rtol=1e-12, atol=1e-14)
    cotangent = torch.randn_like(expected)
    for logits in (expected, found):
        logits.gradient = torch.autograd.grad(logits, x, cotangent)[0]
    assert_close(found.gradient, expected.gradient, rtol=1e-12, atol=1e-14)


def test_dropout_in_training_stays_with_torch():
    model = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 4, 8)
    torch.manual_seed(1)
    expected = model(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    with Rules(packed_attention_rules()):
        assert_close(model(x, x, x, need_weights=False)[0], expected)


@pytest.mark.parametrize("solver", [Lanczos(), Lanczos(is_exact=True)])
def test_the_eigenvalue_is_exact_in_forward_mode_and_by_quotients(solver):
    model, x = _Attention(), torch.randn(4, 3, 8, dtype=torch.float64)
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue
    assert_close(fisher_spectral_norm(model, x, solver=solver).eigenvalue, exact, rtol=1e-3, atol=0)


class _SelectBackward(TorchDispatchMode):
    """Counts the backward passes of a selection, each of which fills a tensor with zeros."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.select_backward.default
        return function(*args, **(kwargs or {}))


def test_no_gradient_is_padded_with_zeros():
    model, x = _Attention(), torch.randn(4, 3, 8, dtype=torch.float64)
    with _SelectBackward() as plain:
        y = x.clone().requires_grad_()
        torch.autograd.grad(model.train()(y).sum(), y)
    with _SelectBackward() as ours:
        fisher_spectral_norm(model, x)
    assert plain.count == 3
    assert ours.count == 0
