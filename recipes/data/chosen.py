"""The data of a configuration, and the test images that are measured."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Return ``count`` random test images, the same for every network, and their labels.

    A share ``noise`` of uniform noise in each pixel avoids the kinks of max pooling on flat backgrounds.
    """
    return examples_at(data, chosen_indices(data, count, generator), generator, noise)


def chosen_indices(data: ImageData, count: int, generator: torch.Generator) -> list[int]:
    """Return where in the test split the images of :func:`chosen_examples` are."""
    return list(torch.randperm(len(data.splits["test"]), generator=generator)[:count].tolist())


def examples_at(
    data: ImageData, indices: Sequence[int], generator: torch.Generator, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the test images ``(B, C, H, W)`` at the indices, with noise as in :func:`chosen_examples`, and labels."""
    split = data.splits["test"]
    images, labels = zip(*(split[index] for index in indices), strict=True)
    pixels = torch.stack(images)
    if noise:
        pixels = (1 - noise) * pixels + noise * torch.rand(pixels.shape, generator=generator)
    return pixels, torch.tensor([int(label) for label in labels])


def fixed_images(data: ImageData, count: int, noise: float) -> Tensor:
    """Return the same test images as :func:`chosen_examples` for every network, with the same noise, in float64."""
    return chosen_examples(data, count, torch.Generator().manual_seed(0), noise)[0].double()


def check_noise(noise: float) -> None:
    """Raise an error unless ``noise`` is a share.

    Raises:
        ValueError: If ``noise`` is not from 0 to less than 1.
    """
    if not 0 <= noise < 1:
        raise ValueError(f"noise is a share of each pixel, from 0 to less than 1; got {noise}.")
