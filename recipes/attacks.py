"""Attacks of kept libraries on a classifier of pixels in [0, 1].

Projected gradients are those of foolbox, AutoAttack that of the adversarial-robustness-toolbox.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import foolbox
import torch
from art.attacks.evasion import AutoAttack, AutoProjectedGradientDescent, SquareAttack
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

_CHUNK = 100
_STEP = 2.5  # of all steps together, in radii, as in Madry et al. (arXiv 1706.06083)


def projected_gradient(
    network: nn.Module, images: Tensor, labels: Tensor, norm: float, epsilon: float, num_steps: int
) -> Tensor:
    """Return the images ``(B, C, H, W)`` after projected gradient ascent from a random start, by foolbox.

    Args:
        network: From pixels to logits; attacked in evaluation mode and left in its own.
        images: In [0, 1].
        labels: ``(B,)``.
        norm: 2 or infinity.
        epsilon: Radius, in pixel units.
        num_steps: Ascent steps.

    Returns:
        Images in [0, 1] no further than ``epsilon`` from the given ones.
    """
    attack_type = {2: foolbox.attacks.L2PGD, math.inf: foolbox.attacks.LinfPGD}[norm]
    attack = attack_type(rel_stepsize=_STEP / num_steps, steps=num_steps)
    modes = [module.training for module in network.modules()]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:  # foolbox calls backward(), which would add to their gradients, at a cost
            parameter.requires_grad_(False)
        model = foolbox.PyTorchModel(network.eval(), bounds=(0, 1), device=images.device)
        with torch.inference_mode(False), torch.enable_grad():
            return attack.run(model, images.detach().clone(), labels.clone(), epsilon=epsilon)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in zip(network.modules(), modes, strict=True):
            module.training = mode


def pgd_accuracy(
    network: nn.Module, images: Tensor, labels: Tensor, norm: float, epsilon: float, num_steps: int
) -> float:
    """Return the share of the images that are still classified correctly after :func:`projected_gradient`."""
    hits = 0
    for part, known in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
        attacked = projected_gradient(network, part, known, norm, epsilon, num_steps)
        with torch.no_grad():
            hits += int((network(attacked).argmax(1) == known).sum())
    return hits / len(images)


def auto_attack_accuracy(
    network: nn.Module, images: Tensor, labels: Tensor, norm: float, epsilon: float, num_queries: int = 500
) -> float:
    """Return the share of the images that a short AutoAttack (arXiv 2003.01690) leaves classified correctly.

    Three of its attacks, each once on what the ones before left: 50 steps of the parameter-free ascent of the
    cross-entropy, as many of the difference-of-logits ratio, and ``num_queries`` of Square, which needs no gradient and
    so sees through masked ones.
    """
    logging.getLogger("art").setLevel(logging.ERROR)
    classifier = PyTorchClassifier(
        network.eval(),
        nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=network(images[:1]).shape[1],
        clip_values=(0.0, 1.0),
        device_type="gpu" if images.is_cuda else "cpu",
    )
    common: dict[str, Any] = {"norm": norm, "eps": epsilon, "batch_size": len(images), "verbose": False}
    ascent = common | {"eps_step": epsilon / 4, "max_iter": 50, "nb_random_init": 1}
    attacks = [
        AutoProjectedGradientDescent(classifier, loss_type="cross_entropy", **ascent),
        AutoProjectedGradientDescent(classifier, loss_type="difference_logits_ratio", **ascent),
        SquareAttack(classifier, max_iter=num_queries, nb_restarts=1, **common),
    ]
    attack = AutoAttack(classifier, norm=norm, eps=epsilon, attacks=attacks, batch_size=len(images))
    attacked = attack.generate(images.cpu().numpy(), labels.cpu().numpy())
    with torch.no_grad():
        predicted = network(torch.from_numpy(attacked).to(images)).argmax(1)
    return float((predicted == labels).double().mean())
