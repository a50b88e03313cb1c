"""Regularisers by others, reimplemented as penalties of this package.

Each uses the same batch statistics and the same reused forward as our penalties, which only makes it cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from fisher_reg import Categorical
from fisher_reg.penalty import PointPenalty, TrainingPoint, squared_length
from fisher_reg.sampling import normal, uniform
from recipes.attacks import ProjectedGradient


@dataclass(frozen=True)
class VirtualAdversarialPenalty(PointPenalty):
    r"""Virtual adversarial training of Miyato et al. (arXiv 1704.03976), with one power iteration.

    :math:`\mathrm{KL}(p_x \| p_{x+r})` with a constant first argument, where :math:`r` has length ``epsilon`` and the
    direction of the gradient of the same divergence at a random step of length ``probe``.
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


@dataclass(frozen=True)
class TradesPenalty(PointPenalty):
    r"""The regulariser of TRADES, Zhang et al. (arXiv 1901.08573, github.com/yaodongyu/TRADES), in the linf norm.

    :math:`\mathrm{KL}(p_x \| p_{\tilde x})` with gradients to both predictions. :math:`\tilde x` starts at a normal
    step of size 0.001 and takes ``num_steps`` sign steps that increase the divergence, within ``epsilon`` and [0, 1].
    The default weight is their :math:`\beta = 6`; their code rounds 8/255 to 0.031 and 2/255 to 0.007.

    Their code attacks the network in evaluation mode, and the attacked batch has its own batch statistics; here both
    use the function and the statistics of the training step.
    """

    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    num_steps: int = 10

    differentiates_twice: ClassVar[bool] = False

    @property
    def default_weight(self) -> float:
        r""":math:`\beta`."""
        return 6.0

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the mean divergence in nats; ``generator`` draws the normal step."""
        images, fixed = point.inputs.detach(), point.logits.detach()
        moved = images + _TRADES_START * normal(images, generator)
        for _ in range(self.num_steps):
            moved.requires_grad_()
            (slope,) = torch.autograd.grad(Categorical().divergence(fixed, point.function(moved)).sum(), moved)
            moved = _in_ball(images, moved.detach() + self.step_size * slope.sign(), self.epsilon)
        return Categorical().divergence(point.outputs, point.function(moved)).mean()


_TRADES_START = 0.001


class AdversarialTraining(pl.Callback):
    r"""Adversarial training of Madry et al. (arXiv 1706.06083): replaces the images of each batch by attacked ones.

    Args:
        epsilon: Radius in :math:`\ell_\infty`, in pixel units.
        num_steps: Number of steps of projected gradient ascent, each of length 2.5 ``epsilon / num_steps``.
    """

    def __init__(self, epsilon: float, num_steps: int = 3) -> None:
        self.epsilon = epsilon
        self.num_steps = num_steps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Attack the batch in place, on the deployed function."""
        images, labels = batch
        images.copy_(ProjectedGradient(math.inf, self.epsilon, self.num_steps)(pl_module, images, labels))


class FastAdversarialTraining(pl.Callback):
    r"""Fast adversarial training of Wong, Rice and Kolter (arXiv 2001.03994, github.com/locuslab/fast_adversarial).

    Replaces the images of each batch by those after one sign step from a uniformly random start. As in their code, the
    network is in training mode for this step, so that batch norm uses the statistics of these images and updates its
    running statistics.

    Args:
        epsilon: Radius in :math:`\ell_\infty`, in pixel units.
        step: Length of the step, in radii.
    """

    def __init__(self, epsilon: float, step: float = 1.25) -> None:
        self.epsilon = epsilon
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Attack the batch in place, on the function that is being trained."""
        images, labels = batch
        start = (images + self.epsilon * (2 * uniform(images) - 1)).clamp(0, 1).requires_grad_()
        loss = torch.nn.functional.cross_entropy(pl_module(start), labels)
        (slope,) = torch.autograd.grad(loss, start)
        images.copy_(_in_ball(images, start.detach() + self.step * self.epsilon * slope.sign(), self.epsilon))


def _in_ball(images: Tensor, moved: Tensor, epsilon: float) -> Tensor:
    """Project onto the images in [0, 1] within ``epsilon`` of the given ones in the linf norm."""
    return (images + (moved - images).clamp(-epsilon, epsilon)).clamp(0, 1)


def _unit(direction: Tensor) -> Tensor:
    flat = direction.flatten(1)
    result: Tensor = (flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)).view_as(direction)
    return result


def _one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits)
