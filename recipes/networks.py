"""A trained network for the recipes that measure one: a checkpoint of ``recipes.train``, or trained on the spot."""

from __future__ import annotations

import warnings

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from recipes.classifier import Classifier
from recipes.data import ImageData


def trained_network(config: DictConfig, data: ImageData) -> nn.Module:
    """Build ``config.model`` for ``data`` and train it with ``config.trainer``, or load ``config.checkpoint``.

    Returns:
        The network, in evaluation mode.
    """
    network = instantiate(config.model, spec=data.spec)
    module = Classifier(network, data.spec.num_classes, instantiate(config.optimizer))
    if config.checkpoint is not None:
        module.load_state_dict(torch.load(config.checkpoint, map_location="cpu", weights_only=True)["state_dict"])
        return network.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        instantiate(config.trainer).fit(module, train_dataloaders=data.train_dataloader())
    return network.eval()


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

    A share ``noise`` of uniform noise in each pixel keeps flat backgrounds off the kinks of max pooling.
    """
    split = data.splits["test"]
    examples = [split[index] for index in torch.randperm(len(split), generator=generator)[:count].tolist()]
    images, labels = zip(*examples, strict=True)
    pixels = torch.stack(images)
    if noise:
        pixels = (1 - noise) * pixels + noise * torch.rand(pixels.shape, generator=generator)
    return pixels, torch.tensor([int(label) for label in labels])


def check_noise(noise: float) -> None:
    """Refuse what is not a share.

    Raises:
        ValueError: If ``noise`` is not from 0 to less than 1.
    """
    if not 0 <= noise < 1:
        raise ValueError(f"noise is a share of each pixel, from 0 to less than 1; got {noise}.")


def chosen_device(name: str | None) -> torch.device:
    """Return the named device, or the GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
