"""The result of an attack, per image."""

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
    """The result of an attack on a batch, per example.

    Attributes:
        images: Attacked images ``(B, C, H, W)``.
        misclassified: Whether the network misclassifies them, ``(B,)``.
        euclidean: Euclidean distance to the given images in pixel units, ``(B,)``.
        masked: Images ``(B,)`` that are still classified correctly and where the gradient of the cross-entropy is
            exactly zero, so that no gradient-based attack can change them. An unchanged image is no proof of this:
            most attacks return the given image where they fail.
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
    """Attack images ``(B, C, H, W)`` in chunks, evaluate the result, and warn where gradients seem to be masked.

    Returns:
        Fields with leading axis ``B``.

    Raises:
        ValueError: If the images are not pixels in [0, 1]: the radius would not be in pixel units.
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
        advice = "" if isinstance(attack, AutoAttack) else "; try AutoAttack, whose Square needs none"
        warnings.warn(
            f"{type(attack).__name__} could not attack {int(result.masked.sum())} of the "
            f"{int((~result.misclassified).sum())} images that are still classified correctly: the gradient is exactly "
            "zero there. Gradient masking (by a saturated softmax, or rounding in the network) is not "
            f"robustness{advice}.",
            stacklevel=2,
        )
    return result
