"""Checks for weights that are sharded over processes."""

from __future__ import annotations

from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from fisher_reg.evaluation import is_sharded
from fisher_reg.penalty import BoundPenalty, Penalty


def refuse_sharded(module: nn.Module, penalty: Penalty, differentiates_twice: bool, is_adapted: bool) -> None:
    """Raise an error for a penalty that does not work with sharded weights.

    Raises:
        MisconfigurationException: If it needs all weights at once, or its weight is adapted.
    """
    if not is_sharded(module):
        return
    if differentiates_twice or isinstance(penalty, BoundPenalty):
        raise MisconfigurationException(
            f"{type(penalty).__name__} needs the weights after a backward pass, when FSDP has freed them. KLPenalty() "
            "does not."
        )
    if is_adapted:
        raise MisconfigurationException(
            "target_lambda measures with a number of passes that differs from process to process, which FSDP does not "
            "allow. Use a fixed weight or a schedule."
        )
