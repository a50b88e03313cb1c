r"""The ratio of the divergences after one step and after several: a check of a single-step penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.estimate import evaluation_operator
from fisher_reg.evaluation import InputStd, LogitsFunction, SideInputs
from fisher_reg.geometry import GEOMETRY, Geometry
from fisher_reg.left_out import present
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.operator import InputFisher

NUM_STEPS = 4


@dataclass(frozen=True)
class StepDivergences:
    r"""Divergences in nats that two searches in the same ball found.

    Attributes:
        single: ``(B,)``, at the end of the step of :class:`fisher_reg.KLPenalty`.
        several: ``(B,)``, the largest of several steps and of the single one.
    """

    single: Tensor
    several: Tensor

    @property
    def ratio(self) -> Tensor:
        """``single / several`` in [0, 1]; NaN where ``several`` is zero or not finite."""
        is_known = (self.several > 0) & self.several.isfinite()
        return torch.where(is_known, self.single / self.several, torch.nan)


def single_step_ratio(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    step: float,
    geometry: Geometry,
    num_steps: int = NUM_STEPS,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    side_inputs: SideInputs = None,
) -> Tensor:
    r"""Compare the divergence after one step with that after several in the same ball, per example.

    .. math:: \frac{\mathrm{KL}(p_x \,\|\, p_{x + \epsilon v})}{\max_i \mathrm{KL}(p_x \,\|\, p_{x + \delta_i})}

    with the direction :math:`v` of :class:`fisher_reg.KLPenalty`. The search begins at
    :math:`\delta_0 = \epsilon v / 2`. Each step goes half-way to the steepest point of the ball (Frank and Wolfe),
    :math:`\delta_{i+1} = (\delta_i + \epsilon s_i) / 2` for the steepest perturbation :math:`s_i` of norm 1 at
    :math:`\delta_i`. The end of the single step is one of the candidates. The denominator is a lower bound of the
    largest divergence in the ball, so the ratio is at least that of the single step to this divergence.

    A network that is trained with perturbations of one step can become flat only at their ends: catastrophic
    overfitting (arXiv 2001.03994, 2007.02617). The ratio then decreases. It is 1 for a linear function of two classes.

    Args:
        model: As in :func:`fisher_reg.fisher_spectral_norm`, like all arguments that are not named here.
        inputs: ``(B, *S)``.
        step: Length :math:`\epsilon` in the geometry, in the input unit (in pixels with ``input_std``).
        geometry: :class:`fisher_reg.L2` or :class:`fisher_reg.LInf`.
        num_steps: Number of steps of the search, at least 1.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        side_inputs: More arguments of the model.

    Returns:
        ``(B,)`` in [0, 1], without gradient; NaN where no divergence above zero was found, or one that is not finite.
        Cost: ``num_steps + 3`` forwards and ``num_steps + 1`` backward passes to the inputs.

    Raises:
        ValueError: If ``step`` or ``num_steps`` is not positive, and as in :func:`fisher_reg.fisher_spectral_norm`.

    Example:
        >>> from fisher_reg import LInf
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> single_step_ratio(lambda x: x @ weight.T, torch.ones(1, 2), step=0.1, geometry=LInf())
        tensor([1.])
    """
    GEOMETRY.check(geometry, "single_step_ratio")
    if not step > 0:
        raise ValueError(f"single_step_ratio needs a step > 0, in the input unit; got {step}.")
    if num_steps < 1:
        raise ValueError(f"single_step_ratio needs num_steps >= 1; got {num_steps}.")
    with evaluation_operator(model, inputs, likelihood, input_std, side_inputs) as fisher:
        return step_divergences(fisher, step, geometry, num_steps).ratio


def step_divergences(
    fisher: InputFisher, step: float, geometry: Geometry, num_steps: int = NUM_STEPS
) -> StepDivergences:
    """Search from an operator's inputs, by one step and by several; see :func:`single_step_ratio`."""
    direction = geometry.steepest(fisher.slope(towards_runner_up(fisher)))
    single = _divergence(fisher, step * direction)
    # the gradient of the divergence is zero at x: without a direction the search must begin elsewhere
    has_none = ~direction.any(1, keepdim=True)
    moved = step / 2 * torch.where(has_none, geometry.steepest(torch.ones_like(direction)), direction)
    largest = single
    for _ in range(num_steps):
        found, slope = _with_slope(fisher, moved)
        largest = torch.maximum(largest, found)
        # a ball is convex, so the midpoint is in it: no projection
        moved = (moved + step * geometry.steepest(slope)) / 2
    return StepDivergences(single, torch.maximum(largest, _divergence(fisher, moved)))


def towards_runner_up(fisher: InputFisher) -> Tensor:
    """Return the cotangent ``(B, K)`` along which the two most probable classes approach each other."""
    logits = fisher.logits.detach()
    contrast, _ = fisher.likelihood.contrast(logits)
    return torch.where((contrast * present(logits)).sum(1, keepdim=True) < 0, contrast, -contrast)


def _divergence(fisher: InputFisher, displacement: Tensor) -> Tensor:
    """Return the divergence ``(B,)`` at a displacement ``(B, d)``."""
    with torch.no_grad():
        return fisher.likelihood.divergence(fisher.logits.detach(), fisher.logits_at(displacement))


def _with_slope(fisher: InputFisher, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence ``(B,)`` at a displacement ``(B, d)`` and its gradient ``(B, d)`` there."""
    with torch.enable_grad():
        leaf = displacement.detach().requires_grad_()
        divergence = fisher.likelihood.divergence(fisher.logits.detach(), fisher.logits_at(leaf))
        (slope,) = torch.autograd.grad(divergence.sum(), leaf)
    return divergence.detach(), slope
