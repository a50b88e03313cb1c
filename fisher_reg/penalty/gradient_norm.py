"""The norm of the input gradient of the loss, as a penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisher_reg.evaluation import InputStd, check_input_std
from fisher_reg.geometry import GEOMETRY, Geometry, LInf
from fisher_reg.likelihood import Categorical
from fisher_reg.penalty.labels import checked_labels
from fisher_reg.penalty.point import PointPenalty, TrainingPoint
from fisher_reg.printing import short_repr


@dataclass(frozen=True)
class GradientNormPenalty(PointPenalty):
    r"""Mean increase of the cross-entropy over the steepest step, to first order.

    .. math:: \epsilon \, \|\nabla_x \mathrm{CE}(z(x), y)\|_*

    in the norm dual to that of the step: the sum of absolute values for :class:`LInf`. In nats. Where the gradient is
    zero the derivative is zero.

    It is the regulariser of Rodríguez-Muñoz, Wang and Torralba, "Characterizing model robustness via natural input
    gradients" (ECCV 2024, arXiv 2409.20139). Their loss is 0.8 times the cross-entropy plus 1.2 times this penalty,
    hence the default weight of 1.5, at each step and for the whole batch (``every_n_steps=1, batch_fraction=1.0`` of
    the regularizer). They increase the weight linearly over the first five epochs (``warmup_steps``), start from a
    network trained without it, clip the gradient of the parameters at a norm of 1 (``gradient_clip_val=1.0`` of the
    Trainer), use an exponential moving average of the weights, and smooth activations (with ReLU the gain is small).
    They use 4/255 for CIFAR-10 too.

    In their code the gradient passes through the statistics of batch norm in training, and labels may be mixed or
    smoothed; here the function is per-example, as in all penalties of this package, and labels are indices.

    Cost: one double backward pass.

    Args:
        epsilon: Length of the step in the geometry, in the input unit (in pixels with ``input_std``).
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        geometry: The norm of the step: :class:`LInf` or :class:`L2`.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> penalty = GradientNormPenalty(epsilon=0.1)
        >>> round(penalty(model, torch.zeros(1, 2), labels=torch.tensor([0])).item(), 6)  # 0.1 (1 - p) |w0 - w1|_1
        0.1
    """

    epsilon: float = 4 / 255
    input_std: InputStd | None = None
    geometry: Geometry = LInf()

    __repr__ = short_repr

    differentiates_twice: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_input_std(self.input_std)
        GEOMETRY.check(self.geometry, self)
        if not 0 < self.epsilon < math.inf:
            raise ValueError(
                f"GradientNormPenalty needs a finite epsilon > 0, in the input unit, such as 4/255 for pixels in "
                f"[0, 1]; got {self.epsilon}."
            )

    @property
    def default_weight(self) -> float:
        """The ratio of the weights 1.2 and 0.8 of the paper."""
        return 1.5

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty at a point; ``generator`` is not used."""
        fisher = point.fisher(Categorical(), self.input_std)
        index = checked_labels(labels, fisher.logits.detach(), self)
        gradient = fisher.pullback(_slope_of_cross_entropy(fisher.logits, index))
        return self.epsilon * self.geometry.dual_norm(gradient).mean()


def _slope_of_cross_entropy(logits: Tensor, index: Tensor) -> Tensor:
    """Return ``p - e_y`` ``(B, K)``, with its gradient."""
    # p_y - 1 = -sum of the other p_k, without cancellation where the softmax saturates
    others = logits.softmax(1).scatter(1, index[:, None], 0.0)
    return others.scatter(1, index[:, None], -others.sum(1, keepdim=True))
