"""Check of the labels of a penalty against the logits."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_labels(labels: Tensor | None, logits: Tensor, owner: object) -> Tensor:
    """Return labels as 64-bit class indices.

    Args:
        labels: Class indices ``(B,)``.
        logits: ``(B, K)``.
        owner: The penalty to name in the message.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: If there are no labels, if they are not class indices, or if one is a class with a logit of -inf.
    """
    batch_size, num_classes = logits.shape
    if labels is None:
        raise ValueError(f"{type(owner).__name__} needs labels=, class indices (B,).")
    fits = labels.shape == (batch_size,) and not (labels.is_floating_point() or labels.is_complex())
    # read together, with one synchronisation
    smallest, largest, num_left_out = _seen(labels.long(), logits).cpu().tolist() if fits else (0, 0, 0)
    if not fits or smallest < 0 or largest >= num_classes:
        raise ValueError(
            f"labels must be {batch_size} class indices below {num_classes}; got {labels.dtype} {tuple(labels.shape)} "
            f"from {labels.min().item():g} to {labels.max().item():g}. Select them with labels_fn; for soft "
            "labels use their argmax."
        )
    if num_left_out:
        raise ValueError(
            f"{num_left_out} of {batch_size} labels name a class that the model leaves out, with a logit of "
            "-inf. Pass only examples of the other classes."
        )
    return labels.long()


def _seen(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the smallest and the largest label ``(B,)``, and the number of labels with a logit of -inf."""
    smallest, largest = labels.aminmax()
    within = labels.clamp(0, logits.shape[1] - 1)[:, None]
    return torch.stack([smallest, largest, logits.gather(1, within).isneginf().sum()])
