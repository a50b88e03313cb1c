"""Auto-PGD, Square, and their ensemble, from the adversarial-robustness-toolbox, since foolbox does not have them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from art.attacks.evasion import AutoAttack as ToolboxAutoAttack
from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from recipes.attacks.base import attackable, check_at_least_one, check_ball

_CHUNK = 100


@dataclass(frozen=True)
class AutoProjectedGradient:
    """Auto-PGD (arXiv 2003.01690), with adaptive step sizes and no other parameters, by the toolbox.

    It uses the cross-entropy first. For three classes or more, the survivors are attacked with the difference-of-logits
    ratio, which is invariant under the scale of the logits.

    Attributes:
        norm: 2 or infinity.
        epsilon: Radius, in pixel units.
        num_steps: Ascent steps of each loss.
    """

    norm: float
    epsilon: float
    num_steps: int = 50

    def __post_init__(self) -> None:
        check_ball(self.norm, self.epsilon)
        check_at_least_one(num_steps=self.num_steps)

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

    Square needs no gradient, so that gradient masking does not affect it.

    Attributes:
        norm: 2 or infinity.
        epsilon: Radius, in pixel units.
        num_steps: Ascent steps of each loss.
        num_queries: Number of queries of Square.
    """

    norm: float
    epsilon: float
    num_steps: int = 50
    num_queries: int = 500

    def __post_init__(self) -> None:
        check_ball(self.norm, self.epsilon)
        check_at_least_one(num_steps=self.num_steps, num_queries=self.num_queries)

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


@contextlib.contextmanager
def _toolbox(network: nn.Module, images: Tensor) -> Generator[PyTorchClassifier, None, None]:
    """Yield the network as a classifier of the toolbox, with NumPy seeded from torch; restore the state afterwards."""
    logging.getLogger("art").setLevel(logging.ERROR)
    with attackable(network):
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
    """Attack again, from the given images, those that are still classified correctly; keep misclassified ones."""
    left = np.flatnonzero(classifier.predict(attacked).argmax(1) == labels)
    if len(left) == 0:
        return attacked
    found = attack.generate(images[left], labels[left])
    merged = attacked.copy()
    merged[left] = found
    return merged
