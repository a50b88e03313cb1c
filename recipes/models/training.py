"""A trained network for other recipes: a checkpoint of ``recipes.train``, or trained in the same run."""

from __future__ import annotations

import warnings

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from recipes.data.base import ImageData
from recipes.models.checkpoints import load_weights
from recipes.models.classifier import Classifier


def trained_network(config: DictConfig, data: ImageData) -> nn.Module:
    """Build ``config.model`` for ``data`` and train it with ``config.trainer``, or load ``config.checkpoint``.

    Returns:
        The network, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is of another network; see :func:`recipes.models.checkpoints.load_weights`.
    """
    network: nn.Module = instantiate(config.model, spec=data.spec)
    if config.checkpoint is not None:
        load_weights(network, config.checkpoint)
        return network.eval()
    module = Classifier(network, data.spec.num_classes, instantiate(config.optimizer))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        instantiate(config.trainer).fit(module, train_dataloaders=data.train_dataloader())
    return network.eval()


@torch.no_grad()
def share_correct(network: nn.Module, data: ImageData, device: torch.device) -> float:
    """Return the share of the test images that are classified correctly."""
    hits = [network(images.to(device)).argmax(1).cpu() == labels for images, labels in data.test_dataloader()]
    return float(torch.cat(hits).double().mean())
