"""How sensitive is a prediction to its input: the numbers that users ask for."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fisher_reg.forward import LogitsFunction, as_function, check_inputs, differentiable, evaluation_behaviour
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.operator import InputFisher
from fisher_reg.solvers import EigenResult, Exact, Hutchinson, Lanczos, Solver, TraceEstimator, concatenate

_MAX_DENSE_NUMBERS = 2**26
"""Numbers of ``A`` held at once by a dense method (256 MiB in float32); larger batches go in chunks."""


def fisher_spectral_norm(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    solver: Solver | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> EigenResult:
    r"""Estimate the largest eigenvalue of the input-space Fisher matrix, per example.

    With logits :math:`z`, :math:`p = \mathrm{softmax}(z)` and :math:`J = \partial z / \partial x`,

    .. math:: F(x) = J^\top (\mathrm{diag}(p) - p p^\top) J .

    ``eigenvalue / 2 * eps**2`` is, to second order, the largest KL divergence that a perturbation of Euclidean length
    ``eps`` can cause. No labels are needed. F is never formed.

    Args:
        model: Maps ``(B, *S)`` to logits ``(B, K)``, each example by itself. The batch norm and dropout of a module
            are put in evaluation behaviour for this call only; no gradient, flag or buffer of it is changed.
        inputs: ``(B, *S)``, floating point; not modified. Half precision is promoted to float32.
        solver: :class:`Exact` (``K`` backward passes), :class:`Lanczos` (a few pairs of passes, whatever ``K``) or
            :class:`PowerIteration`. By default the cheaper of the first two; the result says which.
        likelihood: :class:`Categorical`, :class:`Bernoulli` or :class:`Gaussian`.
        input_std: If ``model`` is fed ``(pixels - mean) / std``, pass that ``std`` (broadcastable to ``inputs``) to
            get the Fisher matrix in pixels, :math:`\mathrm{diag}(1/s) F \mathrm{diag}(1/s)`.
        generator: Source of the small random part of the start vector; by default a fixed one.

    Returns:
        Fields with leading axis ``B``. ``eigenvalue`` is in nats per squared input unit, carries no gradient, and never
        exceeds the true value beyond round-off; ``residual`` is :math:`\|F v - \theta v\|` for F itself.

    Raises:
        ValueError: If ``inputs`` is not a non-empty floating-point batch, or the logits are not ``(B, K)`` with finite
            values and ``K`` large enough for the likelihood.
        NonFiniteJacobianError: If finite logits have NaN or infinite derivatives.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fisher_spectral_norm(lambda x: x @ weight.T, torch.zeros(1, 2)).eigenvalue  # p (1 - p) |w0 - w1|^2 = 4 / 4
        tensor([1.0000])
    """
    with evaluation_operator(model, inputs, likelihood, input_std) as fisher:
        solver = solver or automatic_solver(fisher.logits.shape[1])
        result = concatenate([solver.solve(chunk, generator) for chunk in _chunks(fisher, solver)])
    return replace(result, eigenvector=result.eigenvector.view_as(inputs))


def fisher_trace(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    estimator: TraceEstimator | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Estimate the trace of the input-space Fisher matrix, per example: the sum of its eigenvalues.

    It is the expected squared length of the score :math:`\nabla_x \log p(y|x)`, and ``trace / 2 * eps**2 / d`` is the
    KL divergence that a random perturbation of length ``eps`` causes on average, to second order.

    Args:
        model: As in :func:`fisher_spectral_norm`, like all arguments that are not named here.
        inputs: ``(B, *S)``.
        estimator: :class:`Exact` (``K`` backward passes, right to round-off) or :class:`Hutchinson` (``num_samples``
            backward passes, unbiased). By default ``Exact`` where the spectral norm would use it too, else
            ``Hutchinson``.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        generator: Source of the random probes; by default a fixed one.

    Returns:
        ``(B,)``, in nats per squared input unit, without gradient.

    Raises:
        ValueError: As in :func:`fisher_spectral_norm`.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fisher_trace(lambda x: x @ weight.T, torch.zeros(1, 2))
        tensor([1.0000])
    """
    with evaluation_operator(model, inputs, likelihood, input_std) as fisher:
        estimator = estimator or automatic_trace_estimator(fisher.logits.shape[1])
        return torch.cat([estimator.trace(chunk, generator) for chunk in _chunks(fisher, estimator)])


def automatic_solver(num_outputs: int) -> Solver:
    """Return the cheaper of :class:`Exact` and :class:`Lanczos` for ``num_outputs`` logits.

    Exact takes ``K`` backward passes, Lanczos with three steps three backward and three forward-mode passes, the latter
    about 1.5 times as expensive; the residual of either takes one of both.
    """
    return Exact() if num_outputs <= 10 else Lanczos()


def automatic_trace_estimator(num_outputs: int) -> TraceEstimator:
    """Return :class:`Exact` where :func:`automatic_solver` does, else :class:`Hutchinson`."""
    solver = automatic_solver(num_outputs)
    return solver if isinstance(solver, Exact) else Hutchinson()


@contextmanager
def evaluation_operator(
    model: LogitsFunction, inputs: Tensor, likelihood: Likelihood, input_std: Tensor | None = None
) -> Generator[InputFisher, None, None]:
    """Build the operator of the deployed function: evaluation behaviour, full precision, everything restored after.

    Raises:
        ValueError: As in :func:`fisher_spectral_norm`.
    """
    check_inputs(inputs)
    with differentiable(inputs) as safe_inputs, evaluation_behaviour(model):
        yield InputFisher(as_function(model), safe_inputs, likelihood, input_std)


def _chunks(fisher: InputFisher, method: Solver | TraceEstimator) -> Iterator[InputFisher]:
    if not isinstance(method, Exact):
        return iter([fisher])
    numbers_per_example = fisher.logits.shape[1] * fisher.inputs[0].numel()
    return fisher.split(max(1, _MAX_DENSE_NUMBERS // numbers_per_example))
