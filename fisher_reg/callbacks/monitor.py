"""Measure while training: the estimate and its bounds, each epoch, on a fixed probe."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from fisher_reg.bounds import UpperBound, fisher_bound
from fisher_reg.callbacks.base import Callback
from fisher_reg.callbacks.batch import (
    BoundFn,
    InputsFn,
    LogitsFn,
    SideInputsFn,
    check_at_least_one,
    find_inputs,
    logits_model,
    no_side_inputs,
    report_check,
)
from fisher_reg.errors import NoBoundError, NonFiniteError
from fisher_reg.estimate import fisher_spectral_norm, fisher_spectral_norm_and_trace
from fisher_reg.evaluation import SideInputs, select
from fisher_reg.figures import bound_versus_empirical
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.metrics import PerExampleValues, summarize
from fisher_reg.solvers import Solver
from fisher_reg.trace import Hutchinson

_TRACE = Hutchinson(num_samples=2)


class Bound(Protocol):
    """An upper bound of the Fisher spectral norm, such as :func:`fisher_reg.fisher_bound`."""

    def __call__(
        self, model: nn.Module, inputs: Tensor, *, likelihood: Likelihood, input_std: Tensor | None
    ) -> UpperBound:
        """Return the bound of ``model`` for inputs of the shape of ``inputs``, or at these."""


class FisherMonitor(Callback):
    """Measure the input-space Fisher matrix at the end of each validation, on a fixed probe, and log it.

    The probe is the first ``num_samples`` validation inputs (over all processes), taken once. The network is measured
    in evaluation behaviour and left as it was found; the measurement has no effect on training.

    Logged keys, in nats per squared input unit:

    - ``fisher/lambda_max_mean``, ``_median``, ``_p95``, ``_max``: largest eigenvalue over the probe
    - ``fisher/log10_lambda_max_max``, ``fisher/log10_lambda_max_median``: decimal logarithms
    - ``fisher/trace_mean``: unbiased; exact on the solver's search space, the rest by 2 random sign vectors, the same
      for all examples and each time: two passes more than the eigenvalue alone
    - ``fisher/wide_interval_share``: share of the examples whose interval of the largest eigenvalue is wider than the
      solver's tolerance; by default 5 % of the eigenvalue, at a failure probability of 2 %. Difference quotients enter
      with their measured error; ``solver=Lanczos(is_exact=True)`` takes none
    - ``fisher/bound_global``, ``fisher/log10_bound_global`` (finite also where the bound overflows), and
      ``fisher/log10_gap_global``: decades between the bound and the largest eigenvalue of the probe
    - ``fisher/bound_local_mean``, ``fisher/bound_blockwise_mean``: mean over the probe, for bounds at the inputs;
      ``fisher/log10_bound_local``, …: mean of the decimal logarithms, and ``fisher/log10_gap_local``, …: mean decades
      between the bound and the eigenvalue of each input. All these only in the epochs in which bounds are measured
    - ``fisher/seconds``: what the measurement took; ``fisher/seconds_bound_global``, …: its parts

    A logger that takes them (TensorBoard's) also gets the histogram ``fisher/log10_lambda_max`` (of the values above
    zero), the figure ``fisher/bound_versus_empirical`` (needs matplotlib), and charts of the log10 curves and of the
    gaps.

    Before the first measurement :func:`fisher_reg.check_model` is run on two inputs; what fails is warned of, with the
    remedy. A network without finite logits is warned of once and logged as NaN; a bound without a rule for some layer
    is warned of once and left out. None of these stops a training.

    Args:
        every_n_epochs: Measures at the first validation, then at the first one n epochs or more after the last that was
            measured, and whenever ``trainer.validate`` is called.
        num_samples: Size of the probe; it comes from the first validation loader.
        solver: As in :func:`fisher_reg.fisher_spectral_norm`, like ``likelihood`` and ``input_std``.
        bounds: Upper bounds to measure beside it, of :func:`fisher_reg.fisher_bound` (default),
            :func:`fisher_reg.local_fisher_bound`, :func:`fisher_reg.blockwise_fisher_bound`; ``()`` for none.
        bound_every_n_epochs: The bounds are measured at the first measurement, then at the first one n epochs or more
            after the last that had them, at the last one of a training whose length is known (from ``max_epochs`` or
            ``max_steps``), and whenever ``trainer.validate`` is called. A global bound takes a fifth of an epoch of the
            default recipe, so that the four bounds of its ten epochs take 8 % of them.
            TensorBoard draws no line of two points, so that fewer would show nothing of a short training.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        inputs_fn: ``inputs_fn(batch)`` returns the inputs ``(B, *S)``, where they cannot be told by themselves: a
            tensor, the first item of a tuple or list, or the only floating-point tensor ``(B, *S)`` of a mapping.
        logits_fn: ``logits_fn(pl_module, inputs)`` returns the logits ``(B, K)``, where ``pl_module(inputs)`` does not.
        side_inputs_fn: ``side_inputs_fn(batch)`` returns more arguments of the model (a mask, a class embedding): a
            tuple for ``pl_module(inputs, *side_inputs)``, or a mapping for keywords; ``logits_fn`` gets them likewise.
        probe: Inputs to measure on instead of validation data; needed without a validation loop.

    Attributes:
        history: A dictionary per measurement in ``fit``: ``epoch``, ``step``, the logged values; in checkpoints too.

    Example:
        >>> trainer = pl.Trainer(callbacks=[FisherMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        num_samples: int = 256,
        *,
        solver: Solver | None = None,
        bounds: Sequence[BoundFn] = (fisher_bound,),
        bound_every_n_epochs: int = 3,
        likelihood: Likelihood = Categorical(),
        input_std: Tensor | None = None,
        inputs_fn: InputsFn | None = None,
        logits_fn: LogitsFn | None = None,
        side_inputs_fn: SideInputsFn = no_side_inputs,
        probe: Tensor | None = None,
    ) -> None:
        check_at_least_one(
            self, every_n_epochs=every_n_epochs, num_samples=num_samples, bound_every_n_epochs=bound_every_n_epochs
        )
        self.every_n_epochs = every_n_epochs
        self.num_samples = num_samples
        self.solver = solver
        self.bounds = tuple(bounds)
        self.bound_every_n_epochs = bound_every_n_epochs
        self.likelihood = likelihood
        self.input_std = input_std
        self.inputs_fn = inputs_fn or find_inputs
        self.logits_fn = logits_fn
        self.side_inputs_fn = side_inputs_fn
        self.history: list[dict[str, float]] = []
        self._probe: list[tuple[Tensor, SideInputs]] = [] if probe is None else [(probe, None)]
        self._probe_is_given = probe is not None
        self._warned: set[str] = set()
        self._without_bound: set[Bound] = set()
        self._is_tried = self._is_checked = False
        self._takes_parts = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a fit that offers nothing to measure on; start a new probe, since the data may be new."""
        self._without_bound = set()
        self._is_tried = self._is_checked = False
        self._takes_parts = True
        if not self._probe_is_given:
            self._probe = []
        if stage == "fit" and trainer.current_epoch == 0:
            self.history = []
        if stage == "fit" and not self._probe_is_given and not trainer.enable_validation:
            raise MisconfigurationException(
                "FisherMonitor measures on validation data and this fit has none. Give the Trainer validation batches, "
                "or give FisherMonitor its inputs: FisherMonitor(probe=inputs)."
            )

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the first inputs of the first due validation as the probe.

        One input of the first batch is tried, in the sanity check where there is one, so that a setting that cannot
        work fails before training.
        """
        missing = math.ceil(self.num_samples / trainer.world_size) - sum(len(inputs) for inputs, _ in self._probe)
        if self._probe_is_given or missing <= 0 or dataloader_idx > 0:
            return
        inputs, side_inputs = self.inputs_fn(batch), self.side_inputs_fn(batch)
        is_due = self._is_due(trainer)
        if (trainer.sanity_checking or is_due) and not self._is_tried:
            self._is_tried = True
            self._try(pl_module, inputs, side_inputs)
        if is_due:
            with torch.inference_mode(False):
                index = slice(missing) if self._takes_parts else slice(None)
                self._probe.append(_own(inputs, side_inputs, index))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        if self._is_due(trainer):
            self._measure_and_log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log where no validation does it."""
        if not trainer.enable_validation and self._is_due(trainer):
            self._measure_and_log(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Keep the history in checkpoints, so that the curves go on after a resume."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history back."""
        self.history = list(state_dict["history"])

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if trainer.state.fn == "validate":
            return True
        waited = not self.history or trainer.current_epoch - self.history[-1]["epoch"] >= self.every_n_epochs
        return waited and not trainer.sanity_checking

    def _bounds_are_due(self, trainer: pl.Trainer) -> bool:
        with_bounds = [entry["epoch"] for entry in self.history if any("seconds_bound" in key for key in entry)]
        if trainer.state.fn == "validate" or not with_bounds or self._is_last(trainer):
            return True
        return trainer.current_epoch - with_bounds[-1] >= self.bound_every_n_epochs

    def _is_last(self, trainer: pl.Trainer) -> bool:
        """Say whether no later measurement of this fit is to come, as far as is known beforehand."""
        if 0 <= trainer.max_steps <= trainer.global_step:
            return True
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            return False
        interval = trainer.check_val_every_n_epoch if trainer.enable_validation else None
        interval = interval or 1
        ends = trainer.current_epoch + self.every_n_epochs + 1  # of the epoch that may be the next
        return math.ceil(ends / interval) * interval > trainer.max_epochs

    def _measure_and_log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        begin = time.perf_counter()
        model = logits_model(pl_module, self.logits_fn)
        probe = move_data_to_device(self._probe, pl_module.device)
        if self._probe_is_given:
            probe = trainer.precision_plugin.convert_input(probe)  # as every batch
        if probe:
            self._check(model, *probe[0])
        eigenvalues, logged = self._estimate(model, probe, pl_module.device)
        for bound in self._bounds_of(probe) if self._bounds_are_due(trainer) else []:
            logged |= self._bound(bound, model, torch.cat([inputs for inputs, _ in probe]), eigenvalues)
        logged["fisher/seconds"] = time.perf_counter() - begin
        pl_module.log_dict(logged, sync_dist=True, batch_size=1)
        if trainer.state.fn == "validate":
            return
        self.history.append({"epoch": trainer.current_epoch, "step": trainer.global_step} | logged)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                self._draw(getattr(logger, "experiment", None), eigenvalues, trainer.global_step)

    def _bounds_of(self, probe: list[tuple[Tensor, SideInputs]]) -> list[Bound]:
        """Return the bounds that this network has, as far as is known."""
        if self.bounds and any(side_inputs is not None for _, side_inputs in probe):
            self._warn_once("side inputs", "FisherMonitor leaves out the bounds: no bound is known with side inputs.")
            return []
        return [bound for bound in self.bounds if bound not in self._without_bound]

    def _try(self, pl_module: pl.LightningModule, inputs: Tensor, side_inputs: SideInputs) -> None:
        """Measure one input, or the batch where the model takes nothing less, and check the model once."""
        model = logits_model(pl_module, self.logits_fn)
        options: dict[str, Any] = {"solver": self.solver, "likelihood": self.likelihood, "input_std": self.input_std}
        one = select(side_inputs, slice(1), len(inputs))
        with suppress(NonFiniteError):
            try:
                fisher_spectral_norm(model, inputs[:1], side_inputs=one, **options)
            except NonFiniteError:
                raise
            except Exception:  # whatever the user's forward raises for a batch of one
                fisher_spectral_norm(model, inputs, side_inputs=side_inputs, **options)
                self._takes_parts = False
        self._check(model, inputs, side_inputs)

    def _check(self, model: nn.Module, inputs: Tensor, side_inputs: SideInputs) -> None:
        if not self._is_checked:
            self._is_checked = True
            report_check(self, model, inputs, side_inputs, likelihood=self.likelihood, is_training=False)

    def _estimate(
        self, model: nn.Module, probe: list[tuple[Tensor, SideInputs]], device: torch.device
    ) -> tuple[Tensor, dict[str, float]]:
        metrics = {name: PerExampleValues().to(device) for name in ("eigenvalue", "trace", "is_wide")}
        options: dict[str, Any] = {"solver": self.solver, "likelihood": self.likelihood, "input_std": self.input_std}
        try:
            for inputs, side_inputs in probe:
                result, trace = fisher_spectral_norm_and_trace(
                    model, inputs, side_inputs=side_inputs, estimator=_TRACE, **options
                )
                metrics["eigenvalue"].update(result.eigenvalue)
                metrics["trace"].update(trace)
                metrics["is_wide"].update((~result.converged).to(trace))
        except NonFiniteError as error:
            for metric in metrics.values():
                metric.reset()
            self._warn_once("logits", f"FisherMonitor logs NaN for an epoch. {error}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The ``compute`` method")  # told already, if nothing was measured
            eigenvalues, traces, are_wide = (metric.compute() for metric in metrics.values())
        logged = {f"fisher/lambda_max_{name}": float(value) for name, value in summarize(eigenvalues).items()}
        for name in ("max", "median"):
            logged[f"fisher/log10_lambda_max_{name}"] = _log10(logged[f"fisher/lambda_max_{name}"])
        logged["fisher/trace_mean"] = float(traces.mean())
        logged["fisher/wide_interval_share"] = float(are_wide.mean())
        return eigenvalues, logged

    def _bound(self, bound: Bound, model: nn.Module, inputs: Tensor, eigenvalues: Tensor) -> dict[str, float]:
        begin = time.perf_counter()
        try:
            upper = bound(model, inputs, likelihood=self.likelihood, input_std=self.input_std)
        except NoBoundError as error:
            self._warn_once(str(bound), f"FisherMonitor leaves out a bound that this network does not have. {error}")
            self._without_bound.add(bound)
            return {}
        except NonFiniteError as error:
            self._warn_once("weights", f"FisherMonitor logs no bound for an epoch. {error}")
            return {}
        decades = eigenvalues.double().log10()
        if isinstance(upper.log10_value, Tensor):
            mean = {f"fisher/bound_{upper.level}_mean": float(upper.value.mean())}
            log10_value, log10_estimate = float(upper.log10_value.mean()), float(decades[decades.isfinite()].mean())
        else:
            mean = {f"fisher/bound_{upper.level}": upper.value}
            log10_value, log10_estimate = upper.log10_value, float(decades.max()) if len(decades) else math.nan
        return mean | {
            f"fisher/log10_bound_{upper.level}": log10_value,
            f"fisher/log10_gap_{upper.level}": log10_value - log10_estimate,
            f"fisher/seconds_bound_{upper.level}": time.perf_counter() - begin,
        }

    def _draw(self, experiment: Any, eigenvalues: Tensor, step: int) -> None:
        if not all(hasattr(experiment, name) for name in ("add_histogram", "add_figure", "add_custom_scalars")):
            return
        decades = eigenvalues.log10()
        decades = decades[torch.isfinite(decades)]
        if decades.numel():
            experiment.add_histogram("fisher/log10_lambda_max", decades, step)
        if find_spec("matplotlib") is None:
            self._warn_once("matplotlib", "FisherMonitor draws no figure, since matplotlib is not installed.")
        else:
            experiment.add_figure("fisher/bound_versus_empirical", bound_versus_empirical(self.history), step)
        keys = dict.fromkeys(key for entry in self.history for key in entry)  # bounds are not in each
        curves = [key for key in keys if "log10_bound" in key or "log10_lambda" in key]
        charts = {"bound versus empirical (log10)": ["Multiline", curves]}
        if gaps := [key for key in keys if "log10_gap" in key]:
            charts["gap in decades"] = ["Multiline", gaps]
        experiment.add_custom_scalars({"fisher": charts})

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(message)


def _own(inputs: Tensor, side_inputs: SideInputs, index: slice) -> tuple[Tensor, SideInputs]:
    """Return copies on the CPU of some of the examples."""
    chosen = inputs[index], select(side_inputs, index, len(inputs))
    own: tuple[Tensor, SideInputs] = apply_to_collection(chosen, Tensor, lambda tensor: tensor.detach().cpu().clone())
    return own


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan
