from unittest.mock import patch

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from recipes.data.spec import ImageSpec
from recipes.models import zoo as models
from recipes.models.zoo import ACTIVATIONS, Normalize
from tests import cases

CLASSES = {
    "vgg": torchvision.models.VGG,
    "resnet": torchvision.models.ResNet,
    "densenet": torchvision.models.DenseNet,
    "vit": torchvision.models.VisionTransformer,
}


def test_networks_are_torchvisions_own_and_take_pixels(family, digits):
    model = cases.network(family, digits).eval()
    assert type(model.network) is CLASSES[family]
    assert type(model[0]) is Normalize
    images = cases.test_images(digits, 3)
    with torch.no_grad():
        assert model(images).shape == (3, 10)
        assert_close(model(images), model.network((images - digits.spec.mean[0]) / digits.spec.std[0]))


@pytest.mark.parametrize("channels", [1, 3])
def test_networks_take_other_channels_sizes_and_classes(family, channels):
    class Data:
        spec = ImageSpec(7, channels, 32, (0.5,) * channels, (0.2,) * channels)

    model = cases.network(family, Data())
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 7)


def test_trained_networks_are_good_enough_to_be_tested_on(trained, digits):
    images, labels = digits.splits["test"].tensors
    with torch.no_grad():
        assert (trained(images).argmax(1) == labels).double().mean() > 0.85


SPEC = ImageSpec(7, 1, 16, (0.5,), (0.2,))
BUILDERS = {
    "vgg": lambda **kwargs: models.vgg(SPEC, [4, "M", 6], **kwargs),
    "resnet": lambda **kwargs: models.resnet(SPEC, [1, 1, 0, 0], 2, **kwargs),
    "densenet": lambda **kwargs: models.densenet(SPEC, 4, (2, 2), 6, 2, **kwargs),
    "vit": lambda **kwargs: models.vit(SPEC, 4, 1, 2, 8, 16, **kwargs),
}


def _built(family, activation=None, **kwargs):
    torch.manual_seed(0)
    options = {} if activation is None else {"activation": activation}
    model = BUILDERS[family](**options, **kwargs).eval()
    if family == "vit":  # whose last weight is zero at first
        nn.init.normal_(model.network.heads.head.weight)
    return model


def _refuse(*args, **kwargs):
    raise AssertionError("a ReLU is called")


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_no_relu_is_left_of_the_published_network(family, activation):
    model, images = _built(family, activation), torch.rand(2, 1, 16, 16)
    kinds = {type(module) for module in model.modules()} & set(ACTIVATIONS.values())
    assert kinds == {ACTIVATIONS[activation]}
    with torch.no_grad(), patch("torch.nn.functional.relu", _refuse):
        logits = model(images)
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, _built(family, "relu")(images))


def test_the_weights_do_not_depend_on_the_activation(family):
    published, relu, smooth = (_built(family, name).state_dict() for name in (None, "relu", "silu"))
    for name, weight in published.items():
        assert_close(relu[name], weight, rtol=0, atol=0)
        assert_close(smooth[name], weight, rtol=0, atol=0)


def test_the_published_activation_is_relu_but_for_transformers(family):
    images = torch.rand(2, 1, 16, 16)
    published = "gelu" if family == "vit" else "relu"
    with torch.no_grad():
        assert_close(_built(family, published)(images), _built(family)(images), rtol=0, atol=0)
    assert type(_built(family, published).network) is CLASSES[family]


def test_the_last_activation_of_a_densenet_is_where_torchvision_has_it():
    torch.manual_seed(0)
    network = models.OtherDenseNet(4, (2, 2), 6, num_classes=7).eval()
    plain = torchvision.models.DenseNet(4, (2, 2), 6, num_classes=7).eval()
    plain.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(network(images), plain(images))


def test_an_unknown_activation_is_refused_with_the_known_ones(family):
    with pytest.raises(ValueError, match="one of relu, silu, gelu, or None as published; got 'tanh'"):
        _built(family, "tanh")


def test_other_modules_are_not_touched():
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.ReLU())
    models.with_activation(network, "silu")
    assert [type(module) for module in network] == [nn.Linear, nn.Tanh, nn.SiLU]
