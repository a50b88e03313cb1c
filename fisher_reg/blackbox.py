r"""The Fisher spectral norm of a classifier that only answers: forward passes, no gradient, no network.

With :math:`g = 2 \sqrt p` the Fisher matrix is :math:`F = J_g^\top J_g`, so that difference quotients of the square
roots of the answered probabilities are products with :math:`A = J_g`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fisher_reg.evaluation import Noise, SharedCopy, check_input_std, check_inputs
from fisher_reg.sampling import fixed_generator, normal
from fisher_reg.solvers import unit

Array = Tensor | np.ndarray[Any, Any]
Predict = Callable[[Any], Any]
Roots = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlackBoxResult:
    r"""Largest eigenvalue of the input-space Fisher matrix by queries alone, with its uncertainty.

    Attributes:
        eigenvalue: ``(B,)``, in nats per squared input unit.
        standard_error: ``(B,)``; NaN where the estimator has none.
        bias_bound: ``(B,)``. What the expectation may exceed the truth by, at most, before the correction; NaN where
            the estimator is biased low.
        trace: ``(B,)``. The mean squared length of the quotients: unbiased for :math:`\mathrm{tr} F`.
        step: ``(B,)``. Length of the steps per unit of direction, in input units.
        num_queries: Calls of ``predict``; each one asks one question per example.
    """

    eigenvalue: Tensor
    standard_error: Tensor
    bias_bound: Tensor
    trace: Tensor
    step: Tensor
    num_queries: int


class BlackBoxEstimator(Protocol):
    """Spends queries on an estimate."""

    def estimate(self, roots: Roots, inputs: Tensor, std: Tensor, generator: torch.Generator) -> BlackBoxResult:
        """Return the estimate for ``inputs``, where ``roots`` answers ``g`` ``(B, K)``."""


@dataclass(frozen=True)
class BlackBox:
    r"""Sketch of the Gram matrix: :math:`\lambda_\max(Y Y^\top)` with columns :math:`A v_i / \sqrt m`, v Gaussian.

    One query answers ``g(x)``, up to three choose the step, and each of the other ``m`` gives a column by a one-sided
    quotient: a query on a new direction buys more than the other side of an old one, since the curvature that the other
    side would cancel is small and even in :math:`v`. Along the top eigenvector the estimate is
    :math:`\lambda \chi^2_m / m` whatever the size of the inputs, hence the standard error
    :math:`\lambda \sqrt{2/m}`: 10 % at 200 queries.

    The expectation of the largest eigenvalue of a sketch is too high, by at most
    :math:`\lambda ((1 + \sqrt{r/m})^2 + 1/m - 1)` with the effective rank :math:`r = \mathrm{tr} F / \lambda` (Chevet's
    inequality), and by far less where the largest eigenvalue stands alone; a jackknife over groups of directions takes
    off its leading term. All of this holds for answers that are differentiable at the inputs: at kinks, such as those
    of max pooling on a flat background, the estimate is far too high.

    Args:
        num_queries: Calls of ``predict`` in all, at least 2.
        step: Length of the steps per unit of direction; by default each example gets one that moves its logits
            by about 0.01, far above the rounding of single precision.
    """

    num_queries: int = 200
    step: float | None = None

    def __post_init__(self) -> None:
        _check_budget(self, self.num_queries, self.step)

    def estimate(self, roots: Roots, inputs: Tensor, std: Tensor, generator: torch.Generator) -> BlackBoxResult:
        """Return the estimate."""
        base = roots(inputs)
        directions = _directions(inputs, std, generator)
        num_pilots = min(_MAX_PILOTS, self.num_queries // 10) if self.step is None else 0
        step = inputs.new_full((len(inputs),), self.step or _FIRST_STEP)
        # tr(diag p - p p') = 1 - |p|^2: logits that move by _MOVE each move g by that times its root
        target = _MOVE * (1 - (base / 2) ** 4 @ base.new_ones(base.shape[1])).clamp_min(0).sqrt()
        for _ in range(num_pilots):
            moved = (roots(_moved(inputs, step, next(directions))) - base).norm(dim=1)
            change = (target / moved).clamp(1 / _MAX_CHANGE, _MAX_CHANGE)
            step = torch.where(target > 0, step * change, step)
        num_columns = self.num_queries - 1 - num_pilots
        columns = [(roots(_moved(inputs, step, next(directions))) - base) / step[:, None] for _ in range(num_columns)]
        sketch = torch.stack(columns, 1).double()
        eigenvalue = _jackknife(sketch)
        trace = sketch.square().sum(2).mean(1)
        per_column = trace / eigenvalue.clamp_min(torch.finfo(trace.dtype).tiny) / num_columns
        return BlackBoxResult(
            eigenvalue=eigenvalue.to(inputs),
            standard_error=(eigenvalue * (2 / num_columns) ** 0.5).to(inputs),
            bias_bound=(eigenvalue * ((1 + per_column.sqrt()) ** 2 + 1 / num_columns - 1)).to(inputs),
            trace=trace.to(inputs),
            step=step,
            num_queries=self.num_queries,
        )


@dataclass(frozen=True)
class BlackBoxMax:
    r"""The largest of random directional quotients :math:`v^\top F v`, unit ``v``: what the paper's code computes.

    Of the order :math:`\mathrm{tr} F / d`: low by a factor of a thousand for images. Kept to compare with;
    :class:`BlackBox` is right at the same budget.

    Args:
        num_queries: Calls of ``predict``, two per direction; of an odd number one is left.
        step: Length of the central differences, in input units.
    """

    num_queries: int = 200
    step: float = 1e-3

    def __post_init__(self) -> None:
        _check_budget(self, self.num_queries, self.step)

    def estimate(self, roots: Roots, inputs: Tensor, std: Tensor, generator: torch.Generator) -> BlackBoxResult:
        """Return the largest quotient."""
        size = inputs.new_full((len(inputs),), self.step)
        quotients = []
        for _ in range(self.num_queries // 2):
            direction = unit(normal(inputs, generator).flatten(1)).view_as(inputs) / std
            ahead, behind = roots(_moved(inputs, size, direction)), roots(_moved(inputs, -size, direction))
            quotients.append(((ahead - behind) / (2 * self.step)).square().sum(1))
        values = torch.stack(quotients)
        return BlackBoxResult(
            eigenvalue=values.amax(0),
            standard_error=torch.full_like(size, torch.nan),
            bias_bound=torch.full_like(size, torch.nan),
            trace=values.mean(0) * inputs[0].numel(),
            step=size,
            num_queries=2 * len(quotients),
        )


def blackbox_spectral_norm(
    predict: Predict,
    inputs: Array,
    *,
    estimator: BlackBoxEstimator | None = None,
    input_std: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> BlackBoxResult:
    r"""Estimate the largest eigenvalue of the input-space Fisher matrix from predictions alone, per example.

    Args:
        predict: Maps inputs ``(B, *S)`` to probabilities ``(B, K)``: a network in evaluation mode followed by softmax,
            an ONNX session, a remote service. It gets a NumPy array where ``inputs`` is one, else a tensor without
            gradient, and may return either. It must answer the same question alike each time, with probabilities that
            are not rounded to a few digits.
        inputs: ``(B, *S)``, float32 or float64. The questions are ``inputs`` plus small random steps, which may leave
            the range of the inputs by as much.
        estimator: :class:`BlackBox` with 200 queries by default, or :class:`BlackBoxMax`.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        generator: Source of the directions; by default a fixed one.

    Returns:
        Fields with leading axis ``B``, on the device of the inputs.

    Raises:
        ValueError: If ``inputs`` is not a non-empty batch of float32 or float64, or what ``predict`` returns is not
            probabilities ``(B, K)``: finite, not negative, each row with sum one.

    Example:
        >>> def predict(x: np.ndarray) -> np.ndarray:  # p (1 - p) |w0 - w1|^2 = 1 at x = 0
        ...     first = 1 / (1 + np.exp(-2 * x[:, :1]))
        ...     return np.concatenate([first, 1 - first], 1)
        >>> result = blackbox_spectral_norm(predict, np.zeros((1, 50)))
        >>> bool((result.eigenvalue - 1).abs() < 3 * result.standard_error)
        True
    """
    is_numpy = isinstance(inputs, np.ndarray)
    points = torch.from_numpy(inputs) if isinstance(inputs, np.ndarray) else inputs.detach()
    check_inputs(points)
    if points.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Differences of predictions on {points.dtype} inputs are nothing but rounding; convert inputs and network "
            "to float32."
        )
    std = torch.ones_like(points[:1]) if input_std is None else input_std.to(points)
    check_input_std(std)

    source, noise = SharedCopy(predict, is_deployed=False), Noise(points.device)

    def roots(question: Tensor) -> Tensor:
        own = question.clone()  # predict may change it in place
        with torch.no_grad(), noise.replayed(), source.opened():
            answer = torch.as_tensor(source.model(own.numpy() if is_numpy else own))
        _check_probabilities(answer, len(points))
        return 2 * answer.to(points).clamp_min(0).sqrt()

    return (estimator or BlackBox()).estimate(roots, points, std, generator or fixed_generator(points.device))


_MOVE = 1e-2  # of the logits, whose rounding in float32 is about 1e-6: both errors are far below that of the sampling
_MAX_PILOTS = 3
_FIRST_STEP = 1e-3
_MAX_CHANGE = 1e3  # of the step by one pilot
_NUM_GROUPS = 20


def _directions(inputs: Tensor, std: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield normal(inputs, generator) / std


def _moved(inputs: Tensor, step: Tensor, direction: Tensor) -> Tensor:
    return inputs + step.view(-1, *[1] * (inputs.ndim - 1)) * direction


def _jackknife(sketch: Tensor) -> Tensor:
    """Largest eigenvalue of the mean outer product of columns ``(B, m, K)``, less the leading term of its bias."""
    num_columns = sketch.shape[1]
    whole = _top_of_mean(sketch)
    num_groups = min(_NUM_GROUPS, num_columns)
    if num_groups == 1:
        return whole
    group = torch.arange(num_columns, device=sketch.device) % num_groups
    left_out = torch.stack([_top_of_mean(sketch[:, group != one]) for one in range(num_groups)]).mean(0)
    return (num_groups * whole - (num_groups - 1) * left_out).clamp_min(0)


def _top_of_mean(columns: Tensor) -> Tensor:
    smaller = columns.mT @ columns if columns.shape[2] <= columns.shape[1] else columns @ columns.mT
    top: Tensor = torch.linalg.eigvalsh(smaller / columns.shape[1])[:, -1]
    return top


def _check_budget(estimator: object, num_queries: int, step: float | None) -> None:
    if num_queries < 2:
        raise ValueError(f"{type(estimator).__name__} needs num_queries >= 2, a point and a step; got {num_queries}.")
    if step is not None and not step > 0:
        raise ValueError(f"{type(estimator).__name__} needs a positive step; got {step}.")


def _check_probabilities(answer: Tensor, batch_size: int) -> None:
    if answer.ndim != 2 or len(answer) != batch_size or answer.shape[1] < 2:
        raise ValueError(
            f"predict must return probabilities (B, K) with B = {batch_size} and K >= 2; it returned "
            f"{tuple(answer.shape)}."
        )
    if answer.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"predict must return float32 or float64, since differences are taken; got {answer.dtype}.")
    if not bool(torch.isfinite(answer).all()):
        raise ValueError("predict returned NaN or infinite values.")
    off = float((answer.sum(1) - 1).abs().max())
    if off > 1e-3 or float(answer.min()) < -1e-6:
        raise ValueError(
            f"predict must return probabilities; a row's sum is off one by {off:.2g} and the smallest value is "
            f"{float(answer.min()):.2g}. If it returns logits, pass lambda x: predict(x).softmax(1)."
        )
