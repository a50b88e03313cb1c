"""The composed bound: valid, equal to the closed forms of the families, and clear where it does not exist."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import DenseNet, ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import VGG, make_layers

from fisher_reg import (
    Bernoulli,
    Exact,
    Gaussian,
    NoBoundError,
    NonFiniteWeightsError,
    SpectralPenalty,
    fisher_bound,
    fisher_spectral_norm,
    lipschitz_bound,
    register_bound_rule,
)
from fisher_reg.bounds.attention import layer_norm_tokens, self_attention_lipschitz
from fisher_reg.bounds.conv import conv_norm, linear_norm
from fisher_reg.bounds.layers import GELU_SLOPE
from tests import cases


def _largest(model, x):
    return max(fisher_spectral_norm(model, part, solver=Exact()).eigenvalue.max().item() for part in x.split(100))


def _ascend(model, x, steps=50):
    """Gradient ascent on the eigenvalue over the input; the best point on the way, per example."""
    best, best_value = x, torch.zeros(len(x))
    for _ in range(steps):
        shift = torch.zeros_like(x, requires_grad=True)
        values = []

        def keep(value, values=values):
            values.append(value.detach())
            return value.sum()

        penalty = SpectralPenalty(num_steps=3, reduction=keep)
        (slope,) = torch.autograd.grad(penalty(lambda y, shift=shift: model(y + shift), x), shift)
        better = values[0] > best_value
        best_value = torch.where(better, values[0], best_value)
        best = torch.where(better[:, None, None, None], x, best)
        x = x + 0.1 * nn.functional.normalize(slope.flatten(1)).view_as(x)
    return best


@pytest.mark.parametrize("weights", ["random", "trained"])
def test_the_bound_is_above_the_exact_eigenvalue(family, trained, digits, weights, record_property):
    model = copy.deepcopy(trained) if weights == "trained" else cases.network(family, digits, seed=1).eval()
    if weights == "random" and family == "vit":
        nn.init.normal_(model.network.heads.head.weight)  # torchvision starts it at zero
    bound = fisher_bound(model, cases.test_images(digits, 1))
    assert bound.certified
    noise = torch.rand(200, *cases.test_images(digits, 1).shape[1:])
    climbed = _ascend(model, cases.test_images(digits, 8))
    start, random, optimised = (_largest(model, x) for x in (cases.test_images(digits, 8), noise, climbed))
    record_property("log10_bound", bound.log10_value)
    record_property("log10_random_inputs", math.log10(random))
    record_property("log10_optimised_inputs", math.log10(optimised))
    assert optimised > start
    assert math.log10(max(start, random, optimised)) <= bound.log10_value


# The closed forms per family, written over the modules by hand. They share only the layer norms with the graph.


def _conv_bn(conv, size, norm=None):
    weight = conv.weight.detach().double()
    if norm is not None:
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * scale.detach()[:, None, None, None]
    return conv_norm(weight, (size, size), conv.stride, conv.dilation, conv.groups)


def _head(linear):
    weight = linear.weight.detach().double()
    return linear_norm(weight - weight.mean(0))


def _randomise(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.2, 2)
                module.weight.normal_()
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_()
                module.bias.normal_()
    return model.eval()


def test_vgg_is_the_product_over_layers():
    model = VGG(make_layers([4, "M", 6, "M"], batch_norm=True), num_classes=5)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)
    model = _randomise(model)
    first, norm1, _, _, second, norm2, _, _ = model.features
    expected = _conv_bn(first, 8, norm1) * _conv_bn(second, 4, norm2) * _head(model.classifier) / 2
    assert_close(lipschitz_bound(model, torch.zeros(1, 3, 8, 8)).value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_resnet_is_the_product_of_shortcut_plus_branch(block):
    model = _randomise(ResNet(block, [1, 2, 1, 1], num_classes=5))
    sizes = {"layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2}
    expected = _conv_bn(model.conv1, 32, model.bn1) * 2  # max pooling 3 x 3, stride 2: each entry in 4 windows
    for name, size in sizes.items():
        for index, unit in enumerate(getattr(model, name)):
            before = 2 * size if index == 0 and name != "layer1" else size
            branch = 1.0
            for number in (1, 2, 3):
                if hasattr(unit, f"conv{number}"):
                    conv = getattr(unit, f"conv{number}")
                    at = before if conv.stride == (1, 1) and number == 1 and block is Bottleneck else size
                    branch *= _conv_bn(conv, at, getattr(unit, f"bn{number}"))
            shortcut = 1.0 if unit.downsample is None else _conv_bn(unit.downsample[0], size, unit.downsample[1])
            expected *= shortcut + branch
    expected *= 0.5 * _head(model.fc)  # the mean over 2 x 2
    assert_close(lipschitz_bound(model, torch.zeros(1, 3, 64, 64)).value, expected, rtol=1e-6, atol=0)


def test_densenet_is_the_product_of_roots():
    model = _randomise(DenseNet(4, (2, 3), 6, num_classes=5))
    features = model.features

    def scale(norm):
        return (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().max().item()

    expected = _conv_bn(features.conv0, 16, features.norm0) * 2
    for name, size in (("denseblock1", 8), ("denseblock2", 4)):
        for layer in getattr(features, name).values():
            branch = scale(layer.norm1) * _conv_bn(layer.conv1, size, layer.norm2) * _conv_bn(layer.conv2, size)
            expected *= math.sqrt(1 + branch**2)
        if name == "denseblock1":
            transition = features.transition1
            expected *= scale(transition.norm) * _conv_bn(transition.conv, size) / 2
    expected *= scale(features.norm5) / 4 * _head(model.classifier)
    assert_close(lipschitz_bound(model, torch.zeros(1, 3, 32, 32)).value, expected, rtol=1e-6, atol=0)


def test_vit_is_the_product_over_residual_blocks():
    model = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    nn.init.normal_(model.conv_proj.weight)
    model = _randomise(model)

    def layer_norm(norm):
        return norm.weight.abs().max().item() / math.sqrt(norm.eps)

    expected = _conv_bn(model.conv_proj, 2)
    for block in model.encoder.layers:
        tokens = layer_norm_tokens(block.ln_1.weight, block.ln_1.bias)
        attention = block.self_attention
        weights = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight
        expected *= 1 + layer_norm(block.ln_1) * self_attention_lipschitz(*weights, 2, 5, tokens)
        mlp = linear_norm(block.mlp[0].weight) * GELU_SLOPE * linear_norm(block.mlp[3].weight)
        expected *= 1 + layer_norm(block.ln_2) * mlp
    expected *= layer_norm(model.encoder.ln) * _head(model.heads.head)
    bound = lipschitz_bound(model, torch.zeros(1, 3, 8, 8))
    assert_close(bound.log10_value, math.log10(expected), rtol=1e-6, atol=0)
    assert "attention" in bound.domain


def test_a_linear_model_is_tight_for_each_likelihood():
    model, x = nn.Linear(6, 2).double(), torch.zeros(1, 6, dtype=torch.float64)
    nn.init.zeros_(model.bias)  # p = 1/2 at the origin
    for likelihood in (Gaussian(variance=0.5), Bernoulli()):
        bound = fisher_bound(model, x, likelihood=likelihood).value
        exact = fisher_spectral_norm(model, x, likelihood=likelihood, solver=Exact()).eigenvalue.item()
        assert_close(bound, exact)
    assert_close(fisher_bound(model, x).value, fisher_spectral_norm(model, x).eigenvalue.item())
    std = torch.tensor([0.5, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert_close(fisher_bound(model, x, input_std=std).value, 4 * fisher_bound(model, x).value)


class _Arithmetic(nn.Module):
    """Every function with a rule that an image network may use between its layers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, -3.0, 1.0, 0.5, 1.0, 1.0]))

    def forward(self, x):
        y = torch.relu(x * self.scale) / 2 - 0.1
        y = torch.cat([y, nn.functional.gelu(x)], 1)
        y = y + torch.tanh(y) + 1
        y = nn.functional.dropout(y.reshape(-1, 3, 4).permute(0, 2, 1), training=self.training)
        return y.mean(2) + x.sigmoid()[:, :1].expand(-1, 4)


def test_functions_between_layers_are_bounded():
    model = _Arithmetic().double().eval()
    bound = lipschitz_bound(model, torch.zeros(1, 6, dtype=torch.float64)).value
    # cat(relu(3 x) / 2, gelu(x)); twice that by the sum; mean over 3; four copies of a sigmoid
    expected = math.hypot(1.5, GELU_SLOPE) * 2 / math.sqrt(3) + 0.25 * 2
    assert_close(bound, expected)
    x = torch.randn(50, 6, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda y: model(y[None])[0]))(x)
    assert torch.linalg.matrix_norm(jacobians, 2).max() <= bound


def test_linear_on_tokens_is_not_folded_into_a_batch_norm_over_tokens():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(15, 2)).double().eval()
    model[1].running_var.uniform_(0.1, 2)
    bound = lipschitz_bound(model, torch.zeros(1, 3, 4, dtype=torch.float64))
    scale = model[1].running_var.add(model[1].eps).rsqrt().max().item()
    assert_close(bound.value, linear_norm(model[0].weight) * scale * _head(model[3]))


def test_terms_name_the_layers_and_multiply_to_the_bound():
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double()
    bound = lipschitz_bound(model, torch.zeros(1, 4, dtype=torch.float64))
    assert [term.name for term in bound.terms] == ["0", "1", "2"]
    assert_close(math.prod(term.norm for term in bound.terms), bound.value)
    assert "centred" in str(bound)
    assert "certified" in str(bound)


def test_an_overflowing_bound_keeps_its_logarithm():
    layers = [layer for _ in range(60) for layer in (nn.Linear(4, 4), nn.LayerNorm(4, eps=1e-12))]
    bound = fisher_bound(nn.Sequential(*layers, nn.Linear(4, 2)), torch.zeros(1, 4))
    assert bound.value == math.inf
    assert 308 < bound.log10_value < 1000


def test_zero_weights_give_a_zero_bound():
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    assert fisher_bound(model, torch.zeros(1, 4)).value == 0


def test_the_model_is_left_as_it_was_found():
    model = cases.tiny_network(batch_norm=True, dropout=True).train()
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        fisher_bound(model, torch.zeros(1, 6))
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(module.training for module in model.modules())


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x):
        return self.cell(x)[0]


class _Exotic(nn.Module):
    def forward(self, x):
        return torch.erf(x)


def test_an_unknown_part_is_named_with_the_remedy():
    with pytest.raises(
        NoBoundError, match=r"No bound rule for LSTMCell at 'cell'(.|\n)*register_bound_rule\(YourModule\)"
    ):
        fisher_bound(_Recurrent(), torch.zeros(1, 4))
    model = nn.Sequential(_Exotic(), nn.Linear(4, 3))
    with pytest.raises(NoBoundError, match=r"the function erf(.|\n)*register_bound_rule"):
        fisher_bound(model, torch.zeros(1, 4))

    @register_bound_rule(_Exotic)
    def _(module, layer):
        return 2 / math.sqrt(math.pi)

    assert_close(lipschitz_bound(model, torch.zeros(1, 4)).value, 2 / math.sqrt(math.pi) * _head(model[1]))


def test_what_cannot_have_a_bound_is_refused():
    class Product(nn.Module):
        def forward(self, x):
            return x * x

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NoBoundError, match="two values that depend on the input"):
        fisher_bound(Product(), torch.zeros(1, 4))
    with pytest.raises(NoBoundError, match="Branching cannot be traced"):
        fisher_bound(Branching(), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="nn.Module; got function"):
        fisher_bound(lambda x: x, torch.zeros(1, 4))
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, torch.nan)
    with pytest.raises(
        NonFiniteWeightsError, match=r"'the model itself' \(Linear\) has NaN or infinite values in weight"
    ):
        fisher_bound(model, torch.zeros(1, 4))
