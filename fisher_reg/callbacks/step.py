"""The training step of a module that knows nothing of penalties, with their terms in its loss."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from fisher_reg.batch_statistics import Recording, record
from fisher_reg.callbacks.batch import InputsFn, LogitsFn, logits_model
from fisher_reg.callbacks.tap import Flow, Tap
from fisher_reg.forward import check_inputs


@dataclass
class Observation:
    """What is seen of the forwards of a training step while it runs.

    Attributes:
        recording: Batch statistics.
        flow: The inputs and logits, where a tap was open.
    """

    recording: Recording = field(default_factory=dict)
    flow: Flow | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Remove the hooks, so that the penalty's own forwards are not observed."""
        self.stack.close()


@dataclass(frozen=True)
class Due:
    """A penalty that this step is to get.

    Attributes:
        number: Of the regularizer.
        regularizer: What penalises.
        source: The inputs in the batch.
        inputs: A copy of them from before the step, which may change them in place.
    """

    number: int
    regularizer: Term
    source: Tensor
    inputs: Tensor


class Term(Protocol):
    """What a training step asks of a regularizer."""

    every_n_steps: int
    inputs_fn: InputsFn
    logits_fn: LogitsFn | None

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether this step is penalised."""

    def current_weight(self, trainer: pl.Trainer) -> float:
        """Return the weight, without the factor for the steps between."""

    def differentiates_twice(self) -> bool:
        """Whether the step must run on kernels with second derivatives for its forward to be reused."""

    def can_reuse_forward(self, module: pl.LightningModule) -> bool:
        """Whether a tap is worth opening."""

    def penalise(
        self, module: pl.LightningModule, due: Due, batch: object, seen: Observation, generator: torch.Generator
    ) -> Tensor | None:
        """Return the penalty, or None if it is not finite."""


class PenalisedStep:
    """The wrapper of one module's training step, shared by all the regularizers of a fit."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.regularizers: list[Term] = []
        self.taps: dict[object, Tap] = {}
        self.pending: functools.partial[Tensor] | None = None
        self.told = False
        self.original = module.training_step
        self.replaced = {name: vars(module)[name] for name in _WRAPPED if name in vars(module)}
        manual_backward = module.manual_backward

        @functools.wraps(self.original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

        @functools.wraps(manual_backward)
        def penalised_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            manual_backward(self.take(loss), *args, **kwargs)

        training_step.penalised = self  # type: ignore[attr-defined]
        module.training_step = training_step  # type: ignore[method-assign]
        if not module.automatic_optimization:
            module.manual_backward = penalised_backward  # type: ignore[method-assign]

    @classmethod
    def of(cls, module: pl.LightningModule) -> PenalisedStep:
        """Return the wrapper of a module that has one, else a new one."""
        return getattr(module.training_step, "penalised", None) or cls(module)

    def remove(self, regularizer: Term) -> None:
        """Take a regularizer out; give the methods back with the last one."""
        self.regularizers.remove(regularizer)
        current = vars(self.module).get("training_step")
        if not self.regularizers and getattr(current, "penalised", None) is self:
            for name in _WRAPPED:
                vars(self.module).pop(name, None)
            vars(self.module).update(self.replaced)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step and add the penalties that are due."""
        numbered = [(number, one) for number, one in enumerate(self.regularizers) if one.is_due(self.module.trainer)]
        if not numbered:
            return self.original(*args, **kwargs)
        batch = kwargs["batch"] if "batch" in kwargs else args[0]
        due = []
        for number, regularizer in numbered:
            source = regularizer.inputs_fn(batch)
            check_inputs(source)
            due.append(Due(number, regularizer, source, source.detach().clone()))
        seen = self.observe(due)
        add = functools.partial(self.penalised, due=due, batch=batch, seen=seen)
        with seen.stack:
            self.pending = None if self.module.automatic_optimization else add
            output = self.original(*args, **kwargs)
        if self.pending is not None and not self.told:
            self.told = True
            rank_zero_warn(
                "The penalty was not added: this module optimises manually, and its training_step did not call "
                "self.manual_backward(loss)."
            )
        self.pending = None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not self.module.automatic_optimization or not isinstance(loss, Tensor):
            return output  # None skips the step; anything else Lightning refuses itself
        loss = add(loss)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def take(self, loss: Tensor) -> Tensor:
        """Add the penalties that are due to what the first ``manual_backward`` of a step differentiates."""
        add, self.pending = self.pending, None
        return loss if add is None else add(loss)

    def observe(self, due: list[Due]) -> Observation:
        """Open the hooks for a step; one tap, for the first regularizer that can use it."""
        seen = Observation()
        for one in due:
            regularizer = one.regularizer
            if seen.flow is None and regularizer.can_reuse_forward(self.module):
                tap = self.taps.get(regularizer.logits_fn)
                if tap is None:
                    model = logits_model(self.module, regularizer.logits_fn)
                    tap = self.taps[regularizer.logits_fn] = Tap.find(self.module, model, one.source)
                opened = tap.open(one.source, regularizer.logits_fn, regularizer.differentiates_twice())
                seen.flow = seen.stack.enter_context(opened)
        seen.recording = seen.stack.enter_context(record(self.module))
        return seen

    def penalised(self, loss: Tensor, due: list[Due], batch: object, seen: Observation) -> Tensor:
        """Return the loss plus the penalties that are finite, and log them."""
        seen.close()
        if not loss.requires_grad:
            raise MisconfigurationException(
                "training_step returned a loss that carries no gradient, so there is nothing to add a penalty to. "
                "Return the loss as it was computed, without .detach() or .item()."
            )
        trainer = self.module.trainer
        for one in due:
            regularizer = one.regularizer
            generator = torch.Generator().manual_seed(trainer.fit_loop.total_batch_idx)
            penalty = regularizer.penalise(self.module, one, batch, seen, generator)
            weight = regularizer.current_weight(trainer)
            if penalty is not None:
                precise = torch.promote_types(loss.dtype, torch.float32)
                loss = loss + regularizer.every_n_steps * weight * penalty.to(loss.device, precise)
            self.log(f"_{one.number + 1}" if one.number else "", penalty, weight, len(one.inputs))
        return loss

    def log(self, suffix: str, penalty: Tensor | None, weight: float, batch_size: int) -> None:
        """Log what was added; a penalty that was skipped counts nothing in the means."""
        value = torch.zeros((), device=self.module.device) if penalty is None else penalty.detach().float()
        means = {f"fisher/penalty{suffix}": value, f"fisher/penalty_weighted{suffix}": weight * value}
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
        self.module.log_dict(means, batch_size=0 if penalty is None else batch_size, **options)
        options["batch_size"] = batch_size
        self.module.log(f"fisher/penalty_weight{suffix}", weight, **options)
        self.module.log(f"fisher/penalty_skipped{suffix}", float(penalty is None), reduce_fx="sum", **options)


_WRAPPED = ("training_step", "manual_backward")
