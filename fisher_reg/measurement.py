"""All values that the monitor logs for a batch: eigenvalue, trace, ratio of KL and quadratic form, linf value.

Public: all of ``__all__``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fisher_reg.arguments import check_memory_budget
from fisher_reg.chunks import Batch
from fisher_reg.estimate import automatic_solver, evaluation_operator, method_with_trace, solved_with_trace
from fisher_reg.evaluation import InputStd, LogitsFunction, SideInputs
from fisher_reg.geometry import EUCLIDEAN, Geometry, LInf
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.operator import InputFisher
from fisher_reg.printing import examples, spread
from fisher_reg.quadratic import kl_ratio
from fisher_reg.solvers import EigenResult, SignIteration, Solver, TraceEstimator, concatenate

__all__ = ["Measurement", "fisher_kl_ratio", "measure"]


@dataclass(frozen=True)
class Measurement:
    """Numbers per example of a batch.

    Attributes:
        result: As returned by :func:`fisher_reg.fisher_spectral_norm`; its eigenvectors are flat, ``(B, d)``.
        trace: ``(B,)``.
        kl_ratio: ``(B,)``, see :func:`fisher_reg.fisher_kl_ratio`.
        linf: ``(B,)``, the value of :func:`fisher_reg.fisher_linf_norm` if it was requested.
    """

    result: EigenResult
    trace: Tensor
    kl_ratio: Tensor
    linf: Tensor | None = None

    def __repr__(self) -> str:
        linf = "" if self.linf is None else f"; linf {spread(self.linf)}"
        return (
            f"Measurement({examples(len(self.trace))}: eigenvalue {spread(self.result.eigenvalue)}; "
            f"trace {spread(self.trace)}; kl_ratio {spread(self.kl_ratio)}{linf})"
        )


def measure(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    solver: Solver | None = None,
    estimator: TraceEstimator | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
    geometry: Geometry = EUCLIDEAN,
    memory_budget: int | None = None,
) -> Measurement:
    """Return the numbers of a batch; arguments as of :func:`fisher_reg.fisher_spectral_norm_and_trace`.

    Cost: as there, and one forward; with :class:`fisher_reg.LInf` also that of :func:`fisher_reg.fisher_linf_norm`.
    """
    check_memory_budget(memory_budget, "measure")

    def measured(fisher: InputFisher) -> Measurement:
        result, trace = solved_with_trace(fisher, solver, estimator)
        ratio = kl_ratio(fisher, result.eigenvalue, result.eigenvector, result.left_singular_vector)
        linf = SignIteration().maximize(fisher).value if isinstance(geometry, LInf) else None
        return Measurement(result, trace, ratio, linf)

    batch = Batch(evaluation_operator, model, inputs, likelihood, input_std, side_inputs)
    method = partial(method_with_trace, solver=solver, estimator=estimator)
    return _joined(batch.in_chunks(measured, method, memory_budget))


def _joined(parts: list[Measurement]) -> Measurement:
    return Measurement(
        concatenate([part.result for part in parts]),
        torch.cat([part.trace for part in parts]),
        torch.cat([part.kl_ratio for part in parts]),
        None if parts[0].linf is None else torch.cat([part.linf for part in parts if part.linf is not None]),
    )


def fisher_kl_ratio(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    solver: Solver | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
) -> Tensor:
    r"""Return the ratio of KL and its quadratic form along the top eigenvector, for a finite step, per example.

    .. math:: \frac{\mathrm{KL}(p_x \,\|\, p_{x + \epsilon v})}{\lambda \epsilon^2 / 2}

    :math:`\epsilon` is chosen such that the denominator is 0.1 nats, but it is at most 5 % of the length of the input
    minus its mean. Of the directions :math:`\pm v`, the one in which the entropy of the prediction grows is used. About
    1: the eigenvalue predicts the effect of a perturbation of this length. Far below 1: the function is rough or
    saturates, so the gradient at the point does not predict the effect of an attack (gradient masking). Above 1, for
    example for confident predictions: the effect is larger than the eigenvalue predicts.

    Args:
        model: As in :func:`fisher_reg.fisher_spectral_norm`, like all arguments that are not named here.
        inputs: ``(B, *S)``.
        solver: Solver for the eigenvector.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        side_inputs: More arguments of the model.

    Returns:
        ``(B,)``; NaN where the eigenvalue is zero or the perturbed logits are not finite. Cost: one forward in addition
        to the estimate.

    Raises:
        ValueError: As in :func:`fisher_reg.fisher_spectral_norm`.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # log cosh(0.4472) over 0.1
        >>> fisher_kl_ratio(lambda x: x @ weight.T, torch.zeros(1, 2))
        tensor([0.9683])
    """
    with evaluation_operator(model, inputs, likelihood, input_std, side_inputs) as fisher:
        result = (solver or automatic_solver(fisher.logits.shape[1])).solve(fisher)
        return kl_ratio(fisher, result.eigenvalue, result.eigenvector, result.left_singular_vector)
