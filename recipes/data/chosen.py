"""The data of a configuration, and the test images that are measured."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from recipes.data.base import ImageData


def prepared_data(config: DictConfig) -> ImageData:
    """Seed everything and read ``config.data``."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data: ImageData = instantiate(config.data)
    data.prepare_data()
    data.setup()
    return data


def chosen_examples(
    data: ImageData, count: int, generator: torch.Generator, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return ``count`` test images from anywhere in the split, the same for every network, and their labels.

    A share ``noise`` of uniform noise in each pixel avoids flat backgrounds, where max pooling is not differentiable.
    """
    split = data.splits["test"]
    examples = [split[index] for index in torch.randperm(len(split), generator=generator)[:count].tolist()]
    images, labels = zip(*examples, strict=True)
    pixels = torch.stack(images)
    if noise:
        pixels = (1 - noise) * pixels + noise * torch.rand(pixels.shape, generator=generator)
    return pixels, torch.tensor([int(label) for label in labels])


def fixed_images(data: ImageData, count: int, noise: float) -> Tensor:
    """Return the same test images as :func:`chosen_examples` for every network, with the same noise, in float64."""
    return chosen_examples(data, count, torch.Generator().manual_seed(0), noise)[0].double()


def check_noise(noise: float) -> None:
    """Check that ``noise`` is a share.

    Raises:
        ValueError: If ``noise`` is not from 0 to less than 1.
    """
    if not 0 <= noise < 1:
        raise ValueError(f"noise is a share of each pixel, from 0 to less than 1; got {noise}.")
