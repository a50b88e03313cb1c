"""Networks, their training, and their checkpoints."""

from recipes.models.zoo import Normalize, densenet, resnet, torchvision_model, vgg, vit

__all__ = ["Normalize", "densenet", "resnet", "torchvision_model", "vgg", "vit"]
