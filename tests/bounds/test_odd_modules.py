"""Legal but unusual modules: the bound is above the exact eigenvalue, or refused; never silently below."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fisher_reg import Exact, NoBoundError, fisher_bound, fisher_spectral_norm, register_bound_rule


def _linear(inputs=6, outputs=3):
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _With(nn.Module):
    """A forward given as a function of the module and the input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class _Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = _linear()

    def forward(self, x, temperature=None):
        logits = self.fc(x)
        return logits if temperature is None else logits / 1000


class _Add(nn.Module):
    def forward(self, first, second):
        return first + second


class _Twice(nn.Module):
    def forward(self, x):
        return x, x


class _ThroughConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)


class _BatchNormTimes100(nn.BatchNorm2d):
    def forward(self, x):
        return 100 * super().forward(x)


register_bound_rule(_Add)(lambda module, layer: math.sqrt(2))
register_bound_rule(_Twice)(lambda module, layer: math.sqrt(2))
register_bound_rule(_ThroughConv)(lambda module, layer: 1.0)
register_bound_rule(_BatchNormTimes100)(lambda module, layer: 100.0)


def _convolutional(conv, norm):
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, norm, nn.Flatten(), _linear(32, 3))


def _loud_batch_norm():
    norm = nn.BatchNorm2d(2)
    nn.init.constant_(norm.weight, 1000.0)
    return norm


def _half_conv():
    conv = _ThroughConv(1, 2, 1)
    nn.init.constant_(conv.weight, 0.5)
    return conv


def _hooked(place):
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), _linear())
    place(model).register_forward_hook(lambda module, args, output: 100 * output)
    return model


def _replaced_forward():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), _linear())
    model.forward = lambda x: nn.Sequential.forward(model, 100 * x)
    return model


def _pooling_without_channels(pooling, outputs):
    fc = _summing(nn.Linear(outputs, 2))
    return _With(lambda self, x: self.fc(self.pool(x.squeeze(1)).flatten(1)), pool=pooling, fc=fc)


def _summing(linear):
    """Logits plus and minus the sum of the inputs: as sensitive as can be to many equal ones."""
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [-1.0]]).expand_as(linear.weight))
        linear.bias.zero_()
    return linear


NEAR_ZERO = 0.01 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
IMAGES = 1e-5 * torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
BUMP = torch.zeros(1, 1, 5, 5).index_put_(
    (torch.tensor(0), torch.tensor(0), torch.tensor(2), torch.tensor(2)), torch.tensor(1e-3)
)

VALID = {
    "a default argument": (lambda: _Temperature(), NEAR_ZERO),
    "a hook of the model": (lambda: _hooked(lambda model: model), 0.01 * NEAR_ZERO),
    "a forward of the instance": (_replaced_forward, 0.01 * NEAR_ZERO),
    "two inputs, one constant": (
        lambda: _With(
            lambda self, x: self.fc(self.add(self.c.expand_as(x), x)),
            add=_Add(),
            fc=_linear(),
            c=nn.Parameter(torch.zeros(1, 6)),
        ),
        NEAR_ZERO,
    ),
    "two inputs of different reach": (
        lambda: _With(lambda self, x: self.fc(self.add(x, 100 * x)), add=_Add(), fc=_linear()),
        0.01 * NEAR_ZERO,
    ),
    "a user's convolution before a loud batch norm": (lambda: _convolutional(_half_conv(), _loud_batch_norm()), IMAGES),
    "a batch norm with its own rule": (lambda: _convolutional(nn.Conv2d(1, 2, 1), _BatchNormTimes100(2)), IMAGES),
    "pooling of images without channels": (lambda: _pooling_without_channels(nn.MaxPool2d(3, 1, 1), 25), BUMP),
    "enlarging pooling without channels": (
        lambda: _pooling_without_channels(nn.AdaptiveAvgPool2d(8), 64),
        torch.zeros(1, 1, 2, 2),
    ),
    "a negative ELU": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ELU(-5.0), _linear()), NEAR_ZERO),
    "keyword arguments": (
        lambda: _With(lambda self, x: self.fc(torch.mul(torch.cat(tensors=[x], dim=1), other=2)), fc=_linear()),
        NEAR_ZERO,
    ),
    "the same value twice": (lambda: _With(lambda self, x: self.fc(x + x), fc=_linear()), NEAR_ZERO),
    "concatenated with itself": (
        lambda: _With(lambda self, x: self.fc(torch.cat([x, x], 1)), fc=_linear(12)),
        NEAR_ZERO,
    ),
    "broadcast in a sum": (
        lambda: _With(lambda self, x: self.fc(x[:, :1] + torch.zeros(25)), fc=_summing(nn.Linear(25, 2))),
        NEAR_ZERO,
    ),
    "broadcast in a product": (
        lambda: _With(lambda self, x: self.fc(x[:, :1] * torch.ones(25)), fc=_summing(nn.Linear(25, 2))),
        NEAR_ZERO,
    ),
    "in place on a value that is used again": (
        lambda: _With(lambda self, x: _in_place(self.fc(x)), fc=_linear()),
        NEAR_ZERO,
    ),
    "in place on a value that is not used again": (
        lambda: _With(lambda self, x: self.fc(x).mul_(3.0), fc=_linear()),
        NEAR_ZERO,
    ),
}


@pytest.mark.parametrize("name", VALID)
def test_the_bound_holds(name):
    build, x = VALID[name]
    model = build().eval()
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue.max().item()
    assert exact > 0.1
    assert exact <= fisher_bound(model, x).value * (1 + 1e-4)


def _cross_attention(self, x):
    h = self.norm(x.reshape(-1, 1, 6))
    memory = self.memory.expand(h.shape[0], -1, -1)
    return self.fc(self.attention(h, memory, memory)[0][:, 0])


def _attention_weights(self, x):
    h = self.norm(x.reshape(-1, 1, 6))
    return self.attention(h, h, h)[1].flatten(1).expand(-1, 3)


def _attention():
    return {"norm": nn.LayerNorm(6), "attention": nn.MultiheadAttention(6, 1, batch_first=True), "fc": _linear()}


REFUSED = {
    "a product of two values": (lambda self, x: self.fc(x * x), "two values that depend on the input"),
    "a number made of the input": (lambda self, x: self.fc(x * x.mean().item()), "depends on the other examples"),
    "dropout in evaluation": (lambda self, x: self.fc(F.dropout(x, 0.9)), "random, also in evaluation"),
    "addition with a factor": (lambda self, x: self.fc(torch.add(x, x, alpha=100)), "called with a factor"),
    "division with rounding": (lambda self, x: self.fc(torch.div(x, 2, rounding_mode="floor")), "rounding_mode"),
    "division by the input": (lambda self, x: self.fc(1 / x), "divides by a value that depends"),
    "attention to something else": (_cross_attention, "Only self-attention"),
    "the weights of an attention": (_attention_weights, "bounds only its first output"),
    "the second of two outputs": (lambda self, x: self.fc(self.twice(x)[1]), "bounds only its first output"),
    "a tuple that grows": (lambda self, x: self.fc((self.twice(x) + (x,))[0]), "bounds only its first output"),
    "control flow": (
        lambda self, x: self.fc(x) if x[0, 0] > 0 else x,
        "depends on the other examples|cannot be traced",
    ),
    "a length": (lambda self, x: self.fc(x) * len(x), "depends on the other examples"),
}


def _in_place(logits):
    logits.mul_(3.0)
    return logits


@pytest.mark.parametrize("name", REFUSED)
def test_the_bound_is_refused(name):
    function, message = REFUSED[name]
    model = _With(function, **_attention(), memory=nn.Parameter(200 * torch.randn(1, 5, 6)), twice=_Twice()).eval()
    with pytest.raises(NoBoundError, match=message):
        fisher_bound(model, NEAR_ZERO)


@pytest.mark.parametrize("place", [lambda model: model[1], lambda model: model[0]])
def test_a_hook_on_a_layer_is_refused(place):
    with pytest.raises(NoBoundError, match="has hooks"):
        fisher_bound(_hooked(place), NEAR_ZERO)


def test_a_convolution_with_another_arithmetic_is_bounded_as_it_computes():
    class Scaled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 100 * weight, bias)

    model = _convolutional(Scaled(1, 2, 1), nn.Identity()).eval()
    exact = fisher_spectral_norm(model, IMAGES, solver=Exact()).eigenvalue.max().item()
    assert 0.1 < exact <= fisher_bound(model, IMAGES).value * (1 + 1e-4)


def test_torchs_own_normalisations_of_the_weight_keep_the_rule():
    x = NEAR_ZERO
    for normalise in (
        nn.utils.spectral_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
    ):
        model = nn.Sequential(normalise(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3)).eval()
        exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue.max().item()
        assert 0 < exact <= fisher_bound(model, x).value


def test_an_output_that_is_no_logits_is_refused():
    with pytest.raises(ValueError, match=r"logits of shape \(B, K\).*dict"):
        fisher_bound(_With(lambda self, x: {"logits": self.fc(x)}, fc=_linear()), NEAR_ZERO)
    with pytest.raises(ValueError, match="K = 1"):
        fisher_bound(_linear(6, 1), NEAR_ZERO)
    with pytest.raises(ValueError, match="input_std must be positive; its smallest value is -1"):
        fisher_bound(_linear(), NEAR_ZERO, input_std=torch.tensor([1.0, -1, 1, 1, 1, 1]))
