"""The rules of functions and methods against dense Jacobians, behind a diagonal map, as traced and as exported."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.testing import assert_close

from fisher_reg import NoBoundError, Tightening, lipschitz_bound
from fisher_reg.bounds.operator_norms.measures import CertifiedNorms
from fisher_reg.bounds.propagate import compose
from fisher_reg.bounds.rules.registry import FUNCTION_RULES
from fisher_reg.bounds.tracing import trace
from tests.bounds import more_functions
from tests.bounds.test_sound_reading import targets_of_other_cases

SHAPE = (1, 4, 3)


class _Of(nn.Module):
    """A function of the input in loud coordinates; ``exported`` keeps torch.fx from tracing it."""

    def __init__(self, function, exported=False):
        super().__init__()
        self.function, self.exported = function, exported
        generator = torch.Generator().manual_seed(0)
        self.loud = nn.Parameter(torch.rand(4, 3, generator=generator, dtype=torch.float64) * 3 + 0.1)
        self.w = nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
        self.conv = nn.Parameter(torch.randn(5, 4, 2, generator=generator, dtype=torch.float64))
        self.gamma = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.channel = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
        self.register_buffer("variance", torch.rand(4, generator=generator, dtype=torch.float64) + 0.1)

    def forward(self, x):
        if self.exported and len(x.shape) > 100:
            raise ValueError
        return self.function(self, x * self.loud)


TIGHT = {
    "linear": lambda m, x: F.linear(x.flatten(1)[:, :3], m.w),
    "sum and difference": lambda m, x: (x - 0.25) + 1,
    "negative": lambda m, x: -x,
    "concatenation": lambda m, x: torch.cat([x, x.flip(1)], 1),
    "stack": lambda m, x: torch.stack([x, x], 0).sum(0),
    "mean over channels": lambda m, x: x.mean(1),
    "batch norm": lambda m, x: F.batch_norm(x, torch.zeros(4).double(), m.variance, m.channel),
    "pad": lambda m, x: F.pad(x, (1, 2)),
    "roll": lambda m, x: torch.roll(x, 1, 2),
    "permute and view": lambda m, x: x.permute(0, 2, 1).reshape(1, 12),
    "product with a constant": lambda m, x: m.gamma * x,
    "division": lambda m, x: x / m.gamma,
    "addcmul": lambda m, x: torch.addcmul(m.gamma, m.gamma, x),
}
VALID = {
    "conv1d": lambda m, x: F.conv1d(x, m.conv, padding=1),
    "chunks": lambda m, x: x.chunk(2, 1)[0] + x.chunk(2, 1)[1],
    "split": lambda m, x: torch.split(x, [1, 3], 1)[1].relu(),
    "unbind": lambda m, x: x.unbind(1)[0] - 2 * x.unbind(1)[3],
    "the same value twice": lambda m, x: x - 0.5 * x,
    "expand": lambda m, x: x[:, :1].expand(-1, 4, -1),
    "repeat": lambda m, x: x.repeat(1, 2, 1),
    "sum over an axis": lambda m, x: x.sum(2),
    "sum over all": lambda m, x: x.sum(dim=(1, 2)),
    "largest": lambda m, x: x.amax(1),
    "layer norm": lambda m, x: F.layer_norm(x, (3,), m.gamma, m.gamma, 1e-2),
    "group norm": lambda m, x: F.group_norm(x, 2, m.channel, m.channel, 1e-2),
    "softmax": lambda m, x: x.softmax(2),
    "activations": lambda m, x: F.silu(F.gelu(x)) + torch.tanh(x).sigmoid() + F.softplus(x),
    "leaky activations": lambda m, x: F.elu(F.leaky_relu(x, 2.0), 1.5) + F.hardswish(x) + F.relu6(x),
    "prelu": lambda m, x: F.prelu(x, m.channel),
    "max pooling": lambda m, x: F.max_pool2d(x, 2, 1),
    "average pooling": lambda m, x: F.avg_pool2d(x, 2, 1),
    "adaptive pooling": lambda m, x: F.adaptive_avg_pool2d(x, 2),
    "interpolation": lambda m, x: F.interpolate(x, scale_factor=2, mode="linear"),
    "absolute value": lambda m, x: (x.abs() - 0.1).unsqueeze(1).squeeze(1).contiguous().clone(),
    "attention": lambda m, x: _attention(m, x, 1e-2),
    "causal attention": lambda m, x: _attention(m, x, 1e-1, is_causal=True),
    "slice of chunks": lambda m, x: torch.cat(x.chunk(4, 1)[1:], 1),
    "chunks of a slice": lambda m, x: x.split(1, 1)[1:][0] - x.unbind(1)[::2][1].unsqueeze(1),
    "expanded scale in a view": lambda m, x: x.transpose(1, 2).contiguous().view(1, 3, 2, 2).view(1, 12),
    "interpolation by a fraction": lambda m, x: F.interpolate(x, scale_factor=1.9, mode="linear"),
    "interpolation by a fraction of a plane": lambda m, x: F.interpolate(x[:, None], scale_factor=1.7, mode="bilinear"),
    "nearest by a fraction": lambda m, x: F.interpolate(x, scale_factor=1.7),
    "nearest of a plane": lambda m, x: F.interpolate(x[:, None], scale_factor=(2.6, 1.5)),
    "interpolation of a volume": lambda m, x: F.interpolate(x[:, None, None], scale_factor=1.5, mode="trilinear"),
    "nearest of a volume": lambda m, x: F.interpolate(x[:, None, None], size=(2, 5, 4)),
    "attention of tokens that are parts": lambda m, x: _parts(m, x, 2),
    "attention over parts": lambda m, x: _parts(m, x, 1),
}
EVERY = {
    "operators": lambda m, x: 1 + torch.div(torch.mul(-x, 3), 2) / 2,
    "methods": lambda m, x: x.add(1).sub(0.5).mul(2).div(4).neg().abs() + m.loud.addcmul(m.gamma, x),
    "methods in place": lambda m, x: x.clone().add_(1).sub_(0.5).mul_(2).div_(4).to(torch.float64),
    "functions": lambda m, x: torch.sub(torch.neg(torch.abs(torch.add(x, 1))), 2).type_as(m.gamma),
    "detached": lambda m, x: x + 0 * torch.clone(x).detach() + 0 * x.clone().detach_(),
    "casts": lambda m, x: x.double().to(torch.float64).contiguous(),
    "reductions": lambda m, x: torch.mean(x, 1) + torch.sum(x, 1) + torch.amax(x, 1) + torch.amin(x, 1) - x.amin(1),
    "concatenations": lambda m, x: torch.stack([torch.concat([x, x], 1), torch.cat([x, 2 * x], 1)], 1),
    "axes": lambda m, x: torch.squeeze(torch.unsqueeze(torch.swapaxes(torch.transpose(x, 1, 2), 1, 2), 3), 3).swapaxes(
        1, 2
    ),
    "shapes": lambda m, x: torch.permute(torch.reshape(torch.flatten(x, 1), (1, 3, 4)), (0, 2, 1)).unflatten(1, (2, 2)),
    "turned": lambda m, x: (
        torch.flip(x, (1,)) + torch.roll(x.flip(2), 1, 1).roll(1, 2) + x.flatten(1).t().t().reshape(-1, 4, 3)
    ),
    "parts": lambda m, x: (
        torch.select(x, 1, 0) + x.select(1, 1) + torch.narrow(x, 1, 2, 1)[:, 0] - x.narrow(1, 3, 1)[:, 0]
    ),
    "split": lambda m, x: (
        x.split_with_sizes([2, 2], 1)[0] + x.split(2, 1)[1] + torch.chunk(x, 2, 1)[1] + torch.unbind(x, 1)[0][:, None]
    ),
    "shuffled pixels": lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x[..., None], 2), 2) * 2,
    "expanded": lambda m, x: x[:, :1].expand_as(m.loud[None]) + x.mean(1, keepdim=True).expand(-1, 4, -1),
    "dropouts": lambda m, x: (
        torch.dropout(F.dropout1d(F.dropout(x, 0.5, m.training), 0.5, m.training), 0.5, False) + _dropped_planes(m, x)
    ),
    "softmaxes": lambda m, x: torch.softmax(x, 1) + F.softmax(x, dim=2),
    "rectified": lambda m, x: F.relu_(x - 1) + (x + 1).relu_() + torch.relu_(x + 2) + F.relu(x).relu() + torch.relu(x),
    "hard activations": lambda m, x: F.hardtanh(x, -2.0, 0.5) + F.hardsigmoid(x) + F.hardswish(x),
    "smooth activations": lambda m, x: F.celu(x, 2.0) + F.selu(x) + F.mish(x) + F.logsigmoid(x) + F.tanhshrink(x),
    "steep activations": lambda m, x: F.tanh(x) + torch.sigmoid(x) + (x - 1).tanh_() + (x + 1).sigmoid_(),
    "prelu by torch": lambda m, x: torch.prelu(x, m.channel) + x.prelu(m.channel),
    "convolutions": lambda m, x: (
        F.conv2d(x[..., None], m.conv[..., None]) + torch.conv2d(x[..., None], m.conv[..., None])
    ),
    "convolutions of a line": lambda m, x: torch.conv1d(x, m.conv, None, 1, 1, 2),
    "convolutions of a volume": lambda m, x: (
        F.conv3d(x[..., None, None], m.conv[..., None, None], stride=2, padding=(1, 0, 0))
        - 0.5 * torch.conv3d(x[..., None, None], m.conv[..., None, None], None, (2, 2, 2), (1, 0, 0))
    ),
    "pooled lines": lambda m, x: F.adaptive_avg_pool1d(x, 2) + x.float().double().roll(1, 1)[..., :2],
    "norms by torch": lambda m, x: (
        torch.layer_norm(x, (3,), m.gamma, m.gamma, 1e-2) + torch.group_norm(x, 2, m.channel, m.channel, 1e-2)
    ),
}

ONLY_TRACED = {  # torch.export takes these apart, or returns more than the value
    "softsign": lambda m, x: F.softsign(x),
    "adaptive max pooling": lambda m, x: F.adaptive_max_pool2d(x, (4, 2)),
}
# torch.fx follows these to what they call
NEVER_TRACED = {F.tanh, F.sigmoid, "index"}  # the last one is an operator only
CASES = (TIGHT, VALID, EVERY, ONLY_TRACED, *more_functions.CASES)


def _dropped_planes(m, x):
    return F.dropout2d(x[:, None], 0.5, m.training)[:, 0] + F.dropout3d(x[:, None, None], 0.5, m.training)[:, 0, 0]


def _parts(m, x, axis):
    """Parts of tokens as tokens, whose centres are far apart; or tokens as heads, with their parts for tokens."""
    h = F.layer_norm(x, (3,), m.gamma, m.gamma, 1e-1)
    apart = 50 * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    query, key, value = (F.linear(h, 0.2 * m.w[:4], bias).view(1, 4, 2, 2) for bias in (None, apart / 50, apart))
    if axis == 2:
        query, key, value = (item.reshape(1, 1, 8, 2) for item in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).flatten(1)


def _attention(m, x, eps, **options):
    h = F.layer_norm(x, (3,), m.gamma, m.gamma, eps)
    query = F.linear(h, m.w[:2]).view(1, 4, 1, 2).transpose(1, 2)
    key, value = F.linear(h, m.w[1:]).view(1, 4, 2, 2).permute(2, 0, 1, 3).unsqueeze(2).unbind(0)
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).reshape(1, 8)


def _norms(function, exported, points=5):
    model = _Of(function, exported).eval()
    traced = trace(model, torch.zeros(SHAPE, dtype=torch.float64))
    is_exported = any(isinstance(node.target, torch._ops.OpOverload) for node in traced.graph.nodes)
    assert is_exported == exported
    bound = compose(traced, CertifiedNorms(), tightening=Tightening(head=False)).log_norm.exp().item()
    torch.manual_seed(0)
    dense = 0.0
    for scale in (0.03, 1.0):
        for _ in range(points):
            x = scale * torch.randn(SHAPE, dtype=torch.float64)
            jacobian = torch.autograd.functional.jacobian(model, x)
            dense = max(dense, torch.linalg.matrix_norm(jacobian.reshape(-1, 12), 2).item())
    return dense, bound


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", TIGHT)
def test_a_linear_function_of_one_value_is_bounded_tightly(name, exported):
    dense, bound = _norms(TIGHT[name], exported)
    assert dense <= bound * (1 + 1e-9)
    if name not in ("sum and difference", "concatenation", "stack", "mean over channels", "linear"):
        assert bound <= dense * (1 + 1e-5)  # nothing is lost to the loud coordinates


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", VALID | EVERY)
def test_a_function_is_bounded(name, exported):
    dense, bound = _norms((VALID | EVERY)[name], exported)
    assert 0 < dense <= bound * (1 + 1e-9)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(("length", "factor"), [(3, 1.9), (3, 2.6), (12, 0.3)])
def test_an_interpolation_by_a_fraction_is_bounded_where_torch_puts_it(length, factor, exported):
    upsample = nn.Upsample(scale_factor=factor, mode="linear")
    for function in (lambda m, x: F.interpolate(x, scale_factor=factor, mode="linear"), lambda m, x: upsample(x)):
        model = _Of(lambda m, x, function=function: function(m, x.reshape(-1, 12 // length, length)), exported).eval()
        with torch.no_grad():
            model.loud.fill_(1.0)
        x = torch.zeros(SHAPE, dtype=torch.float64)
        bound = compose(trace(model, x), CertifiedNorms(), tightening=Tightening(head=False)).log_norm.exp().item()
        jacobian = torch.autograd.functional.jacobian(model, x).reshape(-1, 12)
        assert_close(bound, torch.linalg.matrix_norm(jacobian, 2).item(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ONLY_TRACED)
def test_a_function_without_an_exported_rule_is_bounded_as_traced(name):
    dense, bound = _norms(ONLY_TRACED[name], exported=False)
    assert 0 < dense <= bound * (1 + 1e-9)
    with pytest.raises(NoBoundError, match="No bound rule for|a value that depends on the input"):
        _norms(ONLY_TRACED[name], exported=True)


def test_every_registered_function_and_method_is_called_by_a_case():
    called = targets_of_other_cases() | {
        node.target
        for function in itertools.chain(*(cases.values() for cases in CASES))
        for node in trace(_Of(function).eval(), torch.full(SHAPE, 0.5, dtype=torch.float64)).graph.nodes
        if node.op in ("call_function", "call_method")
    }
    public = {item for item in FUNCTION_RULES if not isinstance(item, str) or hasattr(torch.Tensor, item)}
    assert public - called == NEVER_TRACED


@pytest.mark.parametrize("exported", [False, True])
def test_a_mask_of_truth_values_for_each_example_has_a_bound_at_the_inputs(exported):
    def masked(m, x):
        h = F.layer_norm(x, (3,), m.gamma, m.gamma, 1e-1)
        mask = torch.ones(1, 4, 4, dtype=torch.bool).tril().expand(len(x), -1, -1)
        query, key, value = (F.linear(h, m.w[i : i + 3]) for i in range(3))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).flatten(1)

    _check_local(_Of(masked, exported).eval(), torch.randn(2, 4, 3, dtype=torch.float64))


def test_examples_that_are_alike_hide_no_axis_of_tokens_from_the_local_bound():
    model = _Of(lambda m, x: F.gelu(x.transpose(0, 1)).transpose(0, 1).flatten(1)).eval()
    with torch.no_grad():
        model.loud.fill_(1.0)
    tokens = torch.tensor([-20.0, 1.5, 1.5, -20.0], dtype=torch.float64)
    _check_local(model, tokens[:, None].expand(4, 4, 3).clone())


def _check_local(model, x):
    traced = trace(model, x)
    local = compose(traced, CertifiedNorms(), tightening=Tightening(head=False), is_local=True).log_norm.exp()
    for example, bound in zip(x, local.expand(len(x)), strict=True):
        jacobian = torch.autograd.functional.jacobian(model, example[None]).reshape(-1, 12)
        assert torch.linalg.matrix_norm(jacobian, 2).item() <= bound.item() * (1 + 1e-9)


@pytest.mark.parametrize(
    "function",
    [lambda m, x: (x * x.sigmoid()).flatten(1), lambda m, x: (x.mean(2, keepdim=True) * x).sum(1)],
)
def test_a_product_of_two_values_has_a_bound_at_the_inputs_only(function):
    model = _Of(function).eval()
    x = torch.randn(SHAPE, dtype=torch.float64)
    with pytest.raises(NoBoundError, match="two values that depend on the input"):
        lipschitz_bound(model, x)
    local = compose(trace(model, x), CertifiedNorms(), tightening=Tightening(), is_local=True).log_norm.exp().item()
    jacobian = torch.autograd.functional.jacobian(model, x).reshape(-1, 12)
    assert torch.linalg.matrix_norm(jacobian, 2).item() <= local * (1 + 1e-9)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x.softmax(1) @ x.transpose(1, 2), "'matmul' .* multiplies two values"),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x), "unbounded domain"),
        (lambda m, x: F.batch_norm(x, None, None, training=True), "examples depend on each other"),
        (lambda m, x: F.conv1d(x, m.conv, padding="same"), "padding given by name"),
        (lambda m, x: F.layer_norm(x, (3,), eps=0.0), "without an eps"),
        (lambda m, x: torch.addcmul(x, m.gamma, x), "input depends on the input"),
    ],
)
def test_what_has_no_constant_is_refused(function, message):
    with pytest.raises(NoBoundError, match=message):
        lipschitz_bound(_Of(lambda m, x: function(m, x).flatten(1)), torch.randn(SHAPE, dtype=torch.float64))


def test_a_module_that_is_exported_keeps_the_name_of_its_part():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return torch.linalg.inv(self.fc(x)[..., :3]).flatten(1) if math.prod(x.shape) > 1 else x

    model = nn.Sequential(Inner()).double()
    with pytest.raises(NoBoundError, match=r"linalg_inv at '0\."):
        lipschitz_bound(model, torch.randn(1, 3, 3, dtype=torch.float64))
