"""Each rule against the dense operator, in plain and in scaled coordinates, or a fine grid of slopes."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import NoBoundError, register_bound_rule
from fisher_reg.bounds.operator_norms.measures import CertifiedNorms
from fisher_reg.bounds.rules.layer import Ball, Gain, Layer, ScaledGain, Tokens
from fisher_reg.bounds.rules.normalization import batch_norm_scale
from fisher_reg.bounds.rules.registry import find_rule
from tests.oracles import dense_jacobian

ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.LeakyReLU(0.1),
    nn.LeakyReLU(2.0),
    nn.PReLU(init=0.3),
    nn.PReLU(init=-1.7),
    nn.RReLU(0.1, 0.4),
    nn.ELU(0.5),
    nn.ELU(2.0),
    nn.CELU(2.0),
    nn.SELU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.LogSigmoid(),
    nn.Softplus(),
    nn.Softplus(beta=3.0, threshold=16.0),
    nn.Softsign(),
    nn.Tanhshrink(),
    nn.Softshrink(),
    nn.Hardtanh(),
    nn.Identity(),
]


def gain_of(module, x, **options):
    with torch.no_grad():
        gain = find_rule(module)(module, Layer({"input": x}, module(x), CertifiedNorms(), **options))
    return gain if isinstance(gain, Gain) else Gain(gain)


def norm_of(module, x=None):
    """The constant between plain coordinates."""
    gain = gain_of(module, torch.zeros(1, dtype=torch.float64) if x is None else x)
    scale = gain.scale if isinstance(gain, ScaledGain) and gain.scale is not None else torch.ones(())
    return float(gain.norm) / float(scale.amin())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activation_slope_is_the_largest_one(activation):
    activation = activation.double().eval()
    x = torch.linspace(-12, 12, 600_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(x).sum(), x)
    largest = slope.abs().max().item()
    assert largest <= norm_of(activation) + 1e-9
    assert norm_of(activation) <= largest + 2e-3


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(inplace=True), nn.Sigmoid()], ids=str)
def test_a_local_slope_is_that_of_each_example(activation):
    x = torch.tensor([[-3.0, -2.0], [1.5, 0.2], [-5.0, 4.0]], dtype=torch.float64)
    gain = (
        gain_of(activation, x.clone(), is_local=True)
        if not getattr(activation, "inplace", False)
        else find_rule(activation)(activation, Layer({"input": x}, None, CertifiedNorms(), is_local=True))
    )
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(activation(point * 1).sum(), point)
    assert_close(gain.norm, slope.abs().amax(1))


LINEAR = [
    (nn.Linear(5, 4), (1, 3, 5)),
    (nn.Linear(5, 4, bias=False), (1, 5)),
    (nn.Conv1d(3, 4, 3, 2, 1), (1, 3, 9)),
    (nn.Conv2d(3, 4, 3, 1, 1), (1, 3, 6, 6)),
    (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (1, 4, 7, 7)),
    (nn.Conv2d(3, 4, (3, 2), (1, 2), (1, 0), dilation=(2, 1)), (1, 3, 6, 6)),
    (nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 5, 5)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (1, 3, 6, 6)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (1, 3, 6, 6)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (1, 3, 6, 6)),
    (nn.Conv2d(3, 4, 3, padding="same"), (1, 3, 6, 6)),
    (nn.Conv3d(2, 3, 2, 1, 0), (1, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(3, 4, 3, 2, 1, 1), (1, 3, 5)),
    (nn.ConvTranspose2d(3, 4, 3, 2, 1), (1, 3, 4, 4)),
    (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (1, 4, 4, 4)),
    (nn.Flatten(), (1, 2, 3)),
    (nn.Unflatten(1, (2, 3)), (1, 6)),
    (nn.Dropout(0.5), (1, 4)),
    (nn.PixelShuffle(2), (1, 4, 3, 3)),
    (nn.ChannelShuffle(2), (1, 4, 3, 3)),
    (nn.Upsample(scale_factor=2), (1, 2, 3, 3)),
    (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), (1, 2, 3, 3)),
    (nn.Upsample(scale_factor=3, mode="bilinear"), (1, 2, 3, 4)),
    (nn.ZeroPad2d((1, 2, 0, 1)), (1, 2, 3, 3)),
    (nn.ReflectionPad2d((1, 2, 0, 1)), (1, 2, 4, 3)),
    (nn.ReplicationPad2d(2), (1, 2, 3, 3)),
    (nn.CircularPad2d(1), (1, 2, 3, 3)),
    (nn.AvgPool1d(3, 2, 1), (1, 2, 7)),
    (nn.AvgPool2d(2), (1, 2, 8, 8)),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (1, 2, 9, 9)),
    (nn.AvgPool2d(3, 2, ceil_mode=True), (1, 2, 8, 8)),
    (nn.AdaptiveAvgPool2d(1), (1, 2, 5, 5)),
    (nn.AdaptiveAvgPool2d(7), (1, 2, 2, 2)),
    (nn.AdaptiveAvgPool2d((2, 5)), (1, 2, 6, 6)),
    (nn.AdaptiveAvgPool3d(2), (1, 1, 3, 3, 4)),
    (nn.BatchNorm2d(3), (1, 3, 2, 2)),
]


def _prepared(module):
    module = module.double().eval()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.uniform_(0.1, 2) if name == "running_var" else tensor.normal_()
    return module


@pytest.mark.parametrize(("module", "shape"), LINEAR, ids=str)
def test_a_linear_layer_has_the_norm_of_its_matrix(module, shape):
    module, x = _prepared(module), torch.randn(shape, dtype=torch.float64)
    dense = torch.linalg.matrix_norm(dense_jacobian(module, shape), 2).item()
    assert dense <= norm_of(module, x) * (1 + 1e-9)
    assert norm_of(module, x) <= 1.02 * dense


@pytest.mark.parametrize(("module", "shape"), LINEAR, ids=str)
def test_a_linear_layer_is_bounded_in_scaled_coordinates(module, shape):
    # From t x to t' y the matrix is diag(t') J diag(1/t), with the t' that the rule answers.
    module, x = _prepared(module), torch.randn(shape, dtype=torch.float64)
    channels = torch.rand(1, shape[1], *[1] * (len(shape) - 2), dtype=torch.float64) + 0.2
    for scale in (channels, torch.rand(shape, dtype=torch.float64) + 0.2):
        gain = gain_of(module, x, scale=scale)
        before = torch.ones_like(x) if not isinstance(gain, ScaledGain) else scale.expand(x.shape)
        y = module(x)
        after = getattr(gain, "scale", None)
        after = torch.ones_like(y) if after is None else after.expand(y.shape)
        matrix = after.reshape(-1, 1) * dense_jacobian(module, shape) / before.reshape(1, -1)
        assert torch.linalg.matrix_norm(matrix, 2).item() <= float(gain.norm) * (1 + 1e-9)


@pytest.mark.parametrize(
    "module", [nn.Linear(5, 4), nn.Conv2d(5, 4, 3, padding=1, groups=1), nn.Conv2d(4, 4, 1, groups=2)], ids=str
)
def test_wanted_coordinates_of_the_output_scale_the_rows(module):
    module = _prepared(module)
    channels = module.weight.shape[1] * getattr(module, "groups", 1)
    x = torch.randn((1, channels) if isinstance(module, nn.Linear) else (1, channels, 4, 4), dtype=torch.float64)
    wanted = torch.rand(4, dtype=torch.float64) + 0.1
    gain = gain_of(module, x, output_scale=wanted)
    y = module(x)
    matrix = gain.scale.expand(y.shape).reshape(-1, 1) * dense_jacobian(module, x.shape)
    assert_close(gain.scale.flatten(), wanted)
    dense = torch.linalg.matrix_norm(matrix, 2).item()
    assert dense <= float(gain.norm) * (1 + 1e-9)
    assert float(gain.norm) <= 1.02 * dense


MAX_POOLINGS = [
    (nn.MaxPool1d(3, 2, 1), (2, 9)),
    (nn.MaxPool2d(2), (2, 8, 8)),
    (nn.MaxPool2d(3, 2, 1), (2, 9, 9)),
    (nn.MaxPool2d(3, 1, 1), (2, 6, 6)),
    (nn.MaxPool2d(2, 3), (2, 8, 8)),
    (nn.MaxPool2d(2, 1, dilation=2), (2, 6, 6)),
    (nn.MaxPool2d(3, 2, dilation=2, padding=1), (2, 9, 9)),
    (nn.AdaptiveMaxPool2d(3), (2, 7, 7)),
    (nn.AdaptiveMaxPool2d(7), (2, 3, 3)),
    (nn.MaxPool3d(2, 1), (1, 3, 3, 3)),
]


@pytest.mark.parametrize(("pooling", "shape"), MAX_POOLINGS, ids=str)
def test_max_pooling_is_bounded_with_overlap(pooling, shape):
    for _ in range(5):
        x = torch.randn(1, *shape, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(pooling, x).reshape(-1, x.numel())
        dense = torch.linalg.matrix_norm(jacobian, 2).item()
        assert dense <= norm_of(pooling, x) + 1e-12
        if not isinstance(pooling, nn.AdaptiveMaxPool2d):
            local = gain_of(pooling, x, is_local=True).norm
            assert_close(float(local), dense)  # rows are unit vectors: the norm is the root of the largest count


@pytest.mark.parametrize(("after", "overlap"), [(7, 3.0), (3, 1.0)])
def test_adaptive_max_pooling_counts_the_windows_over_a_pixel(after, overlap):
    assert norm_of(nn.AdaptiveMaxPool2d(after), torch.zeros(1, 1, 3, 3)) == overlap


def test_overlapping_max_pooling_reaches_its_bound():
    # the largest entry sits in four windows of a 3 x 3 pooling with stride 2
    pooling, x = nn.MaxPool2d(3, 2), torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2] = 1.0
    jacobian = torch.autograd.functional.jacobian(pooling, x).reshape(4, 25)
    assert_close(torch.linalg.matrix_norm(jacobian, 2).item(), norm_of(pooling, x))
    assert norm_of(pooling, x) == 2


def test_batch_norm_is_left_to_the_next_layer():
    module, x = _prepared(nn.BatchNorm2d(3)), torch.randn(1, 3, 2, 2, dtype=torch.float64)
    gain = gain_of(module, x)
    assert float(gain.norm) == 1
    assert_close(1 / gain.scale.flatten(), batch_norm_scale(module).abs())


NORMALIZATIONS = [
    (nn.LayerNorm(6, eps=1e-3), (1, 4, 6)),
    (nn.LayerNorm((4, 6), eps=1e-3), (1, 4, 6)),
    (nn.LayerNorm(6, eps=1e-3, elementwise_affine=False), (1, 6)),
    (nn.RMSNorm(6, eps=1e-3), (1, 4, 6)),
    (nn.GroupNorm(2, 4, eps=1e-3), (1, 4, 3, 3)),
    (nn.InstanceNorm2d(3, eps=1e-3), (1, 3, 4, 4)),
    (nn.InstanceNorm2d(3, eps=1e-3, affine=True), (1, 3, 4, 4)),
]


@pytest.mark.parametrize(("module", "shape"), NORMALIZATIONS, ids=str)
def test_a_normalisation_is_bounded_everywhere_and_at_the_example(module, shape):
    module = _prepared(module)
    for spread in (1e-3, 0.1, 10.0):
        x = 0.7 * (not isinstance(module, nn.RMSNorm)) + spread * torch.randn(shape, dtype=torch.float64)
        y = module(x)
        jacobian = torch.autograd.functional.jacobian(module, x).reshape(-1, x.numel())
        gains = [gain_of(module, x), gain_of(module, x, is_local=True)]
        norms = []
        for gain in gains:
            after = torch.ones(()) if gain.scale is None else gain.scale.expand(y.shape).reshape(-1, 1)
            norms.append(torch.linalg.matrix_norm(after * jacobian, 2).item())
        assert norms[0] <= float(gains[0].norm) * (1 + 1e-9)
        assert norms[1] <= float(gains[1].norm) * (1 + 1e-9)
        assert float(gains[1].norm) < 3 * norms[1]  # at the example only the projection is lost
    assert norms[0] < 0.1 * float(gains[0].norm)  # far from constant inputs the global one is loose


def test_layer_norm_reaches_its_constant_at_constant_tokens():
    module = nn.LayerNorm(6, eps=1e-3).double()
    x = torch.full((1, 6), 0.7, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, x).reshape(6, 6)
    assert_close(torch.linalg.matrix_norm(jacobian, 2).item(), norm_of(module, x))


def test_a_linear_layer_after_a_layer_norm_knows_its_range():
    norm, linear = _prepared(nn.LayerNorm(6)), _prepared(nn.Linear(6, 4))
    x = 5 * torch.randn(500, 6, dtype=torch.float64)
    tokens = gain_of(norm, x).output_range
    assert isinstance(tokens, Tokens)
    ball = gain_of(linear, norm(x), input_range=tokens).output_range
    assert isinstance(ball, Ball)
    outputs = linear(norm(x))
    centre = linear(tokens.beta)
    assert (outputs - centre).norm(dim=1).max() <= ball.radius * (1 + 1e-9)
    assert outputs.norm(dim=1).max() <= ball.norm * (1 + 1e-9)


def test_attention_needs_a_layer_norm_before_it():
    module, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(1, 3, 8)
    inputs, same = dict.fromkeys(("query", "key", "value"), x), dict.fromkeys(("query", "key", "value"), "h")
    rule, norms = find_rule(module), CertifiedNorms()
    with pytest.raises(NoBoundError, match="no global Lipschitz constant on an unbounded domain"):
        rule(module, Layer(inputs, module(x, x, x), norms, None, same))
    tokens = Tokens(torch.ones(8), torch.zeros(8), math.sqrt(8))
    gain = rule(module, Layer(inputs, module(x, x, x), norms, tokens, same))
    assert gain.domain is not None
    assert gain.of_one_input
    for other in ({"key": "other"}, {"attn_mask": "h"}, {"value": None}):
        with pytest.raises(NoBoundError, match="Only self-attention"):
            rule(module, Layer(inputs, None, norms, tokens, same | other))


def test_what_has_no_rule_is_refused_and_not_guessed():
    with pytest.raises(NoBoundError, match="divisor"):
        norm_of(nn.AvgPool2d(2, divisor_override=1), torch.randn(1, 2, 4, 4))
    with pytest.raises(NoBoundError, match="has no running statistics"):
        batch_norm_scale(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(NoBoundError, match="unbounded slope"):
        norm_of(nn.CELU(-1.0))
    for discontinuous in (nn.Hardshrink(), nn.Threshold(0.1, 20)):
        assert find_rule(discontinuous) is None


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
