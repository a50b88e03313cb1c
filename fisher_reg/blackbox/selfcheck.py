r"""The self-check of the step length: the same directions at several lengths, and steps beyond the range of the input.

The *energy* of a vector is its squared norm. In quotients :math:`y_i = (g(x + h_i v) - g(x)) / h_i` at lengths
:math:`h_{i+1} = r h_i`, rounding causes an error of energy :math:`\nu / h_i^2`, and curvature one of energy
:math:`\kappa h_i^2`. The relative energies of the differences,

.. math:: D_i = |y_i - y_{i+1}|^2 / |y_{i+1}|^2 ,

contain at least the rounding error at the shorter length and :math:`(1 - 1/r)^2` of the curvature error at the longer
one. At :math:`h_i` the rounding error is thus at most :math:`D_{i-1} / r^2 \cdot r^2 / (r^2 + 1)`, about
:math:`D_{i-1} / r^2`, and the curvature error at most :math:`D_i / (r - 1)^2`. A jump, of a rounded input or of a
forest, is an error at every length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.blackbox.questions import Questions
from fisher_reg.blackbox.service import Service

RATIO = 5.0
_NUM_DIRECTIONS = 4
_NUM_OUTWARD = 2  # of the directions
_MIN_SHARE = 1e-3  # of the energy: smaller shares may be rounding errors, or clipped pixels without effect
_MAX_IGNORED = 1e-3  # 1 for a function that is linear over the step, 0 for one that clips


@dataclass(frozen=True)
class Resolution:
    """The step length at which the quotients have the smallest error.

    Attributes:
        step: ``(B,)``.
        error: ``(B,)``. Relative energy of the error of the quotients at this length; infinite if no prediction
            changed.
        evenness: ``(B,)``. Relative energy of the even part of the quotients at this length, without its mean. It is
            small for curvature, and ``1 - 2 / pi`` for a kink at the input, a multiple of ``|v|`` in one direction.
        columns: ``(B, n, K)``. The quotients at that length.
        ignores_outward: ``(B,)``. Whether steps beyond the range of the example change nothing.
    """

    step: Tensor
    error: Tensor
    evenness: Tensor
    columns: Tensor
    ignores_outward: Tensor


def resolve(
    service: Service, questions: Questions, base: Tensor, lengths: Tensor, generator: torch.Generator
) -> Resolution:
    """Choose one of the inner ``lengths`` ``(L, B)``, which increase; ``base`` is ``g(x)``."""
    directions = [questions.direction(generator) for _ in range(_NUM_DIRECTIONS)]
    moves = torch.stack(  # (L, B, n, K)
        [torch.stack([service.roots(questions.point(h, v)) - base for v in directions], 1) for h in lengths]
    )
    y = moves / lengths[:, :, None, None]  # y_i = (g(x + h_i v) - g(x)) / h_i
    error, inner = _errors(y).min(0)
    each = torch.arange(len(base), device=base.device)
    step, ahead = lengths[inner + 1, each], y[inner + 1, each]
    behind = torch.stack([service.roots(questions.point(step, -v)) - base for v in directions], 1) / step[:, None, None]
    evenness = _energy((ahead + behind) / 2) / _energy(ahead)  # even part: (y(v) + y(-v)) / 2
    ignores = torch.zeros_like(error, dtype=torch.bool)
    if not questions.are_bounded:
        middle = len(lengths) // 2
        ends = [questions.point(lengths[middle], v) for v in directions[:_NUM_OUTWARD]]
        answers = [base + moves[middle, :, number] for number in range(_NUM_OUTWARD)]
        energies = [_outward(service, questions.inputs, *pair) for pair in zip(ends, answers, strict=True)]
        outward, inward = torch.stack(energies).sum(0)
        matters = inward > _MIN_SHARE * moves[middle, :, :_NUM_OUTWARD].square().sum((1, 2))
        ignores = matters & (outward < _MAX_IGNORED * inward)
    return Resolution(step, error, evenness, ahead, ignores)


def _errors(y: Tensor) -> Tensor:
    """Return the relative energy of the error at the inner lengths, ``(L - 2, B)``, of quotients ``(L, B, n, K)``."""
    difference = _energy(y[1:] - y[:-1]) / _energy(y[1:])  # D_i
    errors = difference[:-1] / RATIO**2 + difference[1:] / (RATIO - 1) ** 2  # D_{i-1} / r^2 + D_i / (r - 1)^2
    return errors.nan_to_num(torch.inf, torch.inf)


def _energy(columns: Tensor) -> Tensor:
    """Return the energy of columns ``(..., n, K)`` about their mean, which the estimate removes."""
    return (columns - columns.mean(-2, keepdim=True)).square().sum((-2, -1))


def _outward(service: Service, inputs: Tensor, end: Tensor, answer: Tensor) -> Tensor:
    """Return the energies ``(2, B)`` of the part of a step beyond the range of the example, and of its mirror image.

    The end of the range is the smallest or the largest value, whichever more pixels have. If a service clips there, the
    prediction at the end of the step equals that at its projection onto the range.
    """
    flat = inputs.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    is_low = (flat == low).sum(1, keepdim=True) >= (flat == high).sum(1, keepdim=True)
    moved = end.flatten(1)
    projected = torch.where(is_low, moved.maximum(low), moved.minimum(high))
    mirrored = 2 * projected - moved
    here, inside = (service.roots(question.view_as(inputs)) for question in (projected, mirrored))
    return torch.stack([(answer - here).square().sum(1), (inside - here).square().sum(1)])
