"""A trained network for the recipes that measure one: a checkpoint of ``recipes.train``, or trained on the spot."""

from __future__ import annotations

import warnings

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from recipes.data.base import ImageData
from recipes.models.classifier import Classifier


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


@torch.no_grad()
def share_correct(network: nn.Module, data: ImageData, device: torch.device) -> float:
    """Return the share of the test images that are classified correctly."""
    hits = [network(images.to(device)).argmax(1).cpu() == labels for images, labels in data.test_dataloader()]
    return float(torch.cat(hits).double().mean())
