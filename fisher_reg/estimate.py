"""Estimates of the sensitivity of a prediction to its input: eigenvalues, trace and effective rank."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fisher_reg.arguments import EIGENPAIR_SOLVER, LIKELIHOOD, SOLVER, TRACE_ESTIMATOR, check_memory_budget
from fisher_reg.chunks import Batch
from fisher_reg.evaluation import (
    InputStd,
    LogitsFunction,
    SideInputs,
    WithSideInputs,
    called,
    check_inputs,
    deployed,
    in_fast_layout,
    measured,
    refuse_random,
)
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.operator import InputFisher
from fisher_reg.solvers import (
    EigenpairSolver,
    EigenResult,
    Exact,
    Lanczos,
    Solver,
    TraceEstimator,
    concatenate,
)
from fisher_reg.trace import Hutchinson

_MAX_EXACT_TRACE = 16
"""Up to this many outputs the exact trace costs no more than the sampled one: about 4 + 4 passes, and 8 samples."""


def fisher_spectral_norm(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    solver: Solver | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> EigenResult:
    r"""Estimate the largest eigenvalue of the input-space Fisher matrix, per example.

    With logits :math:`z`, :math:`p = \mathrm{softmax}(z)` and :math:`J = \partial z / \partial x`,

    .. math:: F(x) = J^\top (\mathrm{diag}(p) - p p^\top) J .

    ``eigenvalue / 2 * eps**2`` is, to second order, the largest KL divergence that a perturbation of Euclidean length
    ``eps`` can cause. No labels are needed. F is never formed.

    Args:
        model: Maps ``(B, *S)`` to logits ``(B, K)``, each example independently. A module is evaluated as the deployed
            function (running statistics of batch norm, no dropout), in whichever mode it is. It is not modified: the
            call runs a copy that shares the parameters. Any other callable is called unchanged.
        inputs: ``(B, *S)``, floating point; not modified. Half precision is promoted to float32, and TensorFloat-32 is
            off during the call.
        solver: :class:`Exact` (``K + 1`` backward passes), :class:`Lanczos` (a few pairs of passes, for any ``K``) or
            :class:`PowerIteration`. By default the cheaper of the first two; ``result.solver`` is the one used.
        likelihood: :class:`Categorical`, :class:`Bernoulli` or :class:`Gaussian`.
        input_std: If the inputs of ``model`` are ``(pixels - mean) / std``, pass that ``std`` to get the Fisher matrix
            with respect to pixels, :math:`\mathrm{diag}(1/s) F \mathrm{diag}(1/s)`: a number, a list with one number
            per channel, or a tensor that is broadcastable to one example ``*S``.
        side_inputs: More arguments of the model (an attention mask, a class embedding): one tensor, a tuple for
            ``model(inputs, *side_inputs)``, or a mapping for keywords. Tensors ``(B, ...)`` among them are indexed with
            the examples if only a part of the batch is evaluated; they are not differentiated.
        generator: Generator of the random part of the start vector; by default a fixed one.
        memory_budget: Largest number of bytes of the autograd graph and the solver's vectors together. A larger batch
            is split into parts, which gives the same numbers. By default
            :data:`fisher_reg.chunks.DEFAULT_MEMORY_BUDGET`, 4 GiB, and on a CUDA device at most half of the free
            memory. The memory is measured (by forwards of two examples and of one) for a batch of 16 examples or more,
            if the budget is less than 1,024 numbers per entry of ``inputs``. If the batch does not fit, one forward
            without gradient tests whether the parts have the same logits as in the whole batch. If not, the batch is
            not split.

    Returns:
        Fields with leading axis ``B``. ``eigenvalue`` is in nats per squared input unit, carries no gradient, and never
        exceeds the true value beyond round-off; one eigenvalue of F lies within ``residual`` of it.

    Raises:
        TypeError: For a class or a name instead of an object, as in ``solver=Lanczos``.
        ValueError: If ``inputs`` is not a non-empty floating-point batch, or the logits are not ``(B, K)`` with finite
            values and ``K`` large enough for the likelihood.
        NonFiniteJacobianError: If finite logits have NaN or infinite derivatives.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fisher_spectral_norm(lambda x: x @ weight.T, torch.zeros(1, 2)).eigenvalue  # p (1 - p) |w0 - w1|^2 = 4 / 4
        tensor([1.0000])
    """
    SOLVER.check(solver, "fisher_spectral_norm")
    check_memory_budget(memory_budget, "fisher_spectral_norm")

    def method(num_outputs: int) -> Solver:
        return solver or automatic_solver(num_outputs)

    def solved(fisher: InputFisher) -> EigenResult:
        return method(fisher.logits.shape[1]).solve(fisher, generator)

    batch = Batch(evaluation_operator, model, inputs, likelihood, input_std, side_inputs)
    result = concatenate(batch.in_chunks(solved, method, memory_budget, generator))
    warn_of_range(result.eigenvalue, result.eigenvector, "eigenvalues")
    return replace(result, eigenvector=result.eigenvector.view_as(inputs))


def fisher_eigenpairs(
    model: LogitsFunction,
    inputs: Tensor,
    num_eigenpairs: int,
    *,
    solver: EigenpairSolver | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> EigenResult:
    r"""Estimate the ``num_eigenpairs`` largest eigenvalues of the input-space Fisher matrix and their eigenvectors.

    For a categorical distribution F has rank at most ``K - 1``; pairs beyond the rank are zero.

    Args:
        model: As in :func:`fisher_spectral_norm`, like all arguments that are not explained here.
        inputs: ``(B, *S)``.
        num_eigenpairs: Number of eigenpairs, at most ``K``.
        solver: :class:`Exact` (default; ``K + 1`` backward passes) or :class:`Lanczos` (``num_eigenpairs`` forward and
            backward passes per step).
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        side_inputs: More arguments of the model.
        generator: Generator of the random part of the start vectors.
        memory_budget: Largest number of bytes of graph and vectors.

    Returns:
        Fields with leading axes ``(B, num_eigenpairs)``, descending; ``eigenvector`` is ``(B, num_eigenpairs, *S)``.

    Raises:
        ValueError: As in :func:`fisher_spectral_norm`, or if ``num_eigenpairs`` is not between 1 and ``K``.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fisher_eigenpairs(lambda x: x @ weight.T, torch.zeros(1, 2), 2).eigenvalue
        tensor([[1.0000, 0.0000]])
    """
    EIGENPAIR_SOLVER.check(solver, "fisher_eigenpairs")
    chosen = solver or Exact()
    check_memory_budget(memory_budget, "fisher_eigenpairs")

    def solved(fisher: InputFisher) -> EigenResult:
        num_outputs = fisher.logits.shape[1]
        if not 1 <= num_eigenpairs <= num_outputs:
            raise ValueError(f"num_eigenpairs must lie between 1 and K = {num_outputs}; got {num_eigenpairs}.")
        return chosen.eigenpairs(fisher, num_eigenpairs, generator)

    batch = Batch(evaluation_operator, model, inputs, likelihood, input_std, side_inputs)
    result = concatenate(batch.in_chunks(solved, lambda num_outputs: chosen, memory_budget, generator, num_eigenpairs))
    warn_of_range(result.eigenvalue, result.eigenvector, "eigenvalues")
    return replace(result, eigenvector=result.eigenvector.view(len(inputs), num_eigenpairs, *inputs.shape[1:]))


def fisher_effective_rank(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    solver: Solver | None = None,
    estimator: TraceEstimator | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Estimate :math:`\mathrm{tr} F / \lambda_\max(F)`, per example: the effective number of sensitive directions.

    Between 1 and the rank of F. Also called intrinsic dimension, and the stable rank of ``A``.

    Args:
        model: As in :func:`fisher_spectral_norm`, like all arguments that are not explained here.
        inputs: ``(B, *S)``.
        solver: The solver of the eigenvalue.
        estimator: The estimator of the trace, as in :func:`fisher_trace`.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation; it changes the ratio.
        side_inputs: More arguments of the model.
        generator: Generator for the solver and the estimator.
        memory_budget: Largest number of bytes of graph and vectors.

    Returns:
        ``(B,)``; zero where F is zero.

    Raises:
        ValueError: As in :func:`fisher_spectral_norm`.
    """
    result, trace = fisher_spectral_norm_and_trace(
        model,
        inputs,
        solver=solver,
        estimator=estimator,
        likelihood=likelihood,
        input_std=input_std,
        side_inputs=side_inputs,
        generator=generator,
        memory_budget=memory_budget,
    )
    return torch.where(result.eigenvalue > 0, trace / result.eigenvalue, 0.0)


def fisher_spectral_norm_and_trace(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    solver: Solver | None = None,
    estimator: TraceEstimator | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> tuple[EigenResult, Tensor]:
    """Estimate both together: the trace is exact on the solver's search space, and only the rest is sampled.

    Args:
        model: As in :func:`fisher_spectral_norm`, like all arguments that are not explained here.
        inputs: ``(B, *S)``.
        solver: By default :class:`Exact` if the trace takes ``K`` passes anyway, else as in
            :func:`fisher_spectral_norm`.
        estimator: As in :func:`fisher_trace`; the solver of a :class:`Hutchinson` is not used.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        side_inputs: More arguments of the model.
        generator: Generator for the solver and the estimator.
        memory_budget: Largest number of bytes of graph and vectors.

    Returns:
        The result of :func:`fisher_spectral_norm`, and the trace ``(B,)``, never below the eigenvalue. The search space
        of the default solver depends on difference quotients. Their error depends on the batch, and changes a sampled
        trace by about 1e-3 of the sampled part; ``solver=Lanczos(is_exact=True)`` uses no difference quotients.

    Raises:
        ValueError: As in :func:`fisher_spectral_norm`.
    """
    SOLVER.check(solver, "fisher_spectral_norm_and_trace")
    TRACE_ESTIMATOR.check(estimator, "fisher_spectral_norm_and_trace")
    check_memory_budget(memory_budget, "fisher_spectral_norm_and_trace")
    batch = Batch(evaluation_operator, model, inputs, likelihood, input_std, side_inputs)
    solved = batch.in_chunks(
        lambda fisher: solved_with_trace(fisher, solver, estimator, generator),
        partial(method_with_trace, solver=solver, estimator=estimator),
        memory_budget,
        generator,
    )
    result = concatenate([result for result, _ in solved])
    warn_of_range(result.eigenvalue, result.eigenvector, "eigenvalues")
    return replace(result, eigenvector=result.eigenvector.view_as(inputs)), torch.cat([trace for _, trace in solved])


def solved_with_trace(
    fisher: InputFisher,
    solver: Solver | None,
    estimator: TraceEstimator | None,
    generator: torch.Generator | None = None,
) -> tuple[EigenResult, Tensor]:
    """Return the largest eigenpair of an operator and its trace."""
    num_outputs = fisher.logits.shape[1]
    estimator = estimator or automatic_trace_estimator(num_outputs)
    solver = solver or (Exact() if isinstance(estimator, Exact) else automatic_solver(num_outputs))
    result = solver.solve(fisher, generator)
    return result, torch.maximum(_trace_beside(estimator, fisher, result, generator), result.eigenvalue)


def method_with_trace(num_outputs: int, *, solver: Solver | None, estimator: TraceEstimator | None) -> object:
    """Return the solver or estimator that keeps the most vectors in :func:`solved_with_trace`."""
    estimator = estimator or automatic_trace_estimator(num_outputs)
    return estimator if isinstance(estimator, Exact) else solver or automatic_solver(num_outputs)


def fisher_trace(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    estimator: TraceEstimator | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Estimate the trace of the input-space Fisher matrix, per example: the sum of its eigenvalues.

    The trace is the expected squared length of the score :math:`\nabla_x \log p(y|x)`. ``trace / 2 * eps**2 / d`` is,
    to second order, the mean KL divergence that random perturbations of length ``eps`` cause.

    Args:
        model: As in :func:`fisher_spectral_norm`, like all arguments that are not explained here.
        inputs: ``(B, *S)``.
        estimator: :class:`Exact` (``K`` backward passes, exact up to rounding) or :class:`Hutchinson` (the passes of a
            solver and ``num_samples`` backward passes, unbiased, never below the eigenvalue). By default ``Exact``
            if it costs no more passes.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        side_inputs: More arguments of the model.
        generator: Generator of the random probes; by default a fixed one.
        memory_budget: Largest number of bytes of graph and vectors.

    Returns:
        ``(B,)``, in nats per squared input unit, without gradient.

    Raises:
        ValueError: As in :func:`fisher_spectral_norm`.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fisher_trace(lambda x: x @ weight.T, torch.zeros(1, 2))
        tensor([1.0000])
    """
    TRACE_ESTIMATOR.check(estimator, "fisher_trace")
    check_memory_budget(memory_budget, "fisher_trace")

    def method(num_outputs: int) -> TraceEstimator:
        return estimator or automatic_trace_estimator(num_outputs)

    def estimated(fisher: InputFisher) -> Tensor:
        return method(fisher.logits.shape[1]).trace(fisher, generator)

    batch = Batch(evaluation_operator, model, inputs, likelihood, input_std, side_inputs)
    return torch.cat(batch.in_chunks(estimated, method, memory_budget, generator))


def automatic_solver(num_outputs: int) -> Solver:
    """Return the cheaper of :class:`Exact` and :class:`Lanczos` for ``num_outputs`` logits.

    Exact takes ``K + 1`` backward passes; Lanczos takes about four backward passes and four forwards on trained
    networks with ten classes.
    """
    return Exact() if num_outputs <= 6 else Lanczos()


def automatic_trace_estimator(num_outputs: int) -> TraceEstimator:
    """Return :class:`Exact` if it takes no more passes than :class:`Hutchinson`, else :class:`Hutchinson`."""
    return Exact() if num_outputs <= _MAX_EXACT_TRACE else Hutchinson()


@contextmanager
def evaluation_operator(
    model: LogitsFunction,
    inputs: Tensor,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
) -> Generator[InputFisher, None, None]:
    """Build the operator of the deployed function in full precision, without TensorFloat-32.

    Use it for products with F or with a user-defined solver; every estimate of this package uses it. Autograd is on
    inside the block, also under ``no_grad``. Cost: one forward, whose graph lives as long as the operator.

    Args:
        model: As in :func:`fisher_spectral_norm`, like all arguments.
        inputs: ``(B, *S)``.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        side_inputs: More arguments of the model.

    Yields:
        The operator. Its vectors are flat: inputs ``(B, d)``, outputs ``(B, K)``. Use it only inside the block.

    Raises:
        ValueError: As in :func:`fisher_spectral_norm`.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # F = [[1, 0], [0, 0]] if both classes have p = 0.5
        >>> with evaluation_operator(lambda x: x @ weight.T, torch.zeros(1, 2)) as fisher:
        ...     fisher.mv(torch.tensor([[2.0, 3.0]]))
        tensor([[2., 0.]])
    """
    check_inputs(inputs)
    LIKELIHOOD.check(likelihood)
    with measured(inputs) as safe_inputs:
        evaluated = deployed(model, safe_inputs)
        whole = WithSideInputs(evaluated, side_inputs, len(safe_inputs))
        function = in_fast_layout(whole, safe_inputs)
        point = safe_inputs.detach().requires_grad_()
        logits = called(function, point)
        fisher = InputFisher(function, point, likelihood, input_std, quotients=True, logits=logits)
        refuse_random(evaluated, fisher.logits, lambda: whole(safe_inputs))
        yield fisher


def _trace_beside(
    estimator: TraceEstimator, fisher: InputFisher, result: EigenResult, generator: torch.Generator | None
) -> Tensor:
    if isinstance(estimator, Hutchinson):
        return estimator.trace_beside(fisher, result, generator)
    if isinstance(result.solver, Exact) and isinstance(estimator, Exact):
        return result.known_trace
    return estimator.trace(fisher, generator)


def warn_of_range(values: Tensor, vectors: Tensor, name: str) -> None:
    """Warn if values ``(B, ...)`` of nonzero vectors ``(B, ..., *S)`` underflow or overflow in their precision."""
    has_vector = vectors.flatten(values.ndim).abs().amax(-1) > 0
    too_small, too_large = torch.stack([((values == 0) & has_vector).sum(), values.isinf().sum()]).cpu().tolist()
    if too_small or too_large:
        warnings.warn(
            f"{too_small} {name} are too small and {too_large} too large for {values.dtype}: they are returned as zero "
            "and infinity. Pass the model and the inputs in double precision.",
            stacklevel=3,
        )
