"""No bound ever lies below: many networks, random and trained weights, random and optimised inputs."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torchvision import models as vision
from torchvision.models import ConvNeXt, DenseNet, MobileNetV2, ResNet, ShuffleNetV2, SqueezeNet, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

from fisher_reg import (
    Exact,
    LogitsOf,
    NoBoundError,
    SpectralPenalty,
    Tightening,
    fisher_bound,
    fisher_spectral_norm,
    local_fisher_bound,
)
from fisher_reg.bounds.operator_norms import conv
from fisher_reg.bounds.rules import activations, pooling
from fisher_reg.bounds.tighten import averaging
from recipes.models import zoo as models

CLASSES = 4


def _spec(channels, size):
    return models.ImageSpec(CLASSES, channels, size, (0.4,) * channels, (0.3,) * channels)


def _timm(name, **options):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _mixer(kind):
    mixer = pytest.importorskip("timm.models.mlp_mixer")
    options = {"mixer": {}, "resmlp": {"block_layer": mixer.ResBlock, "norm_layer": mixer.Affine, "mlp_ratio": 4}}[kind]
    return mixer.MlpMixer(num_classes=CLASSES, img_size=32, patch_size=16, num_blocks=1, embed_dim=8, **options)


def _poolformer():
    metaformer = pytest.importorskip("timm.models.metaformer")
    options = {"downsample_norm": None, "norm_layers": metaformer.GroupNorm1, "mlp_act": nn.GELU, "use_mlp_head": False}
    return metaformer.MetaFormer(num_classes=CLASSES, depths=(1, 1), dims=(4, 6), **options)


def _hugging_face(kind, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **options)
    network = getattr(transformers, f"{kind}ForImageClassification")(config)
    return LogitsOf(network, lambda module, inputs: module(inputs).logits)


def _lines(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES))


class _Interpolating(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, x):
        h = F.interpolate(self.conv(x), scale_factor=2, mode="bilinear") * 0.5 + 1
        return self.fc(F.silu(h).mean((2, 3)))


class _Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, x):
        h = self.conv(x)
        return self.fc((h * h.mean((2, 3), keepdim=True).sigmoid()).amax((2, 3)))


VIT = {"patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
RESNET = {"num_classes": CLASSES}
VGG_LAYERS = {"one": [6], "two": [6, "M", 8, "M"], "four": [4, 6, "M", 8, 8, "M"], "no pooling": [4, 4, 4]}

CONFIGURATIONS = {
    **{
        f"vgg, {name}, {channels} x {size}": (partial(models.vgg, _spec(channels, size), layers), (channels, size))
        for name, layers in VGG_LAYERS.items()
        for channels, size in ((1, 8), (3, 16))
    },
    "vgg without batch norm": (partial(models.vgg, _spec(3, 12), [6, "M", 8], batch_norm=False), (3, 12)),
    **{
        f"resnet, {layers}, stride {stride}, {channels} x {size}": (
            partial(models.resnet, _spec(channels, size), layers, stem_stride=stride),
            (channels, size),
        )
        for layers in ([1, 0, 0, 0], [1, 1, 0, 0], [2, 1, 0, 0])
        for stride, channels, size in ((1, 1, 6), (2, 3, 12))
    },
    **{
        f"densenet, {growth}, {blocks}, {channels} x {size}": (
            partial(models.densenet, _spec(channels, size), growth, blocks, 6, stem_stride=2),
            (channels, size),
        )
        for growth, blocks in ((3, (2,)), (4, (2, 2)), (4, (1, 3)))
        for channels, size in ((1, 8), (3, 16))
    },
    **{
        f"vit, {depth} x {heads} heads, {channels} x {size}": (
            partial(models.vit, _spec(channels, size), **(VIT | {"num_layers": depth, "num_heads": heads})),
            (channels, size),
        )
        for depth, heads in ((1, 1), (1, 4), (2, 2))
        for channels, size in ((1, 8), (3, 12))
    },
    "torchvision resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], **RESNET), (3, 32)),
    "torchvision bottleneck": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], **RESNET), (3, 32)),
    "torchvision resnext": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=4, **RESNET), (3, 32)),
    "torchvision wide": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=96, **RESNET), (3, 32)),
    "torchvision densenet": (lambda: DenseNet(4, (2, 2), 6, num_classes=CLASSES), (3, 32)),
    "torchvision vit": (lambda: VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=CLASSES), (3, 8)),
    "torchvision convnext": (
        lambda: ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=CLASSES),
        (3, 16),
    ),
    "torchvision mobilenet v2": (lambda: MobileNetV2(CLASSES, width_mult=0.1), (3, 32)),
    "torchvision squeezenet": (lambda: SqueezeNet("1_1", CLASSES), (3, 32)),
    "torchvision shufflenet": (lambda: ShuffleNetV2([1, 1, 1], [4, 4, 8, 16, 8], CLASSES), (3, 32)),
    "torchvision mnasnet": (lambda: vision.MNASNet(0.1, CLASSES), (3, 32)),
    "timm resnet": (partial(_timm, "resnet10t"), (3, 32)),
    "timm beit": (partial(_timm, "beit_base_patch16_224", img_size=32, depth=1, embed_dim=8, num_heads=2), (3, 32)),
    "timm poolformer": (lambda: _poolformer(), (3, 32)),
    "timm vit": (partial(_timm, "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=3), (3, 32)),
    "timm deit": (partial(_timm, "deit_tiny_patch16_224", img_size=32, depth=2, embed_dim=12, num_heads=3), (3, 32)),
    "timm vit, mean of tokens": (
        partial(
            _timm,
            "vit_tiny_patch16_224",
            img_size=32,
            depth=1,
            embed_dim=12,
            num_heads=3,
            global_pool="avg",
            class_token=False,
        ),
        (3, 32),
    ),
    "timm convnext": (partial(_timm, "convnext_atto", depths=(1, 1, 1, 1), dims=(4, 6, 8, 10)), (3, 32)),
    "timm mixer": (lambda: _mixer("mixer"), (3, 32)),
    "timm resmlp": (lambda: _mixer("resmlp"), (3, 32)),
    "timm convnext v1 without scale": (
        partial(_timm, "convnext_atto", depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), ls_init_value=None),
        (3, 32),
    ),
    "timm densenet": (partial(_timm, "densenet121", growth_rate=4, block_config=(1, 1, 1, 1)), (3, 32)),
    "hugging face vit": (
        partial(
            _hugging_face,
            "ViT",
            image_size=8,
            patch_size=4,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        ),
        (3, 8),
    ),
    "hugging face resnet": (
        partial(_hugging_face, "ResNet", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
        (3, 16),
    ),
    "hugging face convnext": (
        partial(_hugging_face, "ConvNext", hidden_sizes=[4, 6], depths=[1, 1], num_stages=2),
        (3, 32),
    ),
    "group norm": (lambda: _lines(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()), (3, 6)),
    "instance norm": (lambda: _lines(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.GELU()), (3, 6)),
    "rms norm": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(27, 6), nn.RMSNorm(6, eps=1e-3), nn.Linear(6, CLASSES)),
        (3, 3),
    ),
    "average pooling": (lambda: _lines(nn.Conv2d(3, 4, 3), nn.ELU(), nn.AvgPool2d(3, 2, 1)), (3, 8)),
    "overlapping max pooling": (lambda: _lines(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 1), nn.Mish()), (3, 8)),
    "adaptive pooling": (lambda: _lines(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(3), nn.AdaptiveAvgPool2d(2)), (3, 8)),
    "transposed convolution": (
        lambda: _lines(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, 2)),
        (3, 9),
    ),
    "circular padding": (lambda: _lines(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.SELU()), (3, 6)),
    "reflecting padding": (
        lambda: _lines(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Softplus()),
        (3, 6),
    ),
    "dilated strided groups": (lambda: _lines(nn.Conv2d(4, 8, 3, 2, 2, 2, 2), nn.Hardswish()), (4, 9)),
    "upsampling and shuffling": (
        lambda: _lines(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2)),
        (3, 4),
    ),
    "interpolation in a function": (_Interpolating, (3, 6)),
}


def test_there_are_sixty_configurations():
    assert len(CONFIGURATIONS) >= 60


def _built(build, shape):
    torch.manual_seed(0)
    model, x = build(), torch.rand(6, shape[0], shape[1], shape[1])
    model.eval()(x[:1])
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)  # a head that starts at zero hides everything
    return model, x


def _train(model, x):
    """A few loud steps, which move the statistics and all parameters."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    labels = torch.arange(len(x)) % CLASSES
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    model.eval()


def _optimised(model, x):
    """Ascent of the eigenvalue over the input."""
    for _ in range(3):
        shift = torch.zeros_like(x, requires_grad=True)
        penalty = SpectralPenalty(reduction=torch.sum)(lambda y, shift=shift: model(y + shift), x)
        (slope,) = torch.autograd.grad(penalty, shift)
        x = x + 0.3 * F.normalize(slope.flatten(1)).view_as(x).nan_to_num()
    return x


def _check(model, x):
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue.double()
    local = local_fisher_bound(model, x)
    assert (exact <= local.value * (1 + 1e-4) + 1e-12).all(), "local"
    largest = exact.max().log10().item()
    for tightening in STEPS:
        assert largest <= fisher_bound(model, x, tightening=tightening).log10_value + 1e-4, tightening


STEPS = (
    Tightening(),
    Tightening(folded=False, merged=False, head=False, dense=False),
    Tightening(averaged=True, balancing_steps=3),
)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_bound_lies_above(name, monkeypatch):
    monkeypatch.setattr(averaging, "_MAX_SIDE", 600)  # for time
    model, x = _built(*CONFIGURATIONS[name])
    _check(model, x)
    _train(model, x)
    _check(model, torch.cat([x, _optimised(model, x)]))


REFUSED = {
    "squeeze and excitation": (lambda: vision.mobilenet_v3_small(weights=None, num_classes=CLASSES), (3, 32)),
    "efficientnet": (lambda: vision.efficientnet_b0(weights=None, num_classes=CLASSES), (3, 32)),
    "regnet y": (lambda: vision.regnet_y_400mf(weights=None, num_classes=CLASSES), (3, 32)),
    "ghostnet": (lambda: _timm("ghostnet_050"), (3, 32)),
    "gated perceptron": (lambda: _timm("gmlp_s16_224", img_size=32), (3, 32)),
    "class attention": (lambda: _timm("cait_xxs24_224", img_size=32, depth=1, embed_dim=8, num_heads=2), (3, 32)),
    "a gate": (_Gated, (3, 6)),
}
PARTS = {"class attention": r"matmul\) multiplies two values that depend"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_without_a_global_constant_is_refused_with_the_part(name):
    model, x = _built(*REFUSED[name])
    with pytest.raises(NoBoundError, match=PARTS.get(name, r"'mul\w*' \(mul\) combines two values that depend")):
        fisher_bound(model, x)


@pytest.mark.parametrize(
    "name", ["squeeze and excitation", "efficientnet", "regnet y", "ghostnet", "gated perceptron", "a gate"]
)
def test_a_gate_has_a_bound_at_the_inputs(name):
    model, x = _built(*REFUSED[name])
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue.double()
    assert (exact <= local_fisher_bound(model, x).value * (1 + 1e-4)).all()


def _peak_pooling():
    """The largest pixel is seen by four windows, whose sum is a logit."""
    model = nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 4))
        model[2].bias.zero_()
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2] = 1e-3
    return model, x


def _steep_gelu():
    model = nn.Sequential(nn.GELU(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.copy_(torch.tensor([-1.0, 1.0]) * F.gelu(torch.tensor(math.sqrt(2))))
    return model, torch.full((1, 1), math.sqrt(2), dtype=torch.float64)


def _strided():
    """Each pixel is seen once, by one of the four taps, which are four channels of the pixels' phases."""
    model = nn.Sequential(nn.Conv2d(1, 1, 2, 2, bias=False), nn.Flatten(), nn.LazyLinear(2)).double()
    model(torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 16))
        model[2].bias.zero_()
    return model, torch.zeros(1, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("build", [_peak_pooling, _steep_gelu, _strided])
def test_each_factor_is_needed(build):
    model, x = build()
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue.item()
    bound = fisher_bound(model, x).value
    assert exact <= bound * (1 + 1e-9)
    assert bound < 1.2 * exact  # so that a factor of 1.13 squared or more that is lost shows


def _without_overlap(patch):
    patch.setattr(pooling.math, "sqrt", lambda value: 1.0)


def _without_the_slope(patch):
    patch.setitem(activations.SLOPES, nn.GELU, lambda module: 1.0)


def _with_one_phase(patch):
    patch.setattr(conv, "_polyphase", lambda kernel, stride, dilation: kernel[..., :: stride[0], :: stride[1]])


@pytest.mark.parametrize(
    ("build", "remove"),
    [(_peak_pooling, _without_overlap), (_steep_gelu, _without_the_slope), (_strided, _with_one_phase)],
)
def test_the_bound_falls_below_without_its_factor(build, remove, monkeypatch):
    model, x = build()
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue.item()
    remove(monkeypatch)
    assert fisher_bound(model, x).value < exact
