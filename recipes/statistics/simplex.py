"""The downhill simplex method of Nelder and Mead for many small problems together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Objective = Callable[[Array, Array], Array]

_STEPS_PER_PARAMETER = 200
_TOLERANCE = 1e-4
"""Tolerance of parameters and values at convergence; both constants are those of ``scipy.optimize.fmin``."""


# scipy.optimize.minimize takes 70 s for the 2,000 fits that CLEVER needs per network; this takes 7 s.
def nelder_mead(objective: Objective, start: Array) -> Array:
    """Minimise ``M`` functions of ``d`` parameters, with the same steps as scipy's ``minimize(method="Nelder-Mead")``.

    Args:
        objective: ``objective(parameters, rows)`` returns the values ``(m,)`` of the functions ``rows`` ``(m,)`` at
            ``(m, d)``.
        start: ``(M, d)``.

    Returns:
        The best vertices ``(M, d)`` after at most ``200 d`` steps each.
    """
    size = start.shape[1]
    corners = np.repeat(start[:, None], size + 1, 1)
    for place in range(size):
        moved = start[:, place]
        corners[:, place + 1, place] = np.where(moved != 0, 1.05 * moved, 0.00025)
    rows = np.arange(len(start))
    values = np.stack([objective(corner, rows) for corner in corners.swapaxes(0, 1)], 1)
    for _ in range(_STEPS_PER_PARAMETER * size):
        _sort(corners, values, rows)
        rows = rows[~_converged(corners[rows], values[rows])]
        if not len(rows):
            break
        _shrink(objective, corners, values, _replace_worst(objective, corners, values, rows))
    _sort(corners, values, rows)
    return np.asarray(corners[:, 0])


def _sort(corners: Array, values: Array, rows: Array) -> None:
    order = values[rows].argsort(1, kind="stable")
    corners[rows] = np.take_along_axis(corners[rows], order[..., None], 1)
    values[rows] = np.take_along_axis(values[rows], order, 1)


def _converged(corners: Array, values: Array) -> Array:
    with np.errstate(invalid="ignore"):  # inf - inf
        is_flat = np.abs(values[:, 1:] - values[:, :1]).max(1) <= _TOLERANCE
    return np.asarray(is_flat & (np.abs(corners[:, 1:] - corners[:, :1]).max((1, 2)) <= _TOLERANCE))


def _replace_worst(objective: Objective, corners: Array, values: Array, rows: Array) -> Array:
    """Reflect, expand or contract the sorted simplices ``rows`` in place; return the rows that have to shrink."""
    centre, worst = corners[rows, :-1].mean(1), corners[rows, -1]
    reflected = 2 * centre - worst
    value = objective(reflected, rows)
    expands, is_fair, is_better = value < values[rows, 0], value < values[rows, -2], value < values[rows, -1]
    weight = np.where(expands, 2.0, np.where(is_better, 0.5, -0.5))[:, None]
    other, other_value = centre + weight * (centre - worst), np.full(len(rows), np.inf)
    again = expands | ~is_fair
    other_value[again] = objective(other[again], rows[again])
    bar = np.where(is_better, value, values[rows, -1])
    # an outer contraction is accepted if it is at least as good as the reflection, all others only if better
    takes_other = again & ((other_value < bar) | (~expands & is_better & (other_value == bar)))
    replaced = takes_other | expands | is_fair
    corners[rows[replaced], -1] = np.where(takes_other[:, None], other, reflected)[replaced]
    values[rows[replaced], -1] = np.where(takes_other, other_value, value)[replaced]
    return np.asarray(rows[~replaced])


def _shrink(objective: Objective, corners: Array, values: Array, rows: Array) -> None:
    best = corners[rows, 0]
    for place in range(1, corners.shape[1]):
        corners[rows, place] = best + 0.5 * (corners[rows, place] - best)
        values[rows, place] = objective(corners[rows, place], rows)
