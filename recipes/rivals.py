"""Other people's regularisers, re-expressed so that they run in the same place as ours.

Each is compared under the same batch statistics and on the same reused forward, which only makes it cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from fisher_reg import Categorical
from fisher_reg.penalty import PointPenalty, TrainingPoint
from fisher_reg.penalty.point import squared_length
from fisher_reg.sampling import normal
from recipes.attacks import ProjectedGradient


@dataclass(frozen=True)
class VirtualAdversarialPenalty(PointPenalty):
    r"""Virtual adversarial training of Miyato et al. (arXiv 1704.03976), with one power iteration.

    :math:`\mathrm{KL}(p_x \| p_{x+r})`, the first argument held fixed, where :math:`r` of length ``epsilon`` is the
    gradient of the same divergence at a random step of length ``probe``.
    """

    epsilon: float = 0.5
    probe: float = 0.1

    differentiates_twice: ClassVar[bool] = False

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the mean divergence in nats; ``generator`` draws the random step."""
        fixed = point.logits.detach()
        start = (point.inputs.detach() + self.probe * _unit(normal(point.inputs, generator))).requires_grad_()
        (slope,) = torch.autograd.grad(Categorical().divergence(fixed, point.function(start)).sum(), start)
        moved = point.function(point.inputs.detach() + self.epsilon * _unit(slope))
        return Categorical().divergence(fixed, moved).mean()


@dataclass(frozen=True)
class InputGradientPenalty(PointPenalty):
    r"""Mean :math:`\|\nabla_x \mathrm{CE}(x, y)\|^2` (Drucker and LeCun's double backpropagation)."""

    differentiates_twice: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty in squared nats per squared input unit."""
        assert labels is not None
        fisher = point.fisher(Categorical(), None)
        return squared_length(fisher, point.logits.softmax(1) - _one_hot(labels, point.logits)).mean()


class AdversarialTraining(pl.Callback):
    r"""Adversarial training of Madry et al. (arXiv 1706.06083): replaces the images of each batch by attacked ones.

    Args:
        epsilon: Radius in :math:`\ell_\infty`, in pixel units.
        num_steps: Steps of projected gradient ascent, each of 2.5 ``epsilon`` over their number.
    """

    def __init__(self, epsilon: float, num_steps: int = 3) -> None:
        self.epsilon = epsilon
        self.num_steps = num_steps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Attack the batch in place, on the deployed function."""
        images, labels = batch
        images.copy_(ProjectedGradient(math.inf, self.epsilon, self.num_steps)(pl_module, images, labels))


def _unit(direction: Tensor) -> Tensor:
    flat = direction.flatten(1)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)).view_as(direction)


def _one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits)
