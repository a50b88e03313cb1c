"""Detection of catastrophic overfitting: divergences after one step and after several, logged with a warning."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fisher_reg.callbacks.probe import Part
from fisher_reg.callbacks.regularizer import FisherRegularizer
from fisher_reg.estimate import evaluation_operator
from fisher_reg.evaluation import is_sharded
from fisher_reg.penalty import KLPenalty
from fisher_reg.single_step import step_divergences

COLUMNS = ("single_step", "several_steps")
"""Divergences per example, after one step and after several."""


def single_step_penalty(callbacks: Iterable[pl.Callback]) -> KLPenalty | None:
    """Return the first :class:`KLPenalty` among the regularizers; None without one."""
    for one in callbacks:
        if isinstance(one, FisherRegularizer) and one.weight > 0 and isinstance(one.penalty, KLPenalty):
            return one.penalty
    return None


def after_steps(model: nn.Module, part: Part, penalty: KLPenalty, takes_parts: bool) -> tuple[Tensor, Tensor]:
    """Return the divergences after one step and after several, ``(B,)`` each; NaN beyond the first examples."""
    count = int((part.places < _NUM_EXAMPLES).sum())
    # with sharded weights each forward is a collective operation of all processes
    if is_sharded(model) or (count and not takes_parts):
        count = len(part)
    divergences = torch.full((2, len(part)), torch.nan, dtype=torch.float64)
    if count:
        few = part.part(slice(count))
        settings = penalty.likelihood, penalty.input_std
        with evaluation_operator(model, few.inputs, *settings, few.side_inputs) as fisher:
            found = step_divergences(fisher, penalty.step, penalty.geometry)
        divergences[:, :count] = torch.stack([found.single, found.several]).cpu()
    single, several = divergences
    return single, several


def means(single: Tensor, several: Tensor) -> tuple[float, float]:
    """Return the means over the examples ``(N,)`` where both values are finite; NaN without such examples."""
    is_known = single.isfinite() & several.isfinite()
    return float(single[is_known].mean()), float(several[is_known].mean())


def ratio(single: Tensor, several: Tensor) -> float:
    """Return the mean divergence after one step divided by that after several, in [0, 1]; NaN if unknown."""
    of_one, of_several = means(single, several)
    return of_one / of_several if of_several > 0 else math.nan


def warning(single: Tensor, several: Tensor) -> str | None:
    """Return the warning, or None.

    There is no warning if several steps find almost no divergence either, as in an untrained network.
    """
    of_one, of_several = means(single, several)
    if of_several > _MATTERS and of_one < _MISSES * of_several:
        return _MESSAGE.format(of_one, of_several)
    return None


_NUM_EXAMPLES = 64  # the first examples of the data, enough for an accurate mean

_MISSES = 0.25  # convolutional networks had 0.27 or more before catastrophic overfitting, and less soon after it

_MATTERS = 0.05  # nats; untrained networks had 0.03, and a ratio of 0.2

_MESSAGE = (
    "found that a single step no longer finds large divergences: after the single step of KLPenalty the mean "
    "divergence is {:.2g} nats, after several steps in the same ball {:.2g}. The network may have become flat only at "
    "the end of the single step (catastrophic overfitting). Use a smaller step, or a smooth activation (SiLU, "
    "GELU), or stop before this epoch; a warm-up (warmup_steps) alone may not prevent it. Evaluate with an attack of "
    "many steps, such as AutoAttack, not with a single step."
)
