"""The rules of functions and methods against dense Jacobians, behind a diagonal map, as traced and as exported."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fisher_reg import NoBoundError, Tightening, lipschitz_bound
from fisher_reg.bounds.certified import CertifiedNorms
from fisher_reg.bounds.graph import compose
from fisher_reg.bounds.trace import trace

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
}


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
@pytest.mark.parametrize("name", VALID)
def test_a_function_is_bounded(name, exported):
    dense, bound = _norms(VALID[name], exported)
    assert 0 < dense <= bound * (1 + 1e-9)


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
        (lambda m, x: x.softmax(1) @ x.transpose(1, 2), "No bound rule for the function matmul"),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x), "unbounded domain"),
        (lambda m, x: F.pad(x, (1, 1), mode="circular"), "pads with copies"),
        (lambda m, x: F.interpolate(x.unsqueeze(1), scale_factor=2, mode="bicubic"), "bicubic"),
        (lambda m, x: F.batch_norm(x, None, None, training=True), "couples the examples"),
        (lambda m, x: F.conv1d(x, m.conv, padding="same"), "pads by a word"),
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
