"""The training step that a Trainer runs, with penalties in its loss.

The wrapper stands on the trainer's strategy, between the loop and the user's module, for the time of ``fit``. The
module itself is untouched: a copy of it, or what it pickles to, knows nothing of a penalty, and a ``training_step``
that is called by anybody but the loop is not penalised.
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
    """What is seen of the forwards of a training step while it runs.

    Attributes:
        recording: Batch statistics.
        flow: The inputs and logits, where a tap was open.
        cut: By which a penalty takes logits and statistics from the step.
    """

    recording: Recording = field(default_factory=Recording)
    flow: Flow | None = None
    cut: Cut = field(default_factory=Cut)


@dataclass(frozen=True)
class Due:
    """A penalty that this step is to get.

    Attributes:
        number: Of the regularizer.
        regularizer: What penalises.
        source: The inputs in the batch.
        inputs: A copy of them from before the step, which may change them in place.
        side_inputs: More arguments of the model.
        model: The model as it was before the step, as a copy that shares the parameters.
        half_precision: In which the penalty is taken; None for float32.
    """

    number: int
    regularizer: Term
    source: Tensor
    inputs: Tensor
    side_inputs: SideInputs
    model: Source
    half_precision: torch.dtype | None = None


class Term(Protocol):
    """What a training step asks of a regularizer."""

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
        """Return the weight, without the factor for the steps between."""

    def differentiates_twice(self) -> bool:
        """Whether the penalty needs a forward on kernels with second derivatives."""

    def can_reuse_forward(self, module: pl.LightningModule, side_inputs: SideInputs) -> bool:
        """Whether the penalty can be taken where the step's own forward has been."""

    def half_precision(self, module: pl.LightningModule, inputs: Tensor) -> torch.dtype | None:
        """Return the half precision in which the step computes and the penalty may be taken; None for float32."""

    def check(self, module: pl.LightningModule, due: Due) -> None:
        """Check once that the model is the function that the penalty is meant for."""

    def penalise(
        self, module: pl.LightningModule, due: Due, batch: object, seen: Observation, generator: torch.Generator
    ) -> Tensor | None:
        """Return the penalty, or None if it is not finite."""

    def skip(self, reason: str) -> None:
        """Count a penalty that is left out."""


class PenalisedStep:
    """The wrapper of a strategy's training step, shared by all the regularizers of a fit."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.strategy = trainer.strategy
        self.module = module
        self.regularizers: list[Term] = []
        self.taps: dict[object, Tap] = {}
        self.pending: list[functools.partial[Tensor]] = []
        self.num_backward = 0
        self.told: set[str] = set()
        self.replaced = {name: vars(self.strategy)[name] for name in _WRAPPED if name in vars(self.strategy)}
        self.training_step = self.strategy.training_step
        self.backward = self.strategy.backward
        self.strategy.training_step = self.run  # type: ignore[method-assign]
        self.strategy.backward = self.run_backward  # type: ignore[method-assign, assignment]

    @classmethod
    def of(cls, trainer: pl.Trainer, module: pl.LightningModule) -> PenalisedStep:
        """Return the wrapper of a trainer that has one, else a new one."""
        owner = getattr(trainer.strategy.training_step, "__self__", None)
        return owner if isinstance(owner, cls) else cls(trainer, module)

    def remove(self, regularizer: Term) -> None:
        """Take a regularizer out; give the strategy its methods back with the last one."""
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
            return output  # None skips the step; anything else Lightning refuses itself
        total = loss
        for add in terms:
            total = add(total, loss)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def due(self, number: int, regularizer: Term, batch: object) -> Due:
        """Return what a regularizer needs of a batch, as it is before the step."""
        source, side_inputs = regularizer.inputs_fn(batch), regularizer.side_inputs_fn(batch)
        check_inputs(source)
        with torch.inference_mode(False), torch.enable_grad():
            model = source_of(logits_model(self.module, regularizer.logits_fn), is_deployed=False)
        half_precision = regularizer.half_precision(self.module, source)
        return Due(number, regularizer, source, source.detach().clone(), side_inputs, model, half_precision)

    def run_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the penalties to what their backward pass of a step in manual optimisation differentiates."""
        number, self.num_backward = self.num_backward, self.num_backward + 1
        total = loss
        for add in list(self.pending):
            chosen = add.keywords["due"].regularizer.backward_pass
            if chosen is None and number > 0:
                raise MisconfigurationException(_SEVERAL)
            if number == (chosen or 0):
                if chosen is not None:
                    self.pending.remove(add)
                # the graph of what was seen is gone with an earlier backward pass
                total = add(total, loss) if number == 0 else add(total, loss, seen=Observation())
        return self.backward(total, *args, **kwargs)

    def check_manual(self, step: int) -> None:
        """Tell of a penalty that the step did not take, or takes more often than the optimizer steps.

        Args:
            step: The number of optimizer steps before this training step.
        """
        missed = [
            add for add in self.pending if (add.keywords["due"].regularizer.backward_pass or 0) >= self.num_backward
        ]
        self.pending = []
        if missed:
            self.tell(
                "missed",
                "The penalty was not added: this module optimises manually, and its training_step did not call "
                "self.manual_backward(loss) as often as FisherRegularizer(backward_pass=...) says, but "
                f"{self.num_backward} times. Call it instead of loss.backward(), and choose one of the calls.",
            )
        elif self.module.trainer.global_step == step:
            self.tell(
                "accumulated",
                "A batch was penalised without a step of the optimizer after it. If training_step "
                "divides its loss by k to accumulate gradients over k batches, divide the weight of FisherRegularizer "
                "by k too: in manual optimisation the division is not seen.",
            )

    def tell(self, what: str, message: str) -> None:
        """Warn once in a fit."""
        if what not in self.told:
            self.told.add(what)
            rank_zero_warn(message)

    def observed(self, due: list[Due], seen: Observation) -> ExitStack:
        """Open what watches a step; one tap, for the first regularizer that can use it."""
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
        """Return what is differentiated plus a penalty, if that and its gradient are finite, and log it.

        Args:
            total: The user's loss with the penalties before.
            loss: The user's loss.
            due: The penalty.
            batch: As the step got it.
            seen: What was seen of its forwards.

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
        # the penalty itself is kept nowhere, so that the memory of its graph is free before the step goes on
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
        """Log the ratio of the gradients; one that could not be measured counts nothing in the mean."""
        value, is_known = torch.zeros((), device=self.module.device), False
        if ratio is not None and bool(ratio.isfinite()):
            value, is_known = ratio, True
        options = {"on_step": False, "on_epoch": True, "sync_dist": True} | details
        self.module.log(
            f"fisher/penalty_gradient_ratio{suffix}", value, batch_size=batch_size if is_known else 0, **options
        )

    def log(self, suffix: str, penalty: Tensor | None, weight: float, batch_size: int, details: dict[str, Any]) -> None:
        """Log what was added; a penalty that was skipped counts nothing in the means."""
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
    "Say which call gets it, counting from 0: FisherRegularizer(backward_pass=1) for the second, as in sharpness-aware "
    "minimisation, whose first pass only looks for a direction."
)
