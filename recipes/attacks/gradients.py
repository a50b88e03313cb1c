"""Gradient-based attacks: projected gradients, Carlini and Wagner's, and the search for minimal perturbations.

They are from foolbox, which keeps images on the device and has DDN, unlike the adversarial-robustness-toolbox.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import foolbox
import torch
from torch import Tensor, nn

from recipes.attacks.base import attackable, check_at_least_one, check_ball

_STEP = 2.5  # total length of all steps, in radii, as in Madry et al. (arXiv 1706.06083)


@dataclass(frozen=True)
class ProjectedGradient:
    """Projected gradient ascent of the cross-entropy from a random start (arXiv 1706.06083), by foolbox.

    Attributes:
        norm: 2 or infinity.
        epsilon: Radius, in pixel units.
        num_steps: Number of ascent steps.
        step_size: Length of a step; by default 2.5 radii divided by the number of steps.

    Raises:
        ValueError: For another norm or a radius that is not positive, as in the other attacks in a ball.
    """

    norm: float
    epsilon: float
    num_steps: int = 20
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_ball(self.norm, self.epsilon)
        check_at_least_one(num_steps=self.num_steps)
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, or None for 2.5 radii over the steps; got {self.step_size}.")

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return images no further than ``epsilon`` from the given ones."""
        attack_type = {2: foolbox.attacks.L2PGD, math.inf: foolbox.attacks.LinfPGD}[self.norm]
        step_size = _STEP * self.epsilon / self.num_steps if self.step_size is None else self.step_size
        attack = attack_type(abs_stepsize=step_size, steps=self.num_steps)
        with _foolbox(network, images) as model:
            return attack.run(model, images.detach().clone(), labels.clone(), epsilon=self.epsilon)


@dataclass(frozen=True)
class CarliniWagner:
    r"""Carlini and Wagner's attack in the Euclidean norm (arXiv 1608.04644), by foolbox.

    Adam on :math:`\|\delta\|^2 + c \max(z_y - \max_{k \ne y} z_k, 0)`. It has no radius: it minimises the distance of a
    successful perturbation.

    Attributes:
        constant: The first :math:`c`.
        num_steps: Steps of Adam for each :math:`c`.
        step_size: Step size of Adam, in the arctanh of the pixels.
        num_searches: Number of values of :math:`c`, found by bisection; 1 uses only the first.
    """

    constant: float = 1.0
    num_steps: int = 20
    step_size: float = 0.01
    num_searches: int = 1

    def __post_init__(self) -> None:
        check_at_least_one(num_steps=self.num_steps, num_searches=self.num_searches)

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the nearest adversarial examples that were found; the given images where none was found."""
        attack = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=self.num_searches,
            steps=self.num_steps,
            stepsize=self.step_size,
            initial_const=self.constant,
            abort_early=False,
        )
        with _foolbox(network, images) as model:
            attacked = attack.run(model, images.detach().clone(), labels.clone())
        missed = attacked.flatten(1).abs().amax(1) == 0  # foolbox returns black images for failures
        return torch.where(missed.view(-1, 1, 1, 1), images, attacked)


@dataclass(frozen=True)
class MinimalPerturbation:
    """Search for the nearest adversarial example in the Euclidean norm (DDN, arXiv 1811.09600), by foolbox.

    Attributes:
        num_steps: Number of forward and backward passes.
    """

    num_steps: int = 100

    def __post_init__(self) -> None:
        check_at_least_one(num_steps=self.num_steps)

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the nearest adversarial examples that were found; the given images where none was found."""
        with _foolbox(network, images) as model:
            return foolbox.attacks.DDNAttack(steps=self.num_steps).run(model, images.detach().clone(), labels.clone())


@contextlib.contextmanager
def _foolbox(network: nn.Module, images: Tensor) -> Generator[Any, None, None]:
    with attackable(network) as model:
        yield foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
