"""The interface of an attack: ``attack(network, images, labels)``, on pixels in [0, 1]."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor, nn

_ROUND_OFF = 1e-6  # tolerance for resized images, which may slightly leave [0, 1]


class Attack(Protocol):
    """Maps a network, images ``(B, C, H, W)`` in [0, 1] and labels ``(B,)`` to attacked images in [0, 1].

    The network is attacked in evaluation mode, and its state is restored.
    """

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the attacked images."""


def check_ball(norm: float, epsilon: float) -> None:
    """Raise an error for an invalid ball.

    Raises:
        ValueError: If the norm is not 2 or infinity, or the radius not positive.
    """
    if norm not in (2, math.inf):
        raise ValueError(f"norm must be 2 or infinity; got {norm}.")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be a positive radius in pixel units, such as 8/255; got {epsilon}.")


def check_at_least_one(**counts: int) -> None:
    """Raise an error for an attack that would do nothing.

    Raises:
        ValueError: If a number of steps or queries is below 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, or the attack does nothing; got {count}.")


def check_pixels(images: Tensor) -> None:
    """Raise an error for images that are not pixels.

    Raises:
        ValueError: If a value is outside [0, 1] or not a number.
    """
    low, high = float(images.min()), float(images.max())
    if not (low >= -_ROUND_OFF and high <= 1 + _ROUND_OFF):
        raise ValueError(
            f"Images must be pixels in [0, 1], since radii are in pixel units; they are in [{low:g}, {high:g}]. "
            "Divide by 255, and put the normalisation inside the network: "
            "torch.nn.Sequential(recipes.models.Normalize(mean, std), network)."
        )


@contextlib.contextmanager
def attackable(network: nn.Module) -> Generator[nn.Module, None, None]:
    """Yield the network in evaluation mode, without gradients of its weights; restore it."""
    modes = [module.training for module in network.modules()]
    weights = [(weight, weight.requires_grad, weight.grad) for weight in network.parameters()]
    try:
        for weight, _, _ in weights:  # the libraries call backward(), which would add to these gradients
            weight.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield network.eval()
    finally:
        for weight, was_trained, gradient in weights:
            weight.requires_grad_(was_trained)
            weight.grad = gradient  # the toolbox sets it to None
        for module, mode in zip(network.modules(), modes, strict=True):
            module.training = mode
