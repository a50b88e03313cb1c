"""Measure the estimate and its bounds on a fixed probe during training, and log them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import count, islice
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from fisher_reg.arguments import (
    INPUTS_FN,
    LIKELIHOOD,
    LOGITS_FN,
    SIDE_INPUTS_FN,
    SOLVER,
    check_bounds,
    check_memory_budget,
)
from fisher_reg.bounds import fisher_bound
from fisher_reg.callbacks.base import Callback
from fisher_reg.callbacks.batch import (
    BoundFn,
    InputsFn,
    LogitsFn,
    SideInputsFn,
    check_at_least_one,
    differences,
    find_inputs,
    logits_model,
    no_side_inputs,
    report_check,
)
from fisher_reg.callbacks.measuring import (
    Level,
    Subject,
    Values,
    exchange,
    measure_bound,
    measure_probe,
    messages,
    numbers,
    with_names,
)
from fisher_reg.callbacks.pictures import draw, send_numbers, takes_pictures
from fisher_reg.callbacks.probe import Part, Probe, Share, own
from fisher_reg.callbacks.regularizer import FisherRegularizer
from fisher_reg.callbacks.rhythm import Rhythm, refuse_late, watched_names
from fisher_reg.callbacks.single_step import single_step_penalty
from fisher_reg.callbacks.trial import takes_parts
from fisher_reg.evaluation import InputStd, SideInputs, check_input_std, check_inputs
from fisher_reg.geometry import GEOMETRY, L2, Geometry, LInf
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.solvers import Solver


class FisherMonitor(Callback):
    """Measure the input-space Fisher matrix at the end of each validation, on a fixed probe, and log it.

    The probe is the first ``num_samples`` validation inputs over all processes. It is collected once, in the first
    validation that is measured. The network is measured in evaluation mode and not modified; the measurement has no
    effect on training. ``trainer.validate`` and ``trainer.test`` measure too, each on a probe of its own data, under
    the same keys.

    Logged keys, in nats per squared input unit. All are in ``history`` and in ``trainer.callback_metrics``; those
    marked * also go to the loggers (with ``detailed=True`` all of them):

    - ``fisher/lambda_max_mean`` *, ``_median``, ``_p95`` *, ``_max``: largest eigenvalue over the probe
    - ``fisher/log10_lambda_max_max`` *, ``fisher/log10_lambda_max_median``: decimal logarithms
    - ``fisher/lambda_linf_mean`` *, ``_median``, ``_p95`` *, ``_max``, ``fisher/log10_lambda_linf_max`` *,
      ``fisher/log10_lambda_linf_median``: the same statistics of :func:`fisher_reg.fisher_linf_norm`, in addition to
      those of the eigenvalue; only with ``geometry=LInf()``
    - ``fisher/bound_global`` *, ``fisher/log10_bound_global`` * (finite also where the bound overflows), and
      ``fisher/log10_gap_global`` *: log10 of the ratio of the bound to the largest eigenvalue of the probe. For inputs
      of several shapes it is the largest bound
    - ``fisher/bound_local_mean`` *, ``fisher/bound_blockwise_mean`` *: mean over the probe, for bounds at the inputs;
      ``fisher/log10_bound_local`` *, …: mean of the decimal logarithms, and ``fisher/log10_gap_local`` *, …: mean log10
      of the ratio of bound to eigenvalue, over the inputs where both are finite. Only when bounds are measured
    - ``fisher/seconds``: duration of the measurement with its figures; ``fisher/seconds_bound_global``, …: its parts
    - ``fisher/trace_mean``: unbiased; exact on the solver's search space (with up to 6 classes the whole space), the
      rest by 2 random sign vectors, the same for all examples and measurements: two passes more than the eigenvalue
    - ``fisher/wide_interval_share``: share of the examples whose interval of the largest eigenvalue is wider than the
      solver's tolerance; by default 5 % of the eigenvalue, at a failure probability of 2 %. The measured error of
      difference quotients is included; ``solver=Lanczos(is_exact=True)`` uses none
    - ``fisher/kl_ratio``: median of :func:`fisher_reg.fisher_kl_ratio`, for one more forward. A value far below 1 means
      gradient masking: the eigenvalue does not predict the effect of an attack. One warning is given
    - ``fisher/single_step_ratio``, if a :class:`FisherRegularizer` of this Trainer has a :class:`KLPenalty`: the sum of
      the divergences after its step, divided by that of the largest ones that several steps in the same ball find
      (:func:`fisher_reg.single_step_ratio`), over the first 64 examples. If it is below 0.25 and several steps reach
      0.05 nats, the network may be flat only at the end of the single step (catastrophic overfitting). One warning is
      given
    - ``fisher/num_left_out``: number of examples of the probe that could not be measured (NaN, or an exception in
      forward); no other number includes them

    Loggers that support images (TensorBoard, Weights & Biases, MLflow, Comet) also get the figures
    ``fisher/bound_versus_empirical`` (when bounds are measured) and, for image inputs, ``fisher/sensitive_examples``
    with their top eigenvectors (both need matplotlib), the histogram ``fisher/log10_lambda_max`` (of the values above
    zero; not for MLflow), and TensorBoard charts of the log10 curves and of the gaps. Figures have the steps of the
    scalars; if one batch takes several optimiser steps, the last of them.

    Under DDP all processes log the same numbers, equal to those of the same examples on one process: examples that a
    :class:`~torch.utils.data.DistributedSampler` repeats count once. Failures of any process are reported by the
    process of rank 0.

    Before the first measurement :func:`fisher_reg.check_model` is run on two inputs; a warning lists failed checks with
    their remedies. Examples without finite logits and bounds that raise an error are left out, with one warning. None
    of these stops the training. Invalid settings raise an error before training: one input is measured in the sanity
    check, or before it if ``probe`` is given.

    If another callback (:class:`~pytorch_lightning.callbacks.EarlyStopping`, a checkpoint) or a learning-rate scheduler
    monitors one of the keys, every validation is measured (without validation the end of every epoch), for every
    setting of ``every_n_epochs``, so that none of them uses an old value.

    Args:
        every_n_epochs: 1 measures at every validation, also if an epoch has several; n measures at the first one, then
            at the first one that is n epochs or more after the last measurement.
        num_samples: Size of the probe, from the first validation loader; None for all its examples. The inputs are kept
            on the CPU; the results are a few numbers per example.
        every_n_steps: Instead of epochs: measures n optimiser steps or more after the last measurement, also between
            validations; first at the first validation, or before it with ``probe``. Without ``probe`` a resumed
            training measures from its first validation on, which collects the probe.
        solver: As in :func:`fisher_reg.fisher_spectral_norm`, like ``likelihood`` and ``input_std``.
        bounds: Upper bounds to measure: functions among :func:`fisher_reg.fisher_bound` (default),
            :func:`fisher_reg.local_fisher_bound`, :func:`fisher_reg.blockwise_fisher_bound`; ``()`` for none.
        bound_every_n_epochs: The bounds are measured at the first measurement, then at the first one that is n epochs
            or more after the last with bounds, at the last one of a training of known length (from ``max_epochs`` or
            ``max_steps``), and by ``validate`` and ``test``. A global bound takes a fifth of an epoch of the default
            recipe, so that the four bounds of its ten epochs take 8 % of their time. With fewer bounds TensorBoard
            would draw no line for a short training, since a line needs more than two points.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        geometry: :class:`LInf` also measures the largest value of the Fisher form over perturbations with entries of at
            most 1, a lower estimate. It costs the passes of :func:`fisher_reg.fisher_linf_norm`: up to ten classes
            ``K`` backward passes and one forward-mode pass, else about a dozen and three.
        memory_budget: Largest number of bytes of graph and vectors, as in :func:`fisher_reg.fisher_spectral_norm`. It
            does not limit the bounds and ``fisher/single_step_ratio``.
        inputs_fn: ``inputs_fn(batch)`` returns the inputs ``(B, *S)``. By default they are the batch itself, the first
            item of a tuple or list, or the only floating-point tensor ``(B, *S)`` of a mapping. It is called once per
            batch. For token ids return zeros of the shape of the embeddings, return the ids in ``side_inputs_fn``, and
            let ``logits_fn`` add the zeros to the current embeddings.
        logits_fn: ``logits_fn(pl_module, inputs)`` returns the logits ``(B, K)``, if ``pl_module(inputs)`` does not.
        side_inputs_fn: ``side_inputs_fn(batch)`` returns more arguments of the model (a mask, a class embedding): a
            tuple for ``pl_module(inputs, *side_inputs)``, or a mapping for keywords. They are passed to ``logits_fn``
            in the same way.
        probe: Inputs to measure on instead of validation data, the same on all processes; required without a validation
            loop. With ``inputs_fn`` it is a batch, to which ``inputs_fn`` is applied.
        prefix: First part of all keys. A second monitor with the same prefix logs under ``fisher_2/…``.
        detailed: Whether all keys go to the loggers.
        prog_bar: Whether ``fisher/lambda_max_mean`` is shown in the progress bar.

    Attributes:
        history: A dictionary per measurement in ``fit``: ``epoch``, ``step``, the logged values; in checkpoints too.

    Example:
        >>> trainer = pl.Trainer(callbacks=[FisherMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        num_samples: int | None = 256,
        *,
        every_n_steps: int | None = None,
        solver: Solver | None = None,
        bounds: Sequence[BoundFn] = (fisher_bound,),
        bound_every_n_epochs: int = 3,
        likelihood: Likelihood = Categorical(),
        input_std: InputStd | None = None,
        inputs_fn: InputsFn | None = None,
        logits_fn: LogitsFn | None = None,
        side_inputs_fn: SideInputsFn = no_side_inputs,
        probe: Any = None,
        prefix: str = "fisher",
        detailed: bool = False,
        prog_bar: bool = False,
        geometry: Geometry = L2(),
        memory_budget: int | None = None,
    ) -> None:
        check_at_least_one(self, bound_every_n_epochs=bound_every_n_epochs)
        if num_samples is not None:
            check_at_least_one(self, num_samples=num_samples)
        SOLVER.check(solver, self)
        LIKELIHOOD.check(likelihood, self)
        check_input_std(input_std)
        _check_geometry(geometry)
        check_memory_budget(memory_budget, self)
        bounds = tuple(bounds) if isinstance(bounds, Iterator) else bounds
        check_bounds(bounds, self)
        INPUTS_FN.check(inputs_fn, self)
        LOGITS_FN.check(logits_fn, self)
        SIDE_INPUTS_FN.check(side_inputs_fn, self)
        self.rhythm = Rhythm(every_n_epochs, every_n_steps)
        self.num_samples = num_samples
        self.solver = solver
        self.bounds = tuple(bounds)
        self.bound_every_n_epochs = bound_every_n_epochs
        self.likelihood = likelihood
        self.input_std = input_std
        self.geometry = geometry
        self.memory_budget = memory_budget
        self.inputs_fn = inputs_fn or find_inputs
        self.logits_fn = logits_fn
        self.side_inputs_fn = side_inputs_fn
        self.prefix = prefix
        self.detailed = detailed
        self.prog_bar = prog_bar
        self.given = None if probe is None else self._given(probe, inputs_fn)
        self.history: list[dict[str, Any]] = []
        self._warned: set[str] = set()
        self._reset()

    def __repr__(self) -> str:
        samples = "all" if self.given is None and self.num_samples is None else self.num_samples
        samples = samples if self.given is None else len(self.given[0])
        last = ""
        if self.history:
            last = f", lambda_max_mean={self.history[-1].get(self._key('lambda_max_mean'), math.nan):.4g}"
        return f"FisherMonitor({self.rhythm}, num_samples={samples}{last})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise an error for a fit without data to measure on; start a new probe, since the data may be new."""
        self._reset()
        self._keys_begin_with = self._own_prefix(trainer)
        if stage != "fit":
            return
        if trainer.current_epoch == 0:
            self.history = []
        if not trainer.enable_validation:
            if self.given is None:
                raise MisconfigurationException(
                    "FisherMonitor measures on validation data and this fit has none. Give the Trainer validation "
                    "batches, or pass inputs to FisherMonitor: FisherMonitor(probe=inputs)."
                )
            refuse_late(self, trainer, self._keys_begin_with)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure one input of a given probe before training, and compare the settings with the regularizer's."""
        self._take_given(trainer, pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FisherRegularizer):
                for name, message in differences(self, callback.penalty).items():
                    self._warn_once(name, message)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure one input of a given probe."""
        self._take_given(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure one input of a given probe."""
        self._take_given(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the first inputs of the first measured validation as the probe.

        One input of the first batch is measured, in the sanity check if there is one, so that an invalid setting fails
        before training.
        """
        if not self._probe.is_complete and dataloader_idx == 0:
            self._take(trainer, pl_module, batch, trainer.val_dataloaders)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the first inputs of the test as the probe."""
        if not self._probe.is_complete and dataloader_idx == 0:
            self._take(trainer, pl_module, batch, trainer.test_dataloaders)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        if trainer.sanity_checking:
            return
        if self._is_due(trainer, is_validation=True):
            self._measure_and_log(trainer, pl_module)
        if self.rhythm.steps is not None:
            self._probe.is_complete = True

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        self._measure_and_log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log between validations, if ``every_n_steps`` is given."""
        if self.rhythm.steps is not None and self._probe.is_complete and self._is_due(trainer):
            self._measure_and_log(trainer, pl_module, between_validations=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log in a fit without validation."""
        if trainer.enable_validation:
            return
        is_old = not self.history or self.history[-1]["step"] < trainer.global_step
        counts_epochs = self.rhythm.steps is None
        if (counts_epochs and self._is_due(trainer)) or (is_old and self._is_watched(trainer)):
            self._measure_and_log(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if nothing was measured."""
        if not self.history:
            self._warn_once("nothing", "has measured nothing, since no validation was completed in this fit.")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the history, so that curves and the measurement interval continue after a resume."""
        checkpoint.setdefault(_CHECKPOINT_KEY, {})[self._keys_begin_with] = list(self.history)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the history."""
        kept = checkpoint.get(_CHECKPOINT_KEY, {}).get(self._keys_begin_with)
        if kept is not None:
            self.history = list(kept)

    def _reset(self) -> None:
        """Reset the state that depends on the network and the data."""
        self._probe = Probe(self.num_samples)
        self._keys_begin_with = self.prefix
        self._levels: dict[int, Level] = {}
        self._without_bound: set[int] = set()
        self._is_tried = False
        self._takes_parts = True

    def _key(self, name: str) -> str:
        return f"{self._keys_begin_with}/{name}"

    def _own_prefix(self, trainer: pl.Trainer) -> str:
        """Return the prefix, with a number if an earlier monitor has the same one."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        prefixes = [one.prefix for one in callbacks if isinstance(one, FisherMonitor)]
        same = [one for one in callbacks if isinstance(one, FisherMonitor) and one.prefix == self.prefix]
        place = same.index(self) if self in same else 0
        numbered = (f"{self.prefix}_{number}" for number in count(2))
        free = (name for name in numbered if name not in prefixes)  # another monitor may be called fisher_2
        return next(islice(free, place - 1, None)) if place else self.prefix

    def _given(self, probe: Any, inputs_fn: InputsFn | None) -> tuple[Tensor, SideInputs]:
        """Return inputs and side inputs of a given probe.

        Raises:
            ValueError: If the inputs are not a non-empty floating-point batch.
        """
        if inputs_fn is None and not isinstance(probe, Tensor):
            raise ValueError(
                f"FisherMonitor(probe=...) takes only the inputs, a floating-point tensor (B, *S); got "
                f"{type(probe).__name__}. Pass batch[0], or select them with inputs_fn=lambda batch: batch[0]."
            )
        inputs = probe if inputs_fn is None else inputs_fn(probe)
        check_inputs(inputs)
        taken: tuple[Tensor, SideInputs] = own((inputs, self.side_inputs_fn(probe)))
        return taken

    def _take_given(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cast a given probe like a batch, select the share of this process, and measure one input."""
        if self.given is None or self._is_tried:
            return
        self._is_tried = True
        inputs, side_inputs = trainer.precision_plugin.convert_input(self.given)
        self._probe = Probe.of(inputs, side_inputs, Share(trainer.global_rank, trainer.world_size))
        self._try(pl_module, *move_data_to_device((inputs, side_inputs), pl_module.device))

    def _take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, loaders: Any) -> None:
        inputs, side_inputs = self.inputs_fn(batch), self.side_inputs_fn(batch)
        is_due = self._is_due(trainer, is_validation=True)
        if (trainer.sanity_checking or is_due) and not self._is_tried:
            self._is_tried = True
            self._try(pl_module, inputs, side_inputs)
        counts_steps = self.rhythm.steps is not None and not trainer.sanity_checking
        if is_due or counts_steps:  # after a resume the next measurement may come before the next validation
            self._probe.share = Share.of(trainer.global_rank, trainer.world_size, loaders)
            self._probe.add(inputs, side_inputs, self._takes_parts)

    def _is_due(self, trainer: pl.Trainer, *, is_validation: bool = False) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn in ("validate", "test") or (is_validation and self._is_watched(trainer)):
            return True
        last = self.history[-1] if self.history else None
        return self.rhythm.is_due(trainer.current_epoch, trainer.global_step, last)

    def _is_watched(self, trainer: pl.Trainer) -> bool:
        return bool(watched_names(trainer, self._keys_begin_with))

    def _bounds_are_due(self, trainer: pl.Trainer) -> bool:
        if trainer.state.fn in ("validate", "test") or self.rhythm.is_last(trainer):
            return True
        if any("bound" in name or "gap" in name for name in watched_names(trainer, self._keys_begin_with)):
            return True
        with_bounds = [entry["epoch"] for entry in self.history if any("seconds_bound" in key for key in entry)]
        return not with_bounds or trainer.current_epoch - with_bounds[-1] >= self.bound_every_n_epochs

    def _measure_and_log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, between_validations: bool = False
    ) -> None:
        begin = time.perf_counter()
        values = exchange(self._measured(trainer, pl_module), self._probe.share.end, self._probe.num_samples)
        self._learn(values)
        logged = {self._key(name): value for name, value in numbers(values, self._levels).items()}
        entry: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step} | logged
        if trainer.state.fn == "fit":
            self.history.append(entry)
            if trainer.is_global_zero:
                self._draw(trainer, values)
        logged[self._key("seconds")] = entry[self._key("seconds")] = time.perf_counter() - begin
        self._log(trainer, pl_module, logged, between_validations)

    def _measured(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Values:
        """Measure the share of this process; raises no error, since the other processes wait for the exchange."""
        subject = Subject(
            logits_model(pl_module, self.logits_fn),
            self._probe.parts,
            pl_module.device,
            self._takes_parts,
            any(takes_pictures(logger) for logger in trainer.loggers),
            self.solver,
            self.likelihood,
            self.input_std,
            self.geometry,
            single_step_penalty(trainer.callbacks),  # type: ignore[attr-defined]
            self.memory_budget,
        )
        values = measure_probe(subject)
        if not self.bounds or not self._bounds_are_due(trainer):
            return values
        if any(part.side_inputs is not None for part in subject.parts):
            values.troubles["side inputs"] = "leaves out the bounds: no bound is known with side inputs."
            values.without_bound |= set(range(len(self.bounds)))
        elif subject.parts:
            for number in set(range(len(self.bounds))) - self._without_bound:
                measure_bound(values, number, self.bounds[number], subject)
        return values

    def _learn(self, values: Values) -> None:
        """Store the exchanged facts about the probe and the bounds, and warn of failures."""
        if not self._probe.is_complete:
            self._probe.is_complete = True
            if self.num_samples is not None and len(values.places) < self.num_samples:
                rank_zero_info(
                    f"FisherMonitor measures on the {len(values.places)} examples that it has found; num_samples is "
                    f"{self.num_samples}."
                )
        self._without_bound |= values.without_bound
        self._levels = with_names(self._levels, values.levels)
        for kind, message in messages(values).items():
            self._warn_once(kind, message)

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, logged: dict[str, float], between_validations: bool
    ) -> None:
        dtype = torch.float32 if pl_module.device.type == "mps" else torch.float64
        when: dict[str, Any] = {"on_step": True, "on_epoch": False} if between_validations else {}
        for key, value in logged.items():
            pl_module.log(
                key,
                torch.tensor(value, dtype=dtype, device=pl_module.device),
                logger=None if self._is_shown(key) and not between_validations else False,
                prog_bar=self.prog_bar and key == self._key("lambda_max_mean"),
                sync_dist=True,  # equal on all processes already
                batch_size=1,
                **when,
            )
        if between_validations:  # Lightning would drop these, except at a multiple of log_every_n_steps
            shown = {key: value for key, value in logged.items() if self._is_shown(key)}
            send_numbers(trainer, shown)

    def _is_shown(self, key: str) -> bool:
        name = key.removeprefix(self._key(""))
        return self.detailed or name in _SHOWN or name.startswith(_SHOWN_OF_A_BOUND)

    def _try(self, pl_module: pl.LightningModule, inputs: Tensor, side_inputs: SideInputs) -> None:
        """Measure one input, or the batch if the model takes only whole batches, and check the model."""
        model = logits_model(pl_module, self.logits_fn)
        options: dict[str, Any] = {"solver": self.solver, "likelihood": self.likelihood, "input_std": self.input_std}
        self._takes_parts = takes_parts(model, Part(inputs, side_inputs, torch.arange(len(inputs))), options)
        report_check(self, model, inputs, side_inputs, likelihood=self.likelihood, is_training=False)

    def _draw(self, trainer: pl.Trainer, values: Values) -> None:
        loggers = [logger for logger in trainer.loggers if takes_pictures(logger)]
        if loggers and find_spec("matplotlib") is None:
            self._warn_once("matplotlib", "draws no figure, since matplotlib is not installed.")
        step = max(trainer.global_step - 1, 0)  # Lightning sends scalars at the index of the last step
        for logger in loggers:
            try:
                draw(logger, values, self.history, self._keys_begin_with, step)
            except Exception as error:  # the client of a logger may raise any error
                kind = type(logger).__name__
                self._warn_once(kind, f"draws nothing on {kind}, which raised {type(error).__name__}: {error}")

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(f"FisherMonitor {message}")


def _check_geometry(geometry: Geometry) -> None:
    GEOMETRY.check(geometry, "FisherMonitor")
    if not isinstance(geometry, L2 | LInf):
        raise ValueError(f"FisherMonitor measures with geometry=L2() or LInf(); got {geometry}. Write geometry=LInf().")


_CHECKPOINT_KEY = "FisherMonitor"
_SHOWN = {f"{name}_{which}" for name in ("lambda_max", "lambda_linf") for which in ("mean", "p95")}
_SHOWN |= {"log10_lambda_max_max", "log10_lambda_linf_max"}
_SHOWN_OF_A_BOUND = ("bound_", "log10_bound_", "log10_gap_")
