"""Objectives of a sweep over trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from recipes.attacks import Attack, attack_all
from recipes.data.base import ImageData
from recipes.data.chosen import chosen_examples


class Objective(Protocol):
    """From a trained network to a number to minimise."""

    def __call__(self, summary: Mapping[str, Any], network: nn.Module, data: ImageData) -> float:
        """Return the number; ``summary`` is that of the training."""


@dataclass(frozen=True)
class LambdaAtAccuracy:
    """The decimal logarithm of the mean of λ over the test images, with a penalty for low accuracy.

    An accuracy of one percentage point below the floor has the same weight as a factor of ten of λ. The objective costs
    no pass, since the training measures both.

    Args:
        floor: Accuracy on the test images above which only λ counts.
    """

    floor: float = 0.9

    def __call__(self, summary: Mapping[str, Any], network: nn.Module, data: ImageData) -> float:
        """Return the objective."""
        smallest = torch.finfo(torch.float32).tiny
        missing = max(0.0, self.floor - float(summary["test_accuracy"]))
        return math.log10(max(float(summary["lambda_max_mean"]), smallest)) + 100 * missing


@dataclass(frozen=True)
class RobustAccuracy:
    """Minus the robust accuracy: the share of test images that are classified correctly under an attack.

    Args:
        attack: The attack.
        num_images: Number of random test images; all if there are fewer.
    """

    attack: Attack
    num_images: int = 200

    def __call__(self, summary: Mapping[str, Any], network: nn.Module, data: ImageData) -> float:
        """Return the objective."""
        device = next(network.parameters()).device
        images, labels = chosen_examples(data, self.num_images, torch.Generator().manual_seed(0))
        found = attack_all(self.attack, network.eval(), images.to(device), labels.to(device))
        return float(found.misclassified.double().mean()) - 1
