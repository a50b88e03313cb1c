"""torchvision's classes at sizes for small images, with pixels in [0, 1] as inputs.

Normalisation is the first layer of every network, so that inputs, attacks and Fisher eigenvalues are in pixel units.
``activation`` is ``"relu"``, ``"silu"``, ``"gelu"``, or None for that of the publication.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, ResNet, VisionTransformer, get_model
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import VGG, make_layers

from recipes.data.spec import ImageSpec

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class Normalize(nn.Module):
    """``(pixels - mean) / std`` per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise images ``(B, C, H, W)``."""
        return (pixels - self.mean) / self.std


def vgg(
    spec: ImageSpec, layers: Sequence[int | str], batch_norm: bool = True, activation: str | None = None
) -> nn.Module:
    """Build a :class:`torchvision.models.VGG` with the given layers (widths, and ``"M"`` for a pooling)."""
    network = VGG(make_layers(list(layers), batch_norm=batch_norm), num_classes=spec.num_classes)
    stem = network.features[0]
    network.features[0] = nn.Conv2d(spec.num_channels, stem.out_channels, 3, padding=1)
    nn.init.kaiming_normal_(network.features[0].weight, mode="fan_out", nonlinearity="relu")
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Linear(int(next(width for width in reversed(layers) if width != "M")), spec.num_classes)
    return _with_normalization(network, spec, activation)


def resnet(spec: ImageSpec, layers: Sequence[int], stem_stride: int = 1, activation: str | None = None) -> nn.Module:
    """Build a :class:`torchvision.models.ResNet` of basic blocks; the last stages may have 0 blocks."""
    kept = [blocks for blocks in layers if blocks > 0]
    network = ResNet(BasicBlock, [max(1, blocks) for blocks in layers], num_classes=spec.num_classes)
    for stage in range(len(kept), len(layers)):
        setattr(network, f"layer{stage + 1}", nn.Identity())
    network.conv1 = nn.Conv2d(spec.num_channels, 64, 3, stride=stem_stride, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    network.fc = nn.Linear(64 * 2 ** (len(kept) - 1), spec.num_classes)
    return _with_normalization(network, spec, activation)


class OtherDenseNet(DenseNet):  # type: ignore[misc]  # torchvision has no types
    """A DenseNet whose last activation, a function in torchvision's forward, is a module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last_activation = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        result: Tensor = self.classifier(self.last_activation(self.features(images)).mean((2, 3)))
        return result


def densenet(
    spec: ImageSpec,
    growth_rate: int,
    block_config: Sequence[int],
    num_init_features: int,
    stem_stride: int = 1,
    activation: str | None = None,
) -> nn.Module:
    """Build a :class:`torchvision.models.DenseNet` with a 3 x 3 stem and without the first pooling."""
    build = DenseNet if activation in (None, "relu") else OtherDenseNet
    network = build(growth_rate, tuple(block_config), num_init_features, num_classes=spec.num_classes)
    network.features.conv0 = nn.Conv2d(
        spec.num_channels, num_init_features, 3, stride=stem_stride, padding=1, bias=False
    )
    nn.init.kaiming_normal_(network.features.conv0.weight)
    network.features.pool0 = nn.Identity()
    return _with_normalization(network, spec, activation)


def vit(
    spec: ImageSpec,
    patch_size: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    mlp_dim: int,
    activation: str | None = None,
) -> nn.Module:
    """Build a :class:`torchvision.models.VisionTransformer`."""
    network = VisionTransformer(
        image_size=spec.image_size,
        patch_size=patch_size,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        mlp_dim=mlp_dim,
        num_classes=spec.num_classes,
    )
    network.conv_proj = nn.Conv2d(spec.num_channels, hidden_dim, patch_size, patch_size)
    return _with_normalization(network, spec, activation)


def torchvision_model(spec: ImageSpec, name: str) -> nn.Module:
    """Build a network of torchvision by name, as published, with random weights: for RGB images of 32 pixels or more.

    Returns:
        The network behind its normalisation.

    Raises:
        ValueError: If the images are not RGB; the data set's ``num_channels=3`` repeats grey ones.
    """
    if spec.num_channels != 3:
        raise ValueError(
            f"torchvision's {name} takes RGB images; the data has {spec.num_channels} channels. Grey ones are repeated "
            "by the data set's num_channels=3."
        )
    options = {"image_size": spec.image_size} if name.startswith("vit") else {}
    return _with_normalization(get_model(name, weights=None, num_classes=spec.num_classes, **options), spec)


def with_activation(network: nn.Module, name: str) -> None:
    """Replace the activations of a network, modules of the classes in ``ACTIVATIONS``, in place.

    Args:
        network: Its weights are not changed, even if they were initialised for another activation.
        name: A key of ``ACTIVATIONS``.

    Raises:
        ValueError: For another name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, or None as published; got {name!r}.")
    for parent in list(network.modules()):
        for child_name, child in parent.named_children():
            if isinstance(child, tuple(ACTIVATIONS.values())) and not isinstance(child, ACTIVATIONS[name]):
                setattr(parent, child_name, ACTIVATIONS[name]())


def _with_normalization(network: nn.Module, spec: ImageSpec, activation: str | None = None) -> nn.Module:
    if activation is not None:
        with_activation(network, activation)
    return nn.Sequential(OrderedDict(normalize=Normalize(spec.mean, spec.std), network=network))
