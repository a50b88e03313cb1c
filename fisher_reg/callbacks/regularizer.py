"""Penalise while training: a term in the loss of a module that knows nothing of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fisher_reg.batch_statistics import record, replay
from fisher_reg.callbacks.batch import InputsFn, LogitsFn, check_at_least_one, find_inputs, logits_model
from fisher_reg.penalty import Penalty, SpectralPenalty


class FisherRegularizer(pl.Callback):
    """Add ``weight * penalty`` to the loss of an unmodified LightningModule with automatic optimisation.

    ``training_step`` is wrapped on the instance for the time of ``fit`` and given back afterwards, also after an
    exception. The penalty is part of the one loss that Lightning divides, scales, clips and synchronises, so it
    is right under gradient accumulation, mixed precision and DDP. It sees the function being trained: batch norm uses
    the statistics of the step's own forward.

    Logged keys (mean over the epoch): ``fisher/penalty``, ``fisher/penalty_weighted``.

    Args:
        weight: Factor of the penalty, at least 0; at 0 the training step is untouched.
        penalty: :class:`SpectralPenalty` (default), :class:`TracePenalty`, or any callable
            ``penalty(model, inputs, generator=generator)`` that returns a scalar.
        every_n_steps: Penalises each n-th optimiser step, n times as strongly.
        batch_fraction: Penalises a random part of the batch of this size, in (0, 1].
        warmup_steps: Optimiser steps over which the weight rises linearly from 0.
        inputs_fn: As in :class:`FisherMonitor`.
        logits_fn: As in :class:`FisherMonitor`.

    Example:
        >>> trainer = pl.Trainer(callbacks=[FisherRegularizer(0.1)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        weight: float,
        penalty: Penalty = SpectralPenalty(),
        every_n_steps: int = 1,
        batch_fraction: float = 1.0,
        warmup_steps: int = 0,
        inputs_fn: InputsFn | None = None,
        logits_fn: LogitsFn | None = None,
    ) -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"FisherRegularizer needs a finite weight >= 0; got {weight}.")
        if not 0 < batch_fraction <= 1:
            raise ValueError(f"FisherRegularizer needs 0 < batch_fraction <= 1; got {batch_fraction}.")
        if warmup_steps < 0:
            raise ValueError(f"FisherRegularizer needs warmup_steps >= 0; got {warmup_steps}.")
        check_at_least_one(self, every_n_steps=every_n_steps)
        self.weight = weight
        self.penalty = penalty
        self.every_n_steps = every_n_steps
        self.batch_fraction = batch_fraction
        self.warmup_steps = warmup_steps
        self.inputs_fn = inputs_fn or find_inputs
        self.logits_fn = logits_fn
        self._restore: Callable[[], None] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wrap the training step."""
        if stage != "fit" or self.weight == 0:
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "FisherRegularizer adds to the loss that Lightning differentiates, and this module optimises manually. "
                "Remove the callback and add the penalty to your own loss: "
                "loss = loss + weight * SpectralPenalty()(self, inputs)."
            )
        original = pl_module.training_step
        own = vars(pl_module).get("training_step")

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            weight = self._weight_at(trainer.global_step)
            if weight == 0:
                return original(*args, **kwargs)
            with record(pl_module) as recording:
                output = original(*args, **kwargs)
            batch = kwargs["batch"] if "batch" in kwargs else args[0]
            with replay(recording):
                return self._add_penalty(output, weight, batch, pl_module)

        def restore() -> None:
            if own is None:
                vars(pl_module).pop("training_step", None)
            else:
                pl_module.training_step = own  # type: ignore[method-assign]

        pl_module.training_step = training_step  # type: ignore[method-assign]
        self._restore = restore

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the training step back."""
        self._unwrap()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the training step back."""
        self._unwrap()

    def _unwrap(self) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    def _weight_at(self, step: int) -> float:
        if step % self.every_n_steps:
            return 0.0
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.weight * self.every_n_steps * warmup

    def _add_penalty(self, output: Any, weight: float, batch: Any, pl_module: pl.LightningModule) -> Any:
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return output  # None skips the step; anything else Lightning refuses itself
        inputs = self.inputs_fn(batch)
        model = logits_model(pl_module, self.logits_fn)
        generator = torch.Generator().manual_seed(pl_module.trainer.fit_loop.total_batch_idx)
        if self.batch_fraction < 1:
            chosen = torch.randperm(len(inputs), generator=generator)
            inputs = inputs[chosen[: max(1, round(self.batch_fraction * len(inputs)))].to(inputs.device)]
        penalty = self.penalty(model, inputs, generator=generator)
        values = {"fisher/penalty": penalty.detach(), "fisher/penalty_weighted": weight * penalty.detach()}
        pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(inputs))
        total = loss + weight * penalty
        return {**output, "loss": total} if isinstance(output, Mapping) else total
