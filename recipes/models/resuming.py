"""Resuming a stopped training, with the same numbers as without the stop."""

from __future__ import annotations

import csv
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger

LAST = "last.ckpt"


class ResumePoint(Checkpoint):
    """Writes ``last.ckpt``, the state after the last finished epoch, atomically.

    The file has everything that Lightning saves (weights, optimiser, schedules, the states of the callbacks) and the
    states of the random generators. With several processes these are those of the first process.

    Args:
        folder: The folder of ``last.ckpt``.
    """

    def __init__(self, folder: Path) -> None:
        self._last = folder / LAST
        self._next = folder / "next.ckpt"
        self._begin = time.perf_counter()

    def seconds(self) -> float:
        """Return the duration of the training, including its parts before it was stopped."""
        return time.perf_counter() - self._begin

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save."""
        trainer.save_checkpoint(self._next, weights_only=False)

    # Lightning logs the means of an epoch after the hook above: only then is the log complete for this checkpoint.

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the older file by the saved one."""
        self._publish(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the older file by the saved one."""
        self._publish(trainer)

    def _publish(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self._next.exists():
            os.replace(self._next, self._last)

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds, and the states of the generators of torch, NumPy and Python as plain values."""
        numpy = np.random.get_state(legacy=False)
        return {
            "seconds": self.seconds(),
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "numpy": numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set them."""
        self._begin -= state_dict["seconds"]
        torch.set_rng_state(state_dict["cpu"].cpu())
        torch.cuda.set_rng_state_all([state.cpu() for state in state_dict["cuda"]])
        np.random.set_state(state_dict["numpy"])
        version, internal, gauss = state_dict["python"]
        random.setstate((version, tuple(internal), gauss))


@dataclass(frozen=True)
class Stopped:
    """The point at which a training was stopped.

    Args:
        checkpoint: The file to resume from; ``None`` if no epoch was finished.
        epoch: The last finished epoch, from 0; -1 if there is none.
        step: Number of optimiser steps until then.
    """

    checkpoint: Path | None = None
    epoch: int = -1
    step: int = 0


def stopped_at(folder: Path) -> Stopped:
    """Return the point at which the training with a :class:`ResumePoint` in a folder was stopped."""
    path = folder / LAST
    if not path.exists():
        return Stopped()
    content = torch.load(path, map_location="cpu", weights_only=True)
    return Stopped(path, content["epoch"], content["global_step"])


def restore_log(logger: CSVLogger, last_epoch: int) -> None:
    """Copy the rows until ``last_epoch`` to a new logger, which deletes the file when it starts.

    They are stored in a second file until then, so that nothing is lost if this process is stopped too.
    """
    path = Path(logger.log_dir) / "metrics.csv"
    kept = path.with_suffix(".kept")
    if path.exists() and not kept.exists():
        os.replace(path, kept)
    if kept.exists():
        for row in _rows(kept, last_epoch):
            logger.log_metrics({key: value for key, value in row.items() if value}, int(row["step"]))
        logger.save()
        kept.unlink()


def _rows(path: Path, last_epoch: int) -> Sequence[dict[str, Any]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["epoch"]) <= last_epoch]
