"""The closed forms of the four families, written over their modules by hand, against the composition over the graph.

They share the norms of single layers with the graph and nothing else.
"""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models import DenseNet, ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import VGG, make_layers

from fisher_reg import Tightening, lipschitz_bound
from fisher_reg.bounds.operator_norms import measures
from fisher_reg.bounds.operator_norms.attention import AttentionWeights, layer_norm_tokens, self_attention_lipschitz
from fisher_reg.bounds.operator_norms.conv import Geometry, conv_norm
from fisher_reg.bounds.operator_norms.matrix import linear_norm
from fisher_reg.bounds.rules.slopes import GELU_SLOPE
from fisher_reg.bounds.tighten import averaging

TEXTBOOK = Tightening(merged=False)


@pytest.fixture(autouse=True)
def _shared_norms(monkeypatch):
    """Let both sides compute the norm of the same kernel once."""
    known = {}

    def once(weight, geometry, *, dense=True):
        key = (tuple(weight.shape), weight.flatten()[:9].tolist().__repr__(), float(weight.sum()), geometry)
        if key not in known:
            known[key] = conv_norm(weight, geometry, dense=dense)
        return known[key]

    monkeypatch.setattr(measures, "conv_norm", once)
    _conv.norm = once


def _conv(conv, size, norm=None):
    weight = conv.weight.detach().double()
    if norm is not None:
        weight = weight * _scale(norm)[:, None, None, None]
    return _conv.norm(weight, Geometry.of(conv, (size, size))).item()


def _scale(norm):
    return (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).detach().abs()


def _linear(linear):
    return linear_norm(linear.weight.detach()).item()


def _head(linear):
    weight = linear.weight.detach().double()
    return linear_norm(weight - weight.mean(0)).item()


def _randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.2, 2)
                module.weight.uniform_(0.5, 1.5)
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_()
                module.bias.normal_()
    return model.eval()


def vgg(model, size):
    """Product of the layers; the pooling factors."""
    logs, pending = [], None
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            pending = module
        if isinstance(module, nn.BatchNorm2d):
            logs.append(math.log(_conv(pending, size, module)))
        if isinstance(module, nn.MaxPool2d):
            size //= 2
    logs.append(-math.log(size / model.avgpool.output_size[0]))
    linears = [module for module in model.classifier.modules() if isinstance(module, nn.Linear)]
    return sum(logs) + sum(math.log(_linear(module)) for module in linears[:-1]) + math.log(_head(linears[-1]))


def resnet(model, size):
    """Product over blocks of shortcut plus branch; 2 for a max pooling of 3 x 3 windows in steps of 2."""
    log = math.log(_conv(model.conv1, size, model.bn1)) + math.log(2)
    size //= 4
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            shortcut = 1.0 if block.downsample is None else _conv(block.downsample[0], size, block.downsample[1])
            branch = 1.0
            for number in (1, 2, 3):
                if hasattr(block, f"conv{number}"):
                    conv = getattr(block, f"conv{number}")
                    branch *= _conv(conv, size, getattr(block, f"bn{number}"))
                    size //= conv.stride[0]
            log += math.log(shortcut + branch)
    return log - math.log(size) + math.log(_head(model.fc))


def densenet(model, size):
    """Product of roots of one plus the square of each layer; the transitions between."""
    features = model.features
    log, size = math.log(_conv(features.conv0, size, features.norm0)) + math.log(2), size // 4
    for name, part in features.named_children():
        if name.startswith("denseblock"):
            for layer in part.values():
                first = _scale(layer.norm1).max().item() * _conv(layer.conv1, size, layer.norm2)
                log += 0.5 * math.log(1 + (first * _conv(layer.conv2, size)) ** 2)
        if name.startswith("transition"):
            log += math.log(_scale(part.norm).max().item() * _conv(part.conv, size) / 2)
            size //= 2
    return log + math.log(_scale(features.norm5).max().item() / size * _head(model.classifier))


def vit(model, size):
    """Product over blocks of one plus attention and one plus perceptron, each behind its layer norm."""

    def layer_norm(norm):
        return norm.weight.abs().max().item() / math.sqrt(norm.eps)

    log = math.log(_conv(model.conv_proj, size))
    for block in model.encoder.layers:
        tokens = layer_norm_tokens(block.ln_1.weight.double(), block.ln_1.bias.double())
        weights = AttentionWeights.of(block.self_attention)
        attention = self_attention_lipschitz(weights, model.seq_length, tokens).item()
        log += math.log(1 + layer_norm(block.ln_1) * attention)
        perceptron = _linear(block.mlp[0]) * GELU_SLOPE * _linear(block.mlp[3])
        log += math.log(1 + layer_norm(block.ln_2) * perceptron)
    return log + math.log(layer_norm(model.encoder.ln) * _head(model.heads.head))


def _small_vgg():
    model = VGG(make_layers([4, "M", 6, "M"], batch_norm=True), num_classes=5)
    model.avgpool, model.classifier = (
        nn.AdaptiveAvgPool2d(1),
        nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5)),
    )
    model.avgpool.output_size = (1, 1)
    return model


SMALL = {
    "vgg": (vgg, _small_vgg, 8),
    "resnet of basic blocks": (resnet, lambda: ResNet(BasicBlock, [1, 2, 1, 1], num_classes=5), 32),
    "resnet of bottlenecks": (resnet, lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5), 32),
    "densenet": (densenet, lambda: DenseNet(4, (2, 3), 6, num_classes=5), 32),
    "vit": (vit, lambda: VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=5), 8),
}

# torchvision's own widths and depths; the smaller image only shortens the time
FULL = {
    "vgg16_bn": (vgg, lambda: models.vgg16_bn(weights=None, num_classes=10), 32),
    "resnet50": (resnet, lambda: models.resnet50(weights=None), 32),
    "densenet121": (densenet, lambda: models.densenet121(weights=None), 32),
    "vit_b_16": (vit, lambda: models.vit_b_16(weights=None), 224),
}


def _check(closed_form, build, size):
    model = _randomised(build())
    if closed_form is vit:
        nn.init.normal_(model.heads.head.weight)
        nn.init.normal_(model.conv_proj.weight)
    inputs = torch.zeros(1, 3, size, size)
    expected = closed_form(model, size) / math.log(10)
    assert_close(lipschitz_bound(model, inputs, tightening=TEXTBOOK).log10_value, expected, rtol=1e-6, atol=1e-6)
    return model, inputs, expected


@pytest.mark.parametrize("name", SMALL)
def test_the_graph_gives_the_closed_form_of_the_family(name, monkeypatch):
    monkeypatch.setattr(averaging, "_MAX_SIDE", 256)  # for time
    model, inputs, expected = _check(*SMALL[name])
    for tightening in (Tightening(), Tightening(averaged=True, balancing_steps=5), Tightening(balancing_steps=30)):
        assert lipschitz_bound(model, inputs, tightening=tightening).log10_value <= expected + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_the_graph_gives_the_closed_form_of_torchvisions_own_networks(name):
    _check(*FULL[name])
