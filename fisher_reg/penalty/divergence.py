"""The divergence that one step causes, as a penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisher_reg.arguments import LIKELIHOOD
from fisher_reg.evaluation import InputStd, check_input_std
from fisher_reg.left_out import present
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.penalty.point import PointPenalty, TrainingPoint
from fisher_reg.printing import short_repr
from fisher_reg.solvers import unit


@dataclass(frozen=True)
class KLPenalty(PointPenalty):
    r"""Mean curvature of the KL divergence over one step of finite length, towards the runner-up class.

    .. math:: 2\,\mathrm{KL}(p_x \,\|\, p_{x + \epsilon v}) / \epsilon^2

    The unit direction :math:`v` is the one along which the two most probable classes approach each other fastest,
    :math:`-J^\top (e_1 - e_2)` normalised; it is held fixed, and the gradient is that of the divergence on both sides.
    As :math:`\epsilon \to 0` the value tends to :math:`v^\top F v \le \lambda_\max` with an error of
    :math:`O(\epsilon)`. At a finite length it also sees what the Fisher matrix at ``x`` does not: a confident
    prediction that turns within the step.

    Cost: one backward pass to the inputs without parameter gradient, one forward, and its backward. No second
    derivative, so that every kernel will do (fused attention too), and the training step's own forward can be
    reused even where it ran through batch norm in training: a coupled graph changes only the direction.

    Args:
        step: Length :math:`\epsilon`, in the input unit (in pixels with ``input_std``).
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> round(KLPenalty(step=0.1)(model, torch.zeros(1, 2)).item(), 2)  # p (1 - p) |w0 - w1|^2 = 4 / 4
        1.0
    """

    step: float = 0.5
    likelihood: Likelihood = Categorical()
    input_std: InputStd | None = None

    __repr__ = short_repr

    differentiates_twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_input_std(self.input_std)
        LIKELIHOOD.check(self.likelihood, self)
        if not 0 < self.step < math.inf:
            raise ValueError(f"KLPenalty needs a finite step > 0, in the input unit; got {self.step}.")

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty at a point; nothing is random."""
        fisher = point.fisher(self.likelihood, self.input_std)
        logits = fisher.logits.detach()
        contrast, _ = self.likelihood.contrast(logits)
        towards = torch.where((contrast * present(logits)).sum(1, keepdim=True) < 0, contrast, -contrast)
        direction = unit(fisher.slope(towards))
        moved = fisher.logits_at(self.step * direction)
        # no slope, no step: another forward may round otherwise than that of the training step
        moved = torch.where(direction.any(1, keepdim=True), moved, point.outputs)
        return 2 / self.step**2 * self.likelihood.divergence(point.outputs, moved).mean()
