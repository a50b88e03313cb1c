"""Labels that a penalty takes, checked against the logits."""

from __future__ import annotations

from torch import Tensor


def checked_labels(labels: Tensor | None, logits: Tensor, owner: object) -> Tensor:
    """Return labels as 64-bit class indices.

    Args:
        labels: Class indices ``(B,)``.
        logits: ``(B, K)``.
        owner: The penalty, to be named in the message.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: If there are none, they are no indices of the classes, or one is a class that the model leaves out.
    """
    batch_size, num_classes = logits.shape
    if labels is None:
        raise ValueError(f"{type(owner).__name__} needs labels=, class indices (B,).")
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
