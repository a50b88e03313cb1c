import pytest
import torch
import torchvision
from torch.testing import assert_close

from recipes.models import ImageSpec, Normalize
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
