"""The progress of a training whose output goes to a file."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl

from recipes.runtime.progress import Progress


class ProgressLines(pl.Callback):
    """Prints a line with the time left every 30 seconds of a training: a file cannot show Lightning's bar."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the steps of all epochs, and those that a resumed training has done."""
        num_batches, num_epochs = trainer.num_training_batches, trainer.max_epochs or 0
        if trainer.is_global_zero and math.isfinite(num_batches) and num_epochs > 0:
            done = trainer.current_epoch * int(num_batches)
            self._progress = Progress("training", num_epochs * int(num_batches), done)
            self._progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step."""
        if self._progress is not None:
            self._progress.advance(f"epoch {trainer.current_epoch + 1}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End it."""
        if self._progress is not None:
            self._progress.stop()
