"""Networks, how they are trained, and how their weights are read."""

from recipes.models.zoo import Normalize, densenet, resnet, torchvision_model, vgg, vit

__all__ = ["Normalize", "densenet", "resnet", "torchvision_model", "vgg", "vit"]
