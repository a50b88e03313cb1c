"""The trace as a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisher_reg.arguments import LIKELIHOOD
from fisher_reg.evaluation import InputStd, check_input_std
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.penalty.point import PointPenalty, TrainingPoint, squared_length
from fisher_reg.printing import short_repr
from fisher_reg.sampling import signs


@dataclass(frozen=True)
class TracePenalty(PointPenalty):
    r"""Mean trace of the Fisher matrix by random signs: all directions, not only the most sensitive one.

    The mean of :math:`\|A^\top \epsilon\|^2` over :math:`\epsilon \in \{-1, 1\}^K` is the trace for all parameters, so
    that value and gradient are unbiased (see :class:`fisher_reg.Hutchinson`). Cost: ``num_samples`` double backward
    passes.

    With ``likelihood=Gaussian()`` it is the squared Frobenius norm of the Jacobian of the logits, the Jacobian
    regulariser of Hoffman, Roberts and Yaida (arXiv 1908.02729), which has no softmax and does not saturate.

    Args:
        num_samples: Number of sign vectors per example.
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
    """

    num_samples: int = 1
    likelihood: Likelihood = Categorical()
    input_std: InputStd | None = None

    __repr__ = short_repr

    differentiates_twice: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_input_std(self.input_std)
        LIKELIHOOD.check(self.likelihood, self)
        if self.num_samples < 1:
            raise ValueError(f"TracePenalty needs num_samples >= 1; got {self.num_samples}.")

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty at a point, the mean over examples and samples; ``generator`` draws the signs."""
        fisher = point.fisher(self.likelihood, self.input_std)
        lengths = [
            squared_length(fisher, self.likelihood.unwhiten(fisher.logits, signs(fisher.logits, generator)))
            for _ in range(self.num_samples)
        ]
        return torch.stack(lengths).mean()
