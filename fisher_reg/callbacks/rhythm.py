"""When a monitor measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl


@dataclass(frozen=True)
class Rhythm:
    """One measurement, and the next one some epochs or optimiser steps later.

    Attributes:
        epochs: At least 1, which is every validation, however many an epoch has.
        steps: Counted instead where given.
    """

    epochs: int = 1
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("every_n_epochs", self.epochs), ("every_n_steps", self.steps)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"FisherMonitor needs {name} >= 1; got {count!r}.")
        if self.steps is not None and self.epochs != 1:
            raise ValueError(
                f"FisherMonitor counts epochs or steps; got every_n_epochs={self.epochs} and "
                f"every_n_steps={self.steps}. Give one of them."
            )

    def __str__(self) -> str:
        return f"every_n_epochs={self.epochs}" if self.steps is None else f"every_n_steps={self.steps}"

    def is_due(self, epoch: int, step: int, last: Mapping[str, Any] | None) -> bool:
        """Say whether to measure after so many epochs and steps, and the ``last`` measurement, if any."""
        if last is None:
            return True
        if self.steps is not None:
            return bool(step - last["step"] >= self.steps)
        return bool(self.epochs == 1 or epoch - last["epoch"] >= self.epochs)


def watched_keys(trainer: pl.Trainer) -> set[str]:
    """Return the keys of logged values that decide something at each validation.

    These are what other callbacks (early stopping, checkpoints) and learning-rate schedulers call their ``monitor``.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = getattr(trainer, "lr_scheduler_configs", [])
    monitors = [getattr(callback, "monitor", None) for callback in callbacks]
    monitors += [scheduler.monitor for scheduler in schedulers if scheduler.reduce_on_plateau]
    return {monitor for monitor in monitors if isinstance(monitor, str)}
