"""The input gradient of the margin at the label, as a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisher_reg.evaluation import InputStd, check_input_std
from fisher_reg.likelihood import Categorical
from fisher_reg.penalty.labels import checked_labels
from fisher_reg.penalty.point import PointPenalty, TrainingPoint, squared_length
from fisher_reg.printing import short_repr


@dataclass(frozen=True)
class LabelContrastPenalty(PointPenalty):
    r"""Mean squared input gradient of the margin at the labels, without a softmax that could saturate.

    .. math:: \|\nabla_x (z_y - \max_{k \ne y} z_k)\|^2

    A Fisher penalty tends to zero where the softmax saturates, so that a network can reduce it by confident instead of
    smooth predictions. This penalty depends only on the gradient of the margin. A network can reduce it by small
    logits, so choose its weight with care. Cost: one double backward pass.

    Args:
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> LabelContrastPenalty()(model, torch.full((1, 2), 100.0), labels=torch.tensor([0])).item()  # |w0 - w1|^2
        4.0
    """

    input_std: InputStd | None = None

    __repr__ = short_repr

    differentiates_twice: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_input_std(self.input_std)

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty at a point, in squared logits per squared input unit; ``generator`` is not used."""
        fisher = point.fisher(Categorical(), self.input_std)
        logits = fisher.logits.detach()
        index = checked_labels(labels, logits, self)[:, None]
        rival = logits.scatter(1, index, -torch.inf).argmax(1, keepdim=True)
        contrast = torch.zeros_like(logits).scatter_(1, index, 1.0).scatter_(1, rival, -1.0)
        contrast = contrast * ~logits.gather(1, rival).isneginf()  # zero if there is no other class
        return squared_length(fisher, contrast).mean()
