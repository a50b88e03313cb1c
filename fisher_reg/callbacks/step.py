"""The training step of a Trainer with penalties in its loss.

During ``fit`` the trainer's strategy holds the wrapper, between the loop and the user's module. The module itself is
not modified: copies and pickles do not contain the wrapper, and a ``training_step`` that is not called by the loop is
not penalised.
"""

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

from fisher_reg.callbacks.batch import InputsFn, LogitsFn, SideInputsFn, logits_model
from fisher_reg.callbacks.gradients import Cut, GradientGuard, SeparateGradient
from fisher_reg.callbacks.tap import Flow, Tap, recorded
from fisher_reg.evaluation import Recording, SideInputs, Source, check_inputs, source_of


@dataclass
class Observation:
    """The observed forwards of a training step.

    Attributes:
        recording: Batch statistics.
        flow: The inputs and logits, if a tap was open.
        cut: Separates the graph of a penalty from that of the step.
    """

    recording: Recording = field(default_factory=Recording)
    flow: Flow | None = None
    cut: Cut = field(default_factory=Cut)


@dataclass(frozen=True)
class Due:
    """A penalty to add in this step.

    Attributes:
        number: Number of the regularizer.
        regularizer: The regularizer.
        source: The inputs in the batch.
        inputs: A copy of the inputs from before the step, since the step may change them in place.
        side_inputs: More arguments of the model.
        model: A copy of the model from before the step that shares the parameters.
        half_precision: Half precision of the penalty; None for float32.
    """

    number: int
    regularizer: Term
    source: Tensor
    inputs: Tensor
    side_inputs: SideInputs
    model: Source
    half_precision: torch.dtype | None = None


class Term(Protocol):
    """The methods of a regularizer that a training step uses."""

    detailed: bool
    every_n_steps: int
    backward_pass: int | None
    inputs_fn: InputsFn
    logits_fn: LogitsFn | None
    side_inputs_fn: SideInputsFn
    guard: GradientGuard

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether this step is penalised."""

    def current_weight(self, trainer: pl.Trainer) -> float:
        """Return the weight, without the factor for skipped steps."""

    def differentiates_twice(self) -> bool:
        """Whether the penalty needs a forward on kernels with second derivatives."""

    def can_reuse_forward(self, module: pl.LightningModule, side_inputs: SideInputs) -> bool:
        """Whether the penalty can reuse the forward of the step."""

    def half_precision(self, module: pl.LightningModule, inputs: Tensor) -> torch.dtype | None:
        """Return the half precision of the step if the penalty tolerates it; None for float32."""

    def check(self, module: pl.LightningModule, due: Due) -> None:
        """Run :func:`fisher_reg.check_model` once."""

    def penalise(
        self, module: pl.LightningModule, due: Due, batch: object, seen: Observation, generator: torch.Generator
    ) -> Tensor | None:
        """Return the penalty, or None if it is not finite."""

    def skip(self, reason: str) -> None:
        """Count a skipped penalty."""


class PenalisedStep:
    """The wrapper of a strategy's training step, shared by all regularizers of a fit."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.strategy = trainer.strategy
        self.module = module
        self.regularizers: list[Term] = []
        self.taps: dict[object, Tap] = {}
        self.pending: list[functools.partial[Tensor]] = []
        self.num_backward = 0
        self.warned: set[str] = set()
        self.replaced = {name: vars(self.strategy)[name] for name in _WRAPPED if name in vars(self.strategy)}
        self.training_step = self.strategy.training_step
        self.backward = self.strategy.backward
        self.strategy.training_step = self.run  # type: ignore[method-assign]
        self.strategy.backward = self.run_backward  # type: ignore[method-assign, assignment]

    @classmethod
    def of(cls, trainer: pl.Trainer, module: pl.LightningModule) -> PenalisedStep:
        """Return the wrapper of a trainer, or a new one if it has none."""
        owner = getattr(trainer.strategy.training_step, "__self__", None)
        return owner if isinstance(owner, cls) else cls(trainer, module)

    def remove(self, regularizer: Term) -> None:
        """Remove a regularizer; with the last one, restore the methods of the strategy."""
        self.regularizers.remove(regularizer)
        if not self.regularizers:
            for name in _WRAPPED:
                vars(self.strategy).pop(name, None)
            vars(self.strategy).update(self.replaced)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step and add the penalties that are due."""
        numbered = [(number, one) for number, one in enumerate(self.regularizers) if one.is_due(self.module.trainer)]
        if not numbered:
            return self.training_step(*args, **kwargs)
        batch = kwargs["batch"] if "batch" in kwargs else args[0]
        due = [self.due(number, regularizer, batch) for number, regularizer in numbered]
        for one in due:
            one.regularizer.check(self.module, one)
        seen = Observation()
        terms = [functools.partial(self.penalised, due=one, batch=batch, seen=seen) for one in due]
        is_automatic, step = self.module.automatic_optimization, self.module.trainer.global_step
        self.pending, self.num_backward = ([] if is_automatic else terms), 0
        with self.observed(due, seen):
            output = self.training_step(*args, **kwargs)
        if not is_automatic:
            self.check_manual(step)
            return output
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return output  # None skips the step; Lightning raises an error for anything else
        total = loss
        for add in terms:
            total = add(total, loss)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def due(self, number: int, regularizer: Term, batch: object) -> Due:
        """Return the data that a regularizer needs from a batch, from before the step."""
        source, side_inputs = regularizer.inputs_fn(batch), regularizer.side_inputs_fn(batch)
        check_inputs(source)
        with torch.inference_mode(False), torch.enable_grad():
            model = source_of(logits_model(self.module, regularizer.logits_fn), is_deployed=False)
        half_precision = regularizer.half_precision(self.module, source)
        return Due(number, regularizer, source, source.detach().clone(), side_inputs, model, half_precision)

    def run_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the penalties to the loss of the chosen backward pass in manual optimisation."""
        number, self.num_backward = self.num_backward, self.num_backward + 1
        total = loss
        for add in list(self.pending):
            chosen = add.keywords["due"].regularizer.backward_pass
            if chosen is None and number > 0:
                raise MisconfigurationException(_SEVERAL)
            if number == (chosen or 0):
                if chosen is not None:
                    self.pending.remove(add)
                # an earlier backward pass has freed the observed graph
                total = add(total, loss) if number == 0 else add(total, loss, seen=Observation())
        return self.backward(total, *args, **kwargs)

    def check_manual(self, step: int) -> None:
        """Warn of a penalty that was not added, or that was added more often than the optimiser steps.

        Args:
            step: The number of optimiser steps before this training step.
        """
        missed = [
            add for add in self.pending if (add.keywords["due"].regularizer.backward_pass or 0) >= self.num_backward
        ]
        self.pending = []
        if missed:
            self.warn_once(
                "missed",
                "The penalty was not added: this module optimises manually, and its training_step did not call "
                "self.manual_backward(loss) as often as FisherRegularizer(backward_pass=...) needs, but "
                f"{self.num_backward} times. Call it instead of loss.backward(), and choose one of the calls.",
            )
        elif self.module.trainer.global_step == step:
            self.warn_once(
                "accumulated",
                "A batch was penalised without a step of the optimizer after it. If training_step "
                "divides its loss by k to accumulate gradients over k batches, divide the weight of FisherRegularizer "
                "by k too: in manual optimisation the callback cannot observe the division.",
            )

    def warn_once(self, what: str, message: str) -> None:
        """Warn once per fit."""
        if what not in self.warned:
            self.warned.add(what)
            rank_zero_warn(message)

    def observed(self, due: list[Due], seen: Observation) -> ExitStack:
        """Start observing a step; one tap is opened, for the first regularizer that can use it."""
        stack = ExitStack()
        for one in due:
            regularizer = one.regularizer
            if seen.flow is None and regularizer.can_reuse_forward(self.module, one.side_inputs):
                tap = self.taps.get(regularizer.logits_fn)
                if tap is None:
                    tap = self.taps[regularizer.logits_fn] = Tap.find(self.module, one.model, one.source)
                seen.flow = Flow(one.source, regularizer.logits_fn, regularizer.differentiates_twice())
                stack.enter_context(tap.open(seen.flow))
        stack.enter_context(recorded(self.module, seen.recording, seen.flow))
        return stack

    def penalised(self, total: Tensor, loss: Tensor, due: Due, batch: object, seen: Observation) -> Tensor:
        """Return the sum of the loss and a penalty, if the penalty and its gradient are finite, and log it.

        Args:
            total: The user's loss with the penalties added so far.
            loss: The user's loss.
            due: The penalty.
            batch: The batch of the step.
            seen: The observed forwards of the step.

        Returns:
            The sum.

        Raises:
            MisconfigurationException: For a loss without gradient.
        """
        if not loss.requires_grad:
            raise MisconfigurationException(
                "training_step returned a loss that carries no gradient, so there is nothing to add a penalty to. "
                "Return the loss as it was computed, without .detach() or .item()."
            )
        trainer, regularizer = self.module.trainer, due.regularizer
        generator = torch.Generator().manual_seed(trainer.fit_loop.total_batch_idx)
        cut = Cut.of(trainer, self.module)
        regularizer.guard.count()
        own = Observation(cut.recording(seen.recording), seen.flow, cut)
        # no reference to the penalty is kept, so that its graph is freed before the step continues
        taken = regularizer.guard.taken(trainer, regularizer.penalise(self.module, due, batch, own, generator), cut)
        weight = regularizer.current_weight(trainer)  # after the penalty, which may adapt it
        coefficient = regularizer.every_n_steps * weight
        guarded = regularizer.guard.applied(self.module, loss, taken, cut, coefficient)
        if guarded.penalty is not None:
            precise = torch.promote_types(loss.dtype, torch.float32)
            total = total + coefficient * guarded.penalty.to(loss.device, precise)
        elif isinstance(taken, SeparateGradient):
            regularizer.skip(f"The penalty is {taken.value.item():.4g}, but its gradient is not finite.")
        suffix = f"_{due.number + 1}" if due.number else ""
        details: dict[str, Any] = {"logger": None if regularizer.detailed else False}
        self.log(suffix, guarded.penalty, weight, len(due.inputs), details)
        if regularizer.guard.is_measuring:
            self.log_ratio(suffix, guarded.ratio, len(due.inputs), details)
        return total

    def log_ratio(self, suffix: str, ratio: Tensor | None, batch_size: int, details: dict[str, Any]) -> None:
        """Log the ratio of the gradient norms; a ratio that could not be measured is left out of the mean."""
        value, is_known = torch.zeros((), device=self.module.device), False
        if ratio is not None and bool(ratio.isfinite()):
            value, is_known = ratio, True
        options = {"on_step": False, "on_epoch": True, "sync_dist": True} | details
        self.module.log(
            f"fisher/penalty_gradient_ratio{suffix}", value, batch_size=batch_size if is_known else 0, **options
        )

    def log(self, suffix: str, penalty: Tensor | None, weight: float, batch_size: int, details: dict[str, Any]) -> None:
        """Log the added term; a skipped penalty is left out of the means."""
        value = torch.zeros((), device=self.module.device) if penalty is None else penalty.detach().float()
        means = {f"fisher/penalty{suffix}": value, f"fisher/penalty_weighted{suffix}": weight * value}
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
        self.module.log_dict(means, batch_size=0 if penalty is None else batch_size, **options)
        options |= {"batch_size": batch_size} | details
        self.module.log(f"fisher/penalty_weight{suffix}", weight, **options)
        self.module.log(f"fisher/penalty_skipped{suffix}", float(penalty is None), reduce_fx="sum", **options)


_WRAPPED = ("training_step", "backward")

_SEVERAL = (
    "training_step called self.manual_backward more than once, and it is not clear which loss the penalty belongs to. "
    "Choose the call, counting from 0: FisherRegularizer(backward_pass=1) for the second, as in sharpness-aware "
    "minimisation, whose first pass only computes a direction."
)
