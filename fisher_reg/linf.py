"""The largest effect of a small change of every input entry: the Fisher matrix in the linf norm."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fisher_reg.arguments import SIGN_SOLVER
from fisher_reg.estimate import evaluation_operator, warn_of_range
from fisher_reg.evaluation import InputStd, LogitsFunction, SideInputs
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.solvers import SignIteration, SignResult


def fisher_linf_norm(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    solver: SignIteration | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
    generator: torch.Generator | None = None,
) -> SignResult:
    r"""Estimate the largest value of the Fisher quadratic form over the linf ball, per example, from below.

    .. math::
        \lambda_\infty(x) = \max_{\|\delta\|_\infty \le 1} \delta^\top F(x)\, \delta
        = \max_{\|u\|_2 = 1} \|A^\top u\|_1^2, \qquad F = A^\top A .

    ``value / 2 * eps**2`` is, to second order, the largest KL divergence that a perturbation with entries up to ``eps``
    can cause, if the search has found the maximum. It is the analogue of :func:`fisher_reg.fisher_spectral_norm` for
    the norm in which attacks on images are usually limited. For F of rank 1, for example with two classes, it is
    :math:`p_1 p_2 \|\nabla_x (z_1 - z_2)\|_1^2`. With :math:`d` input entries
    :math:`\lambda_{\max} \le \lambda_\infty \le d\, \lambda_{\max}`.

    Cost: with at most ten classes, at most ``K`` backward passes and one forward-mode pass; with more classes about a
    dozen backward and three forward-mode passes, at most 16 and 5 (see :class:`SignIteration`).

    Args:
        model: As in :func:`fisher_reg.fisher_spectral_norm`, like all arguments that are not named here.
        inputs: ``(B, *S)``.
        solver: The solver, with its numbers of steps and of starts.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation. With it perturbations are those of the pixels: every
            pixel changes by at most 1.
        side_inputs: More arguments of the model.
        generator: Source of the random starts; by default a generator with a fixed seed.

    Returns:
        Fields with leading axis ``B``; ``perturbation`` is ``(B, *S)``. ``value`` is in nats per squared input unit,
        carries no gradient, and never exceeds the maximum beyond round-off, since ``perturbation`` attains it. It is a
        lower bound without a guarantee: finding the maximum is NP-hard. On random matrices with 3 to 10 classes and
        up to 10 entries it is the maximum in more than 99 % of the cases.

    Raises:
        TypeError: For a class or a name in place of an object, as in ``solver=SignIteration``.
        ValueError: As in :func:`fisher_reg.fisher_spectral_norm`.
        NonFiniteJacobianError: If finite logits have NaN or infinite derivatives.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
        >>> found = fisher_linf_norm(lambda x: x @ weight.T, torch.zeros(1, 2))  # p (1 - p) |w0 - w1|_1^2 = 16 / 4
        >>> found.value, found.perturbation.abs()
        (tensor([4.0000]), tensor([[1., 1.]]))
    """
    SIGN_SOLVER.check(solver, "fisher_linf_norm")
    solver = solver or SignIteration()
    with evaluation_operator(model, inputs, likelihood, input_std, side_inputs) as fisher:
        result = solver.maximize(fisher, generator)
    warn_of_range(result.value, result.perturbation, "values")
    return replace(result, perturbation=result.perturbation.view_as(inputs))
