"""Penalise while training: a term in the loss of a module that knows nothing of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fisher_reg.batch_statistics import Recording, of_step, record, refuse_synchronised
from fisher_reg.callbacks.batch import InputsFn, LogitsFn, check_at_least_one, find_inputs, logits_model
from fisher_reg.penalty import Penalty, SpectralPenalty


class FisherRegularizer(pl.Callback):
    """Add ``weight * penalty`` to the loss of an unmodified LightningModule with automatic optimisation.

    ``training_step`` is wrapped on the instance for the time of ``fit`` and given back afterwards, also after an
    exception. The penalty is part of the one loss that Lightning divides, scales, clips and synchronises, so it
    is right under gradient accumulation, mixed precision and DDP. It sees the function being trained: batch norm uses
    the statistics of the step's own forward, or of one more forward where the step has several.

    Logged keys (mean over the penalised steps of the epoch): ``fisher/penalty``, ``fisher/penalty_weighted``; of a
    second regularizer in the same Trainer ``fisher/penalty_2``, ``fisher/penalty_weighted_2``.

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
        *,
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
        self._step: _PenalisedStep | None = None

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
        refuse_synchronised(pl_module)
        self._step = _PenalisedStep.of(pl_module)
        self._step.regularizers.append(self)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the training step back."""
        self._unwrap()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the training step back."""
        self._unwrap()

    def _unwrap(self) -> None:
        if self._step is not None:
            self._step.remove(self)
            self._step = None

    def _weight_at(self, step: int) -> float:
        if step % self.every_n_steps:
            return 0.0
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.weight * self.every_n_steps * warmup

    def penalise(
        self, module: pl.LightningModule, inputs: Tensor, recording: Recording, generator: torch.Generator
    ) -> Tensor:
        """Return the penalty of a random part of the inputs, with the batch statistics of the recorded step."""
        model = logits_model(module, self.logits_fn)
        with of_step(model, recording, model, inputs):
            if self.batch_fraction < 1:
                chosen = torch.randperm(len(inputs), generator=generator)
                inputs = inputs[chosen[: max(1, round(self.batch_fraction * len(inputs)))].to(inputs.device)]
            return self.penalty(model, inputs, generator=generator)


class _PenalisedStep:
    """The wrapper of one module's training step, shared by all the regularizers of a fit."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.original = module.training_step
        self.replaced = vars(module).get("training_step")
        self.regularizers: list[FisherRegularizer] = []

        @functools.wraps(self.original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

        training_step.penalised = self  # type: ignore[attr-defined]
        module.training_step = training_step  # type: ignore[method-assign]

    @classmethod
    def of(cls, module: pl.LightningModule) -> _PenalisedStep:
        """Return the wrapper of a module that has one, else a new one."""
        return getattr(module.training_step, "penalised", None) or cls(module)

    def remove(self, regularizer: FisherRegularizer) -> None:
        """Take a regularizer out; give the training step back with the last one."""
        self.regularizers.remove(regularizer)
        current = vars(self.module).get("training_step")
        if not self.regularizers and getattr(current, "penalised", None) is self:
            del self.module.training_step
            if self.replaced is not None:
                self.module.training_step = self.replaced

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step and add the penalties that are due."""
        trainer = self.module.trainer
        weights = [regularizer._weight_at(trainer.global_step) for regularizer in self.regularizers]
        if not any(weights):
            return self.original(*args, **kwargs)
        batch = kwargs["batch"] if "batch" in kwargs else args[0]
        inputs = [regularizer.inputs_fn(batch) for regularizer in self.regularizers]
        with record(self.module) as recording:
            output = self.original(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return output  # None skips the step; anything else Lightning refuses itself
        for number, regularizer in enumerate(self.regularizers):
            if weights[number] > 0:
                generator = torch.Generator().manual_seed(trainer.fit_loop.total_batch_idx)
                penalty = regularizer.penalise(self.module, inputs[number], recording, generator)
                loss = loss + weights[number] * penalty
                self._log(f"_{number + 1}" if number else "", penalty.detach(), weights[number], len(inputs[number]))
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _log(self, suffix: str, penalty: Tensor, weight: float, batch_size: int) -> None:
        values = {f"fisher/penalty{suffix}": penalty, f"fisher/penalty_weighted{suffix}": weight * penalty}
        self.module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=batch_size)
