"""The estimates as torchmetrics, for any training or evaluation loop.

Public: all of ``__all__``.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fisher_reg.arguments import LIKELIHOOD, METRIC_REDUCTION, SOLVER, TRACE_ESTIMATOR, check_memory_budget
from fisher_reg.estimate import fisher_spectral_norm, fisher_trace
from fisher_reg.evaluation import InputStd, LogitsFunction, SideInputs, check_input_std
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.printing import examples, short
from fisher_reg.solvers import Solver, TraceEstimator
from fisher_reg.summary import summarize

__all__ = ["FisherSpectralNorm", "FisherTrace", "PerExampleValues", "Reduction", "summarize"]

Reduction = Callable[[Tensor], Any]


class _PerExampleMetric(Metric):
    """Collects one value per example, over batches and processes, and reduces all values together.

    Metrics of a collection share their updates if their states are equal. A digest of the settings is therefore a
    state too.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    values: list[Tensor] | Tensor
    settings: Tensor

    def __init__(self, reduction: Reduction | None, likelihood: Likelihood, input_std: InputStd | None, **kwargs: Any):
        super().__init__(**kwargs)
        self.reduction = reduction
        self.likelihood = likelihood
        METRIC_REDUCTION.check(reduction, self)
        LIKELIHOOD.check(likelihood, self)
        check_input_std(input_std)
        self.input_std = input_std
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("settings", default=torch.zeros(_DIGEST_SIZE, dtype=torch.long), dist_reduce_fx="max")

    def _append(self, values: Tensor) -> None:
        assert isinstance(self.values, list)
        self.values.append(values)
        method = getattr(self, "solver", None), getattr(self, "estimator", None)
        with torch.inference_mode(False):
            digest = _digest(type(self).__qualname__, *method, self.likelihood, self.input_std)
            self.settings = torch.tensor(digest, device=self.settings.device)

    def extra_repr(self) -> str:
        """Return the text of ``repr``: the reduction, and the number of examples seen by this process."""
        count = sum(len(values) for values in self.values) if isinstance(self.values, list) else len(self.values)
        return f"reduction={short(self.reduction)}, {examples(count)}"

    def reset(self) -> None:
        """Remove all examples."""
        self.values = list(self.values)  # torchmetrics clears the old list, which the wrapper Running may hold
        super().reset()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the values of another metric, or of its states.

        Raises:
            ValueError: If they were computed with another likelihood, solver, estimator or input normalisation.
        """
        states = incoming_state if isinstance(incoming_state, dict) else vars(incoming_state)
        other = states.get("settings")
        own = self.settings
        if other is not None and bool(own.any()) and bool(other.any()) and not torch.equal(own, other.to(own)):
            raise ValueError(
                f"The values of two {type(self).__name__} with different settings (likelihood, solver, estimator or "
                "input_std) are different quantities. Merge metrics with equal settings only."
            )
        super().merge_state(incoming_state)

    def compute(self) -> Any:
        """Return the reduction of the values of all examples, or, without a reduction, the values ``(N,)``.

        Without examples every tensor and number in the result is NaN, for every reduction.
        """
        values = dim_zero_cat(self.values) if len(self.values) else torch.zeros(0, device=self.device)
        if self.reduction is None:
            return values
        return self.reduction(values) if values.numel() else _nothing(self.reduction, values)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or more values, like every metric of torchmetrics; needs matplotlib.

        Args:
            val: A result of :meth:`compute` or ``forward``, or a sequence of results over time; by default
                ``compute()``.
            ax: Axes of matplotlib to draw on; by default those of a new figure.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: Without matplotlib.
        """
        return self._plot(val, ax)


_DIGEST_SIZE = 32


def _digest(*settings: Any) -> list[int]:
    """Return a hash of the settings: different settings have different bytes, equal ones nearly always equal bytes."""
    texts = [f"{tuple(part.shape)} {part.cpu().tolist()}" if isinstance(part, Tensor) else part for part in settings]
    return list(hashlib.sha256(b"".join(_bytes(part) for part in texts)).digest())


def _bytes(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception:  # an object that cannot be pickled equals only itself
        return f"{type(value).__qualname__} {id(value)}".encode()


def _nothing(reduction: Reduction, values: Tensor) -> Any:
    """Return the result of a reduction with NaN in place of all numbers; one NaN if it raises for a single value."""
    try:
        result = reduction(values.new_full((1,), torch.nan))
    except Exception:  # the user's reduction may raise any error for a single value
        return values.new_full((), torch.nan)
    result = apply_to_collection(result, (int, float), lambda number: torch.nan)
    return apply_to_collection(result, Tensor, lambda part: torch.full_like(part, torch.nan, dtype=values.dtype))


class FisherSpectralNorm(_PerExampleMetric):
    """Largest eigenvalue of the input-space Fisher matrix, reduced over all examples seen.

    The model is an argument of ``update`` and not a part of the metric, so that no checkpoint holds it twice. Works
    under ``no_grad`` and ``inference_mode``. Cost per update: that of :func:`fisher_reg.fisher_spectral_norm`.

    ``compute`` before ``update`` warns, like every metric of torchmetrics, and returns NaN. In a ``MetricCollection``
    metrics that differ only in their reduction share one estimate. The wrappers ``Running``, ``MetricTracker`` (with
    ``maximize=False``) and ``MinMaxMetric`` work. ``BootStrapper`` reads the batch size from the first argument, so
    that it needs keywords, inputs first: ``update(inputs=x, model=model)``.

    Args:
        reduction: Function of the values of all examples ``(N,)``, which returns a tensor or a dictionary of tensors:
            :func:`torch.mean` (every example has the same weight), ``torch.max``, ``torch.median``,
            ``functools.partial(torch.quantile, q=0.95)``, or None for the values ``(N,)``.
        solver: As in :func:`fisher_reg.fisher_spectral_norm`, like ``likelihood`` and ``input_std``.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        memory_budget: As in :func:`fisher_reg.fisher_spectral_norm`; it does not change the result.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Attributes:
        wide_share: Share of the examples whose interval is wider than the solver's ``tolerance`` at its
            ``failure_probability`` (``converged`` of :class:`fisher_reg.EigenResult` is false); NaN without examples.
            For the default solver: 5 % of the eigenvalue, at 2 %.

    Example:
        >>> metric = FisherSpectralNorm()
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> metric.update(lambda x: x @ weight.T, torch.zeros(3, 2))
        >>> metric.compute()
        tensor(1.0000)

        Reductions are functions of the values:

        >>> from functools import partial
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])  # p (1 - p) |w0 - w1|^2, p = sigmoid(2 x)
        >>> p95, num_large = partial(torch.quantile, q=0.95), lambda values: (values > 0.5).sum()
        >>> for reduction in (None, torch.max, torch.median, p95, num_large):
        ...     metric = FisherSpectralNorm(reduction)
        ...     metric.update(lambda x: x @ weight.T, x)
        ...     print(metric.compute())
        tensor([1.0000, 0.4200, 0.0707])
        tensor(1.0000)
        tensor(0.4200)
        tensor(0.9420)
        tensor(1)
    """

    num_wide: Tensor
    num_examples: Tensor

    def __init__(
        self,
        reduction: Reduction | None = torch.mean,
        *,
        solver: Solver | None = None,
        likelihood: Likelihood = Categorical(),
        input_std: InputStd | None = None,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(reduction, likelihood, input_std, **kwargs)
        SOLVER.check(solver, self)
        self.solver = solver
        check_memory_budget(memory_budget, self)
        self.memory_budget = memory_budget
        self.add_state("num_wide", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_examples", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, model: LogitsFunction, inputs: Tensor, side_inputs: SideInputs = None) -> None:
        """Add the examples of ``inputs`` ``(B, *S)``, with the side inputs of the model."""
        result = fisher_spectral_norm(
            model,
            inputs,
            solver=self.solver,
            likelihood=self.likelihood,
            input_std=self.input_std,
            side_inputs=side_inputs,
            memory_budget=self.memory_budget,
        )
        self._append(result.eigenvalue)
        with torch.inference_mode(False):
            self.num_wide = self.num_wide + (~result.converged).sum()
            self.num_examples = self.num_examples + len(result.converged)

    @property
    def wide_share(self) -> Tensor:
        """Share of the examples of this process whose interval is too wide."""
        return self.num_wide / self.num_examples

    @property
    def unconverged(self) -> Tensor:
        """Deprecated: ``num_wide``, or the share ``wide_share``."""
        warnings.warn("FisherSpectralNorm.unconverged is now num_wide.", DeprecationWarning, stacklevel=2)
        return self.num_wide


class FisherTrace(_PerExampleMetric):
    """Trace of the input-space Fisher matrix, reduced over all examples seen; see :class:`FisherSpectralNorm`.

    Args:
        reduction: As in :class:`FisherSpectralNorm`.
        estimator: As in :func:`fisher_reg.fisher_trace`.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        memory_budget: As in :func:`fisher_reg.fisher_spectral_norm`; it does not change the result.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Example:
        >>> metric = FisherTrace(torch.max)
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> metric.update(lambda x: x @ weight.T, torch.zeros(3, 2))
        >>> metric.compute()
        tensor(1.0000)
    """

    def __init__(
        self,
        reduction: Reduction | None = torch.mean,
        *,
        estimator: TraceEstimator | None = None,
        likelihood: Likelihood = Categorical(),
        input_std: InputStd | None = None,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(reduction, likelihood, input_std, **kwargs)
        TRACE_ESTIMATOR.check(estimator, self)
        self.estimator = estimator
        check_memory_budget(memory_budget, self)
        self.memory_budget = memory_budget

    def update(self, model: LogitsFunction, inputs: Tensor, side_inputs: SideInputs = None) -> None:
        """Add the examples of ``inputs`` ``(B, *S)``, with the side inputs of the model."""
        values = fisher_trace(
            model,
            inputs,
            estimator=self.estimator,
            likelihood=self.likelihood,
            input_std=self.input_std,
            side_inputs=side_inputs,
            memory_budget=self.memory_budget,
        )
        self._append(values)


class PerExampleValues(_PerExampleMetric):
    """Values that were computed elsewhere, collected over batches and processes.

    Args:
        reduction: As in :class:`FisherSpectralNorm`.
        kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    def __init__(self, reduction: Reduction | None = None, **kwargs: Any) -> None:
        super().__init__(reduction, Categorical(), None, **kwargs)

    def update(self, values: Tensor) -> None:
        """Add values ``(B,)``."""
        self._append(values)
