"""Attacks of kept libraries on a classifier of pixels in [0, 1], as values: ``attack(network, images, labels)``.

Radii and distances are in pixel units, since normalisation is the network's first layer. Projected gradients, Carlini
and Wagner's attack and the search for minimal perturbations are those of foolbox; Auto-PGD, Square and their ensemble
those of the adversarial-robustness-toolbox. Nothing is kept between calls: an example is made for the network that it
is tried on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import foolbox
import numpy as np
import torch
from art.attacks.evasion import AutoAttack as ToolboxAutoAttack
from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

_CHUNK = 100
_STEP = 2.5  # of all steps together, in radii, as in Madry et al. (arXiv 1706.06083)
_ROUND_OFF = 1e-6  # by which resized images may leave [0, 1]


class Attack(Protocol):
    """Maps a network, images ``(B, C, H, W)`` in [0, 1] and labels ``(B,)`` to attacked images in [0, 1].

    The network is attacked in evaluation mode and left as it was found.
    """

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the attacked images."""


@dataclass(frozen=True)
class ProjectedGradient:
    """Projected gradient ascent of the cross-entropy from a random start (arXiv 1706.06083), by foolbox.

    Attributes:
        norm: 2 or infinity.
        epsilon: Radius, in pixel units.
        num_steps: Ascent steps.
        step_size: Length of a step; by default 2.5 radii over the number of steps.

    Raises:
        ValueError: If the norm is another, or the radius not positive; so too in the other attacks in a ball.
    """

    norm: float
    epsilon: float
    num_steps: int = 20
    step_size: float | None = None

    def __post_init__(self) -> None:
        _check_ball(self.norm, self.epsilon)
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, or None for 2.5 radii over the steps; got {self.step_size}.")

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return images no further than ``epsilon`` from the given ones."""
        attack_type = {2: foolbox.attacks.L2PGD, math.inf: foolbox.attacks.LinfPGD}[self.norm]
        step_size = _STEP * self.epsilon / self.num_steps if self.step_size is None else self.step_size
        attack = attack_type(abs_stepsize=step_size, steps=self.num_steps)
        with _attackable(network, images) as model:
            return attack.run(model, images.detach().clone(), labels.clone(), epsilon=self.epsilon)


@dataclass(frozen=True)
class CarliniWagner:
    r"""Carlini and Wagner's attack in the Euclidean norm (arXiv 1608.04644), by foolbox.

    Adam on :math:`\|\delta\|^2 + c \max(z_y - \max_{k \ne y} z_k, 0)`. It has no radius: what it fools at all it moves
    as little as it can.

    Attributes:
        constant: The first :math:`c`.
        num_steps: Steps of Adam for each :math:`c`.
        step_size: Of Adam, in the arctanh of the pixels.
        num_searches: How many :math:`c` are tried, by bisection; 1 keeps the first.
    """

    constant: float = 1.0
    num_steps: int = 20
    step_size: float = 0.01
    num_searches: int = 1

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the nearest fooling images that were met, and the given ones where there were none."""
        attack = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=self.num_searches,
            steps=self.num_steps,
            stepsize=self.step_size,
            initial_const=self.constant,
            abort_early=False,
        )
        with _attackable(network, images) as model:
            attacked = attack.run(model, images.detach().clone(), labels.clone())
        missed = attacked.flatten(1).abs().amax(1) == 0  # foolbox gives black images where it finds nothing
        return torch.where(missed.view(-1, 1, 1, 1), images, attacked)


@dataclass(frozen=True)
class MinimalPerturbation:
    """Search for the nearest fooling image, Euclidean (DDN, arXiv 1811.09600), by foolbox; nothing to tune.

    Attributes:
        num_steps: Forward and backward passes.
    """

    num_steps: int = 100

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the nearest fooling images that were met, and the given ones where there were none."""
        with _attackable(network, images) as model:
            return foolbox.attacks.DDNAttack(steps=self.num_steps).run(model, images.detach().clone(), labels.clone())


@dataclass(frozen=True)
class AutoProjectedGradient:
    """Auto-PGD (arXiv 2003.01690), whose steps adapt: nothing to tune; by the adversarial-robustness-toolbox.

    First the cross-entropy, then, on what that left and for three classes or more, the ratio of differences of logits,
    which no scale of the logits masks.

    Attributes:
        norm: 2 or infinity.
        epsilon: Radius, in pixel units.
        num_steps: Ascent steps of each loss.
    """

    norm: float
    epsilon: float
    num_steps: int = 50

    def __post_init__(self) -> None:
        _check_ball(self.norm, self.epsilon)

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return images no further than ``epsilon`` from the given ones."""
        with _toolbox(network, images) as classifier:
            attacked, known = images.cpu().numpy(), labels.cpu().numpy()
            for ascent in _ascents(classifier, self.norm, self.epsilon, self.num_steps):
                attacked = _on_survivors(classifier, ascent, attacked, images.cpu().numpy(), known)
        return torch.from_numpy(attacked).to(images)


@dataclass(frozen=True)
class AutoAttack:
    """A short AutoAttack (arXiv 2003.01690): the losses of :class:`AutoProjectedGradient`, then Square.

    Square needs no gradient and so sees through masked ones.

    Attributes:
        norm: 2 or infinity.
        epsilon: Radius, in pixel units.
        num_steps: Ascent steps of each loss.
        num_queries: Of Square.
    """

    norm: float
    epsilon: float
    num_steps: int = 50
    num_queries: int = 500

    def __post_init__(self) -> None:
        _check_ball(self.norm, self.epsilon)

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return images no further than ``epsilon`` from the given ones."""
        with _toolbox(network, images) as classifier:
            ball: dict[str, Any] = {"norm": self.norm, "eps": self.epsilon}
            square = SquareAttack(
                classifier, max_iter=self.num_queries, nb_restarts=1, batch_size=len(images), verbose=False, **ball
            )
            attacks = [*_ascents(classifier, self.norm, self.epsilon, self.num_steps), square]
            attack = ToolboxAutoAttack(classifier, attacks=attacks, batch_size=len(images), **ball)
            attacked = attack.generate(images.cpu().numpy(), labels.cpu().numpy())
        return torch.from_numpy(attacked).to(images)


@dataclass(frozen=True)
class AttackResult:
    """What an attack did to a batch, by its examples.

    Attributes:
        images: Attacked images ``(B, C, H, W)``.
        fooled: Whether the network misclassifies them, ``(B,)``.
        euclidean: Euclidean distance to the given images in pixel units, ``(B,)``.
        masked: Survivors ``(B,)`` where the gradient of the cross-entropy is exactly zero, so that no attack that
            follows it could do anything. Most attacks give back what they cannot fool: that alone is no sign.
    """

    images: Tensor
    fooled: Tensor
    euclidean: Tensor
    masked: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images that are still classified correctly."""
        return float((~self.fooled).double().mean())


def attack_all(attack: Attack, network: nn.Module, images: Tensor, labels: Tensor) -> AttackResult:
    """Attack images ``(B, C, H, W)`` in chunks, see what became of them, and warn where gradients seem masked.

    Returns:
        Fields with leading axis ``B``.

    Raises:
        ValueError: If the images are not pixels in [0, 1]: a radius would not mean what it says.
    """
    check_pixels(images)
    parts = []
    for part, known in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
        attacked = attack(network, part, known)
        with _attackable(network, part), torch.enable_grad():
            leaf = attacked.detach().clone().requires_grad_()
            logits = network(leaf)
            (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits, known, reduction="sum"), leaf)
        fooled = logits.argmax(1) != known
        moved = (attacked - part).flatten(1)
        parts.append((attacked, fooled, moved.norm(dim=1), ~fooled & (slope.flatten(1).abs().amax(1) == 0)))
    result = AttackResult(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    if bool(result.masked.any()):
        warnings.warn(
            f"{type(attack).__name__} could do nothing to {int(result.masked.sum())} of the "
            f"{int((~result.fooled).sum())} images that survived it: the gradient is exactly zero there. Masked "
            "gradients (a saturated softmax, rounding in the network) are not robustness; try AutoAttack, whose Square "
            "needs none.",
            stacklevel=2,
        )
    return result


def _check_ball(norm: float, epsilon: float) -> None:
    if norm not in (2, math.inf):
        raise ValueError(f"norm must be 2 or infinity; got {norm}.")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be a positive radius in pixel units, such as 8/255; got {epsilon}.")


def check_pixels(images: Tensor) -> None:
    """Refuse images that are not pixels.

    Raises:
        ValueError: If a value is outside [0, 1] or not a number.
    """
    low, high = float(images.min()), float(images.max())
    if not (low >= -_ROUND_OFF and high <= 1 + _ROUND_OFF):
        raise ValueError(
            f"Images must be pixels in [0, 1], so that a radius means what it says; they are in [{low:g}, {high:g}]. "
            "Divide by 255, and put the normalisation inside the network: "
            "torch.nn.Sequential(recipes.models.Normalize(mean, std), network)."
        )


@contextlib.contextmanager
def _attackable(network: nn.Module, images: Tensor) -> Generator[foolbox.PyTorchModel, None, None]:
    """Yield the network in evaluation mode for foolbox, without gradients of its weights; restore it."""
    modes = [module.training for module in network.modules()]
    weights = [(weight, weight.requires_grad, weight.grad) for weight in network.parameters()]
    try:
        for weight, _, _ in weights:  # the libraries call backward(), which would add to their gradients, at a cost
            weight.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield foolbox.PyTorchModel(network.eval(), bounds=(0, 1), device=images.device)
    finally:
        for weight, was_trained, gradient in weights:
            weight.requires_grad_(was_trained)
            weight.grad = gradient  # the toolbox sets it to None
        for module, mode in zip(network.modules(), modes, strict=True):
            module.training = mode


@contextlib.contextmanager
def _toolbox(network: nn.Module, images: Tensor) -> Generator[PyTorchClassifier, None, None]:
    """Yield the network as a classifier of the toolbox, whose NumPy generator follows torch's; restore it."""
    logging.getLogger("art").setLevel(logging.ERROR)
    with _attackable(network, images):
        state = np.random.get_state()
        np.random.seed(int(torch.randint(2**31, ())))
        try:
            yield PyTorchClassifier(
                network,
                nn.CrossEntropyLoss(),
                input_shape=tuple(images.shape[1:]),
                nb_classes=network(images[:1]).shape[1],
                clip_values=(0.0, 1.0),
                device_type="gpu" if images.is_cuda else "cpu",
            )
        finally:
            np.random.set_state(state)


def _ascents(
    classifier: PyTorchClassifier, norm: float, epsilon: float, num_steps: int
) -> list[AutoProjectedGradientDescent]:
    losses = ["cross_entropy", "difference_logits_ratio"][: 2 if classifier.nb_classes > 2 else 1]
    settings: dict[str, Any] = {"norm": norm, "eps": epsilon, "eps_step": epsilon / 4, "max_iter": num_steps}
    settings |= {"nb_random_init": 1, "batch_size": _CHUNK, "verbose": False}
    return [AutoProjectedGradientDescent(classifier, loss_type=loss, **settings) for loss in losses]


def _on_survivors(
    classifier: PyTorchClassifier,
    attack: AutoProjectedGradientDescent,
    attacked: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
) -> np.ndarray:
    """Attack anew, from the given images, those that are still classified correctly; keep what fools."""
    left = np.flatnonzero(classifier.predict(attacked).argmax(1) == labels)
    if len(left) == 0:
        return attacked
    found = attack.generate(images[left], labels[left])
    merged = attacked.copy()
    merged[left] = found
    return merged
