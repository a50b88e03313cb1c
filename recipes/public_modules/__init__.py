"""LightningModules of other packages, small and with random weights, each with a batch like its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
from torch import Tensor


@dataclass(frozen=True)
class Public:
    """A module with the data to train it and to check its measurements.

    Attributes:
        module: The module, as built by its package.
        batch: A batch with the structure of its data.
        network: From inputs ``(B, *S)`` to logits ``(B, K)``, written by hand with the parts of ``module``.
        inputs: Returns the inputs ``(B, *S)`` of the batch.
        names: Functions that the arguments in ``needs`` may call.
    """

    module: pl.LightningModule
    batch: Any
    network: Callable[[Tensor], Tensor]
    inputs: Callable[[], Tensor]
    names: dict[str, Any] = field(default_factory=dict)
