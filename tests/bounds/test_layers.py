"""Each rule against the dense operator, or a fine grid of slopes."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import NoBoundError, register_bound_rule
from fisher_reg.bounds.layers import batch_norm_scale
from fisher_reg.bounds.registry import Gain, Layer, Tokens, find_rule
from tests.oracles import dense_jacobian

ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.LeakyReLU(0.1),
    nn.LeakyReLU(2.0),
    nn.ELU(0.5),
    nn.ELU(2.0),
    nn.CELU(2.0),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.Softsign(),
    nn.Hardtanh(),
    nn.Identity(),
]


def norm_of(module, x=None):
    x = torch.zeros(1) if x is None else x
    gain = find_rule(module)(module, Layer({"input": x}, module(x)))
    return gain.norm if isinstance(gain, Gain) else gain


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activation_slope_is_the_largest_one(activation):
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(x).sum(), x)
    largest = slope.abs().max().item()
    assert largest <= norm_of(activation) + 1e-9
    assert norm_of(activation) <= largest + 2e-3


POOLINGS = [
    (nn.MaxPool2d(2), 8),
    (nn.MaxPool2d(3, 2, 1), 9),
    (nn.MaxPool2d(3, 1, 1), 6),
    (nn.MaxPool2d(2, 3), 8),
    (nn.MaxPool2d(2, 1, dilation=2), 6),
    (nn.MaxPool2d(3, 2, dilation=2, padding=1), 9),
    (nn.AvgPool2d(2), 8),
    (nn.AvgPool2d(3, 2, 1), 9),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 9),
    (nn.AvgPool2d(3, 2, ceil_mode=True), 8),
    (nn.AdaptiveAvgPool2d(1), 5),
    (nn.AdaptiveAvgPool2d(3), 7),
    (nn.AdaptiveAvgPool2d(7), 2),
    (nn.AdaptiveAvgPool2d((2, 5)), 6),
]


@pytest.mark.parametrize(("pooling", "size"), POOLINGS, ids=str)
def test_pooling_is_bounded_with_overlap(pooling, size):
    x = torch.randn(1, 2, size, size, dtype=torch.float64)
    bound = norm_of(pooling, x)
    dense = max(torch.linalg.matrix_norm(dense_jacobian(pooling, x.shape), 2).item() for _ in range(5))
    assert dense <= bound + 1e-12
    if not isinstance(pooling, nn.MaxPool2d):
        assert_close(bound, dense)


def test_overlapping_max_pooling_reaches_its_bound():
    # the largest entry sits in four windows of a 3 x 3 pooling with stride 2
    pooling, x = nn.MaxPool2d(3, 2), torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2] = 1.0
    jacobian = torch.autograd.functional.jacobian(pooling, x).reshape(4, 25)
    assert_close(torch.linalg.matrix_norm(jacobian, 2).item(), norm_of(pooling, x))
    assert norm_of(pooling, x) == 2


@pytest.mark.parametrize(("before", "after"), [(2, 7), (5, 1), (7, 3)])
def test_adaptive_pooling_in_one_and_three_dimensions(before, after):
    for pooling, axes in ((nn.AdaptiveAvgPool1d(after), 1), (nn.AdaptiveAvgPool3d(after), 3)):
        x = torch.randn(1, 1, *(min(before, 4),) * axes, dtype=torch.float64)
        dense = torch.linalg.matrix_norm(dense_jacobian(pooling, x.shape), 2).item()
        assert_close(norm_of(pooling, x), dense)


def test_batch_norm_is_a_diagonal():
    module = nn.BatchNorm2d(3).double().eval()
    nn.init.normal_(module.weight)
    module.running_var.uniform_(0.1, 2)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    dense = torch.linalg.matrix_norm(dense_jacobian(module, x.shape), 2).item()
    assert_close(norm_of(module, x), dense)
    assert_close(batch_norm_scale(module).abs().max().item(), dense)


def test_layer_norm_reaches_its_constant_at_constant_tokens():
    module = nn.LayerNorm(6, eps=1e-3).double()
    nn.init.normal_(module.weight)
    x = torch.full((1, 6), 0.7, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, x).reshape(6, 6)
    exact = torch.linalg.matrix_norm(jacobian, 2).item()
    assert exact <= norm_of(module, x) * (1 + 1e-9)
    assert exact > 0.7 * norm_of(module, x)


def test_attention_needs_a_layer_norm_before_it():
    module, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 3, 8)
    inputs, same = dict.fromkeys(("query", "key", "value"), x), dict.fromkeys(("query", "key", "value"), "h")
    with pytest.raises(NoBoundError, match="no global Lipschitz constant on an unbounded domain"):
        find_rule(module)(module, Layer(inputs, module(x, x, x), None, same))
    tokens = Tokens(torch.ones(8), torch.zeros(8), math.sqrt(8))
    gain = find_rule(module)(module, Layer(inputs, module(x, x, x), tokens, same))
    assert gain.domain is not None
    assert gain.of_one_input
    for other in ({"key": "other"}, {"attn_mask": "h"}, {"value": None}):
        with pytest.raises(NoBoundError, match="Only self-attention"):
            find_rule(module)(module, Layer(inputs, None, tokens, same | other))


def test_what_has_no_rule_is_refused_and_not_guessed():
    with pytest.raises(NoBoundError, match="circular"):
        norm_of(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), torch.randn(1, 2, 4, 4))
    with pytest.raises(NoBoundError, match="divisor"):
        norm_of(nn.AvgPool2d(2, divisor_override=1), torch.randn(1, 2, 4, 4))
    with pytest.raises(NoBoundError, match="keeps no running statistics"):
        batch_norm_scale(nn.BatchNorm1d(3, track_running_stats=False))


def test_rules_are_inherited_only_with_the_forward():
    class Renamed(nn.ReLU):
        pass

    class Doubled(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    assert find_rule(Renamed()) is find_rule(nn.ReLU())
    assert find_rule(Doubled()) is None

    @register_bound_rule(Doubled)
    def rule(module, layer):
        return 2.0

    assert find_rule(Doubled()) is rule
