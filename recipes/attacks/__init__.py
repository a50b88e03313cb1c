"""Attacks of maintained libraries on a classifier of pixels in [0, 1]: ``attack(network, images, labels)``.

Radii and distances are in pixel units, since normalisation is the network's first layer. There is no state between
calls: adversarial examples are always computed for the attacked network.
"""

from recipes.attacks.base import Attack, check_pixels
from recipes.attacks.ensembles import AutoAttack, AutoProjectedGradient
from recipes.attacks.gradients import CarliniWagner, MinimalPerturbation, ProjectedGradient
from recipes.attacks.result import AttackResult, attack_all

__all__ = [
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoProjectedGradient",
    "CarliniWagner",
    "MinimalPerturbation",
    "ProjectedGradient",
    "attack_all",
    "check_pixels",
]
