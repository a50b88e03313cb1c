"""The result of an attack for each image."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.attacks.base import Attack, attackable, check_pixels
from recipes.attacks.ensembles import AutoAttack

_CHUNK = 100


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack on a batch.

    Attributes:
        images: Attacked images ``(B, C, H, W)``.
        misclassified: Whether the network misclassifies them, ``(B,)``.
        euclidean: Euclidean distance to the given images in pixel units, ``(B,)``.
        masked: Survivors ``(B,)`` with an exactly zero gradient of the cross-entropy, against which gradient-based
            attacks have no effect. An unchanged image alone does not show masking, since most attacks return the image
            if they fail.
    """

    images: Tensor
    misclassified: Tensor
    euclidean: Tensor
    masked: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images that are still classified correctly."""
        return float((~self.misclassified).double().mean())


def attack_all(attack: Attack, network: nn.Module, images: Tensor, labels: Tensor) -> AttackResult:
    """Attack images ``(B, C, H, W)`` in chunks, evaluate the results, and warn of masked gradients.

    Returns:
        Fields with leading axis ``B``.

    Raises:
        ValueError: If the images are not pixels in [0, 1], since radii are in pixel units.
    """
    check_pixels(images)
    parts = []
    for part, known in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
        attacked = attack(network, part, known)
        with attackable(network), torch.enable_grad():
            leaf = attacked.detach().clone().requires_grad_()
            logits = network(leaf)
            (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits, known, reduction="sum"), leaf)
        misclassified = logits.argmax(1) != known
        moved = (attacked - part).flatten(1)
        parts.append(
            (attacked, misclassified, moved.norm(dim=1), ~misclassified & (slope.flatten(1).abs().amax(1) == 0))
        )
    result = AttackResult(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    if bool(result.masked.any()):
        advice = "" if isinstance(attack, AutoAttack) else "; try AutoAttack, which includes a search without gradients"
        warnings.warn(
            f"{type(attack).__name__} could not attack {int(result.masked.sum())} of the "
            f"{int((~result.misclassified).sum())} images that are still classified correctly: the gradient is exactly "
            f"zero there. Masked gradients (a saturated softmax, rounding in the network) are not robustness{advice}.",
            stacklevel=2,
        )
    return result
