"""The times at which a monitor measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException


@dataclass(frozen=True)
class Rhythm:
    """The interval between measurements, in epochs or optimiser steps.

    Attributes:
        epochs: At least 1, which means every validation, also if an epoch has several.
        steps: Optimiser steps, used instead of epochs if given.
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
                f"every_n_steps={self.steps}. Pass only one of them."
            )

    def __str__(self) -> str:
        return f"every_n_epochs={self.epochs}" if self.steps is None else f"every_n_steps={self.steps}"

    def is_due(self, epoch: int, step: int, last: Mapping[str, Any] | None) -> bool:
        """Return whether to measure at this epoch and step, given the ``last`` measurement, if any."""
        if last is None:
            return True
        if self.steps is not None:
            return bool(step - last["step"] >= self.steps)
        return bool(self.epochs == 1 or epoch - last["epoch"] >= self.epochs)

    def is_last(self, trainer: pl.Trainer) -> bool:
        """Return whether this is the last measurement of the fit, as far as its length is known."""
        to_the_next = self._steps_to_the_next(trainer)
        if 0 <= trainer.max_steps <= trainer.global_step or 0 <= trainer.max_steps < trainer.global_step + to_the_next:
            return True
        if self.steps is not None or self.epochs == 1:
            # Lightning estimates batches that step; its global_step counts each optimiser
            total = trainer.estimated_stepping_batches * max(1, len(trainer.optimizers))
            return bool(0 <= total < trainer.global_step + to_the_next)
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            return False
        interval = trainer.check_val_every_n_epoch if trainer.enable_validation else None
        interval = interval or 1
        ends = trainer.current_epoch + self.epochs + 1  # the end of the next measured epoch
        return math.ceil(ends / interval) * interval > trainer.max_epochs

    def _steps_to_the_next(self, trainer: pl.Trainer) -> float:
        """Return the largest number of optimiser steps until the next measurement; 0 if it is not known."""
        if self.steps is not None:
            return self.steps
        batches = trainer.num_training_batches * self.epochs * (trainer.check_val_every_n_epoch or 1)
        if self.epochs == 1 and trainer.enable_validation:
            epochs = trainer.check_val_every_n_epoch or math.inf
            interval = trainer.val_check_batch or math.inf  # None if the interval is a time
            batches = min(interval, trainer.num_training_batches * epochs)
        if batches == math.inf:  # a loader without a length
            return 0.0
        return float(math.ceil(batches / trainer.accumulate_grad_batches) * max(1, len(trainer.optimizers)))


def watched_names(trainer: pl.Trainer, prefix: str) -> list[str]:
    """Return the last parts of our keys that other callbacks or schedulers monitor.

    These are the values of the argument ``monitor`` of early stopping, checkpoints and learning-rate schedulers.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = getattr(trainer, "lr_scheduler_configs", [])
    monitors = [getattr(callback, "monitor", None) for callback in callbacks]
    monitors += [scheduler.monitor for scheduler in schedulers if scheduler.reduce_on_plateau]
    return [str(key).removeprefix(f"{prefix}/") for key in monitors if _is_ours(key, prefix)]


def refuse_late(monitor: pl.Callback, trainer: pl.Trainer, prefix: str) -> None:
    """Raise an error for callbacks that use a key before ``monitor`` has measured it, in a fit without validation.

    Raises:
        MisconfigurationException: If there is such a callback.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for earlier in callbacks[: callbacks.index(monitor)]:
        key = getattr(earlier, "monitor", None)
        if _is_ours(key, prefix):
            raise MisconfigurationException(
                f"{type(earlier).__name__} uses {key} at the end of the epoch, before FisherMonitor has "
                "measured it. Put FisherMonitor before it in Trainer(callbacks=[...])."
            )


def _is_ours(key: Any, prefix: str) -> bool:
    of_the_regularizer = (f"{prefix}/penalty", f"{prefix}/lambda_control")
    return isinstance(key, str) and key.startswith(f"{prefix}/") and not key.startswith(of_the_regularizer)
