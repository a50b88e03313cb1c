"""Add a penalty to the training loss of an unmodified LightningModule."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fisher_reg.arguments import INPUTS_FN, LABELS_FN, LOGITS_FN, PENALTY, SCHEDULE, SIDE_INPUTS_FN
from fisher_reg.callbacks.base import Callback
from fisher_reg.callbacks.batch import (
    InputsFn,
    LabelsFn,
    LogitsFn,
    PenaltyFn,
    SideInputsFn,
    check_at_least_one,
    find_inputs,
    find_labels,
    logits_model,
    no_side_inputs,
    report_check,
)
from fisher_reg.callbacks.control import LambdaControl, check_control
from fisher_reg.callbacks.gradients import GradientGuard
from fisher_reg.callbacks.place import Place
from fisher_reg.callbacks.schedules import ConstantSchedule, Schedule
from fisher_reg.callbacks.sharded import refuse_sharded
from fisher_reg.callbacks.step import Due, Observation, PenalisedStep
from fisher_reg.errors import NonFiniteError
from fisher_reg.evaluation import (
    SideInputs,
    is_sharded,
    refuse_unseen_batch_norm,
)
from fisher_reg.likelihood import Categorical
from fisher_reg.penalty import KLPenalty, PointPenalty
from fisher_reg.printing import short


class FisherRegularizer(Callback):
    """Add ``weight * penalty`` to the loss of an unmodified LightningModule.

    The module is not modified. During ``fit`` the trainer's call of ``training_step`` is wrapped, on its strategy, and
    restored afterwards, also after an exception. Copies and pickles of the module do not contain the wrapper, and a
    ``validation_step`` that calls ``training_step`` is not penalised. The penalty is a term of the loss that Lightning
    divides, scales, clips and synchronises, so that gradient accumulation, mixed precision and DDP work. In manual
    optimisation it is added to the argument of ``self.manual_backward``; if a step calls this function several times,
    ``backward_pass`` must select the call.

    The function being trained is penalised: batch norm uses the statistics of the forward of the step. That forward is
    reused if it is certainly that of the inputs: the step passes the inputs of the batch once to ``forward`` or to a
    part of it, not compiled, and in full precision or in a half precision that the penalty tolerates
    (:meth:`fisher_reg.KLPenalty.tolerates`). A penalty with second derivatives can reuse it only without batch norm in
    training, and for the whole batch. Otherwise the penalty runs a forward of its own, which is logged once; it is in
    half precision too if the step is and the penalty tolerates it.

    Penalising a part of the batch costs a forward of that part and a backward pass to the inputs for the direction
    (their memory is then freed), and a forward and backward pass of the perturbed inputs; the logits are those of the
    step. If the network draws dropout masks, or the forward cannot be reused, the forward of the part is used instead.
    A model that takes only whole batches is penalised on whole batches.

    A penalty with a value or gradient that is not finite is left out of the loss, with a warning and a count. For this
    check the gradient is computed separately (see :mod:`fisher_reg.callbacks.gradients`), which costs the memory of a
    second gradient, and a backward pass if a penalty with second derivatives reuses the forward of the step. With
    sharded weights, or a hook on a weight, only the value is checked. With sharded weights a penalty that is not finite
    stops the training, since a process cannot leave it out alone.

    Activation checkpointing with ``use_reentrant=False`` works; a forward of the penalty's own with second derivatives
    or batch statistics still stores its activations.

    Before the first penalised step :func:`fisher_reg.check_model` is run on two inputs, or on eight with batch norm in
    training (not with sharded weights); a warning lists failed checks with their remedies.

    If inputs are mixed or augmented inside the step, the penalty still uses the inputs of the batch; augment in
    ``on_after_batch_transfer`` to penalise at the augmented inputs.

    Logged keys (mean over the penalised steps of the epoch). All of them are in ``trainer.callback_metrics``; those
    marked * also go to the loggers, and with ``detailed=True`` all do:

    - ``fisher/penalty`` *, ``fisher/penalty_weighted`` *: without and with its weight
    - ``fisher/penalty_weight``; ``fisher/penalty_skipped`` (sum over the steps)
    - ``fisher/penalty_gradient_ratio``: gradient norm of the added term divided by that of the loss, over the steps at
      which it is measured
    - ``fisher/lambda_control`` *: only with ``target_lambda``

    The keys of a second regularizer in the same Trainer end in ``_2``.

    Args:
        weight: Factor of the penalty, at least 0; with 0 the training step is unchanged. By default the
            ``default_weight`` of the penalty, or 0.1 for a penalty without one.
        penalty: :class:`KLPenalty` (default), another penalty of this package, or any callable
            ``penalty(model, inputs, generator=generator)`` that returns a scalar.
        every_n_steps: Penalises each n-th optimiser step, with n times the weight. By default each 10th; in a training
            of fewer than 1,000 steps more often, so that 100 are penalised.
        batch_fraction: Penalises a random part of the batch of this size, in (0, 1].
        warmup_steps: Optimiser steps over which the weight rises linearly from 0.
        schedule: How the weight changes during training: :class:`ConstantSchedule`, :class:`LinearSchedule` or
            :class:`CosineSchedule`.
        target_lambda: Target of the mean largest eigenvalue of the deployed function on the training inputs. The weight
            starts at ``weight`` and is adapted until the target is reached. Measured on up to 64 inputs at every second
            penalised step. Not together with a schedule or a warm-up.
        use_running_statistics: Penalises the deployed function (running statistics of batch norm, no dropout) instead
            of the one being trained.
        backward_pass: In manual optimisation, the index (from 0) of the ``self.manual_backward`` call of a training
            step to which the penalty is added. Required if there are several calls.
        max_gradient_ratio: Largest gradient norm of the added term, divided by that of the loss. A larger gradient is
            scaled down to it. Costs two more backward passes through the forward of the step, and with several
            processes two means of gradients, at each penalised step.
        gradient_ratio_every: Number of penalised steps between two measurements of that ratio, from the first step on;
            None for no measurement. Measuring does not change the training.
        inputs_fn: As in :class:`FisherMonitor`.
        logits_fn: As in :class:`FisherMonitor`.
        side_inputs_fn: As in :class:`FisherMonitor`.
        labels_fn: From a batch to class indices ``(B,)``, for a penalty that needs labels. By default the second item.
        detailed: Whether all keys go to the loggers.

    Example:
        >>> trainer = pl.Trainer(callbacks=[FisherRegularizer()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        weight: float | None = None,
        penalty: PenaltyFn | None = None,
        *,
        every_n_steps: int | None = None,
        batch_fraction: float = 0.5,
        warmup_steps: int = 0,
        schedule: Schedule = ConstantSchedule(),
        target_lambda: float | None = None,
        use_running_statistics: bool = False,
        backward_pass: int | None = None,
        max_gradient_ratio: float | None = None,
        gradient_ratio_every: int | None = 50,
        inputs_fn: InputsFn | None = None,
        logits_fn: LogitsFn | None = None,
        side_inputs_fn: SideInputsFn = no_side_inputs,
        labels_fn: LabelsFn | None = None,
        detailed: bool = False,
    ) -> None:
        # the default is not in the signature: jsonargparse would apply its fields to another penalty
        penalty = KLPenalty() if penalty is None else penalty
        PENALTY.check(penalty, self)
        weight = getattr(penalty, "default_weight", _DEFAULT_WEIGHT) if weight is None else weight
        SCHEDULE.check(schedule, self)
        INPUTS_FN.check(inputs_fn, self)
        LOGITS_FN.check(logits_fn, self)
        SIDE_INPUTS_FN.check(side_inputs_fn, self)
        LABELS_FN.check(labels_fn, self)
        if not 0 <= weight < math.inf:
            raise ValueError(f"FisherRegularizer needs a finite weight >= 0; got {weight}.")
        if not 0 < batch_fraction <= 1:
            raise ValueError(f"FisherRegularizer needs 0 < batch_fraction <= 1; got {batch_fraction}.")
        if warmup_steps < 0:
            raise ValueError(f"FisherRegularizer needs warmup_steps >= 0; got {warmup_steps}.")
        if backward_pass is not None and backward_pass < 0:
            raise ValueError(f"FisherRegularizer counts backward_pass from 0; got {backward_pass}.")
        check_at_least_one(self, every_n_steps=1 if every_n_steps is None else every_n_steps)
        if schedule.num_steps is not None and schedule.num_steps <= warmup_steps:
            raise ValueError(
                f"The warm-up of {warmup_steps} steps must end before the schedule of {schedule.num_steps} steps; "
                "shorten the warm-up or lengthen the schedule."
            )
        if target_lambda is not None:
            check_control(weight, warmup_steps, schedule)
        self.weight = weight
        self.penalty = penalty
        self.chosen_interval = every_n_steps
        self.every_n_steps = _INTERVAL if every_n_steps is None else every_n_steps
        self.batch_fraction = batch_fraction
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.control = None if target_lambda is None else LambdaControl(target_lambda, weight)
        self.use_running_statistics = use_running_statistics
        self.backward_pass = backward_pass
        self.place = Place(penalty, batch_fraction, use_running_statistics, logits_fn)
        self.inputs_fn = inputs_fn or find_inputs
        self.logits_fn = logits_fn
        self.side_inputs_fn = side_inputs_fn
        self.labels_fn = labels_fn or find_labels
        self.detailed = detailed
        self.num_skipped = 0
        self.guard = GradientGuard(max_gradient_ratio, gradient_ratio_every)
        self._num_schedule_steps = math.inf
        self._checked = False
        self._step: PenalisedStep | None = None

    def __repr__(self) -> str:
        shown = f"weight={self.weight:g}, penalty={short(self.penalty)}, every_n_steps={self.every_n_steps}"
        if not isinstance(self.schedule, ConstantSchedule):
            shown += f", schedule={short(self.schedule)}"
        if self.control is not None:
            shown += f", target_lambda={self.control.target:g}, weight_now={self.control.weight:.4g}"
        return f"FisherRegularizer({shown}" + (f", num_skipped={self.num_skipped})" if self.num_skipped else ")")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wrap the training step of the trainer, and reset the adapted state."""
        if stage != "fit" or self.weight == 0:
            return
        refuse_unseen_batch_norm(pl_module)
        self._checked = False
        self.place.reset()
        self.guard.reset()
        if self.control is not None:
            self.control.reset()
        self._step = PenalisedStep.of(trainer, pl_module)
        self._step.regularizers.append(self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Determine the lengths of the training and of the schedule.

        Raises:
            MisconfigurationException: If the schedule has the length of a training without a known end, or if the
                weights are sharded and the penalty needs all of them.
        """
        refuse_sharded(pl_module, self.penalty, self.differentiates_twice(), self.control is not None)
        if self.chosen_interval is None:
            self.every_n_steps = _interval(trainer.estimated_stepping_batches)
        if isinstance(self.schedule, ConstantSchedule):
            return
        num_steps = self.schedule.num_steps or trainer.estimated_stepping_batches
        if not 1 <= num_steps < math.inf:  # -1 for a loader without a length
            raise MisconfigurationException(
                f"{self.schedule} lasts as long as the training, which has no known end. Pass num_steps to the "
                "schedule, or max_steps to the Trainer."
            )
        self._num_schedule_steps = num_steps

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the training step."""
        self._unwrap()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the training step."""
        self._unwrap()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the adapted weight and the counts; everything else depends only on the optimiser step."""
        own: dict[str, float] = {"num_penalised": self.guard.num_penalised}
        if self.control is not None:
            own["weight"] = self.control.weight
        checkpoint.setdefault(_CHECKPOINT_KEY, {})[self._place(trainer)] = own

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the state of a checkpoint."""
        kept = checkpoint.get(_CHECKPOINT_KEY, {}).get(self._place(trainer), {})
        self.guard.num_penalised = int(kept.get("num_penalised", 0))
        if self.control is not None:
            self.control.weight = kept.get("weight", self.control.weight)

    def _place(self, trainer: pl.Trainer) -> str:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        same = [callback for callback in callbacks if isinstance(callback, FisherRegularizer)]
        return str(same.index(self))

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether this optimiser step is penalised."""
        return _optimiser_step(trainer) % self.every_n_steps == 0 and self.current_weight(trainer) > 0

    def current_weight(self, trainer: pl.Trainer) -> float:
        """Return the weight at this optimiser step."""
        if self.control is not None:
            return self.control.weight
        return self.weight_at(_optimiser_step(trainer))

    def weight_at(self, step: int) -> float:
        """Return the weight of the schedule at an optimiser step."""
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.weight * warmup * self.schedule.factor(min(1.0, step / self._num_schedule_steps))

    def differentiates_twice(self) -> bool:
        """Whether the step must run on kernels with second derivatives for its forward to be reused."""
        return self.place.differentiates_twice

    def can_reuse_forward(self, module: pl.LightningModule, side_inputs: SideInputs) -> bool:
        """Whether the penalty can reuse the forward of the step."""
        return self.place.can_reuse_forward(module, side_inputs)

    def half_precision(self, module: pl.LightningModule, inputs: Tensor) -> torch.dtype | None:
        """Return the half precision of the step if the penalty tolerates it; None for float32."""
        return self.place.half_precision(module, inputs)

    def check(self, module: pl.LightningModule, due: Due) -> None:
        """Run :func:`fisher_reg.check_model` once, before the first penalised step."""
        if self._checked or is_sharded(module):  # all processes must run the same number of forwards
            return
        self._checked = True
        report_check(
            self,
            logits_model(module, self.logits_fn),
            due.inputs,
            due.side_inputs,
            likelihood=getattr(self.penalty, "likelihood", Categorical()),
            is_training=not self.use_running_statistics,
        )

    def penalise(
        self, module: pl.LightningModule, due: Due, batch: object, seen: Observation, generator: torch.Generator
    ) -> Tensor | None:
        """Return the penalty with the batch statistics of the observed step; None if it is not finite."""
        options: dict[str, Any] = {"generator": generator}
        if isinstance(self.penalty, PointPenalty) and self.penalty.needs_labels:
            options["labels"] = self.labels_fn(batch)
        step = _optimiser_step(module.trainer)
        if self.control is not None and step % (_CONTROL_EVERY * self.every_n_steps) == 0:
            model = logits_model(module, self.logits_fn)
            self.control.measure(module, model, due.inputs, due.side_inputs, self.penalty, step)
        try:
            penalty = self.place.value(module, due, seen, options)
        except NonFiniteError as error:
            if is_sharded(module):
                raise  # the other processes would wait for the forward that this one skips
            self.skip(str(error))
            return None
        if not bool(torch.isfinite(penalty.detach())):
            self.skip(f"The penalty is {penalty.item()}.")
            return None
        return penalty

    def skip(self, reason: str) -> None:
        """Count a skipped penalty; warn at the 1st, 10th, 100th and so on."""
        self.num_skipped += 1
        if math.log10(self.num_skipped).is_integer():
            warnings.warn(
                f"FisherRegularizer left a penalty that is not finite out of the loss ({self.num_skipped} so far, "
                f"logged as fisher/penalty_skipped). {reason}",
                stacklevel=2,
            )

    def _unwrap(self) -> None:
        if self._step is not None:
            self._step.remove(self)
            self._step = None


_DEFAULT_WEIGHT = 0.1
_INTERVAL = 10  # optimiser steps
_NUM_PENALISED = 100  # at least; a transformer on digits was worse with 40 of 200 steps penalised than with 100
_CHECKPOINT_KEY = "FisherRegularizer"
_CONTROL_EVERY = 2  # penalised steps


def _optimiser_step(trainer: pl.Trainer) -> int:
    """Return the number of optimiser steps, counted once if there are several optimisers."""
    return trainer.global_step // max(1, len(trainer.optimizers))


def _interval(num_steps: float) -> int:
    """Return the steps between two penalties in a training of ``num_steps`` (-1 or infinity if unknown)."""
    if not 1 <= num_steps < math.inf:
        return _INTERVAL
    return min(_INTERVAL, max(1, int(num_steps) // _NUM_PENALISED))
