"""The slope of the logits at the label, as a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisher_reg.evaluation import InputStd, check_input_std
from fisher_reg.likelihood import Categorical
from fisher_reg.penalty.point import PointPenalty, TrainingPoint, squared_length
from fisher_reg.printing import short_repr


@dataclass(frozen=True)
class LabelContrastPenalty(PointPenalty):
    r"""Mean squared slope of the margin at the labels, without a softmax that could saturate.

    .. math:: \|\nabla_x (z_y - \max_{k \ne y} z_k)\|^2

    A Fisher penalty falls to zero where the softmax saturates, so that a network can pay it with confidence instead of
    smoothness; this one sees the slope of the margin alone. It may be paid by small logits instead: weigh it against
    the loss with care. Cost: one double backward pass.

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
        """Return the penalty at a point, in squared logits per squared input unit; nothing is random."""
        fisher = point.fisher(Categorical(), self.input_std)
        logits = fisher.logits.detach()
        index = _checked(labels, logits)[:, None]
        rival = logits.scatter(1, index, -torch.inf).argmax(1, keepdim=True)
        contrast = torch.zeros_like(logits).scatter_(1, index, 1.0).scatter_(1, rival, -1.0)
        contrast = contrast * ~logits.gather(1, rival).isneginf()  # a class without a rival has no margin
        return squared_length(fisher, contrast).mean()


def _checked(labels: Tensor | None, logits: Tensor) -> Tensor:
    batch_size, num_classes = logits.shape
    if labels is None:
        raise ValueError("LabelContrastPenalty needs labels=, class indices (B,).")
    fits = labels.shape == (batch_size,) and not (labels.is_floating_point() or labels.is_complex())
    if not fits or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels must be {batch_size} class indices below {num_classes}; got {labels.dtype} {tuple(labels.shape)} "
            f"from {labels.min().item():g} to {labels.max().item():g}. Say where they are with labels_fn, or for soft "
            "labels use their argmax."
        )
    left_out = logits.gather(1, labels.long()[:, None]).isneginf()
    if bool(left_out.any()):
        raise ValueError(
            f"{int(left_out.sum())} of {batch_size} labels name a class that the model leaves out, with a logit of "
            "-inf. Pass only examples of the classes that are there."
        )
    return labels.long()
