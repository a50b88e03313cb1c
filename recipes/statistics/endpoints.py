"""The upper end point of a distribution from maxima, by a reverse Weibull fit, as in the code of CLEVER's authors.

The adversarial-robustness-toolbox fits from one start by moments, for which part of the sample is outside the support:
its end points are often below the largest maximum, and sometimes far above.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import xlogy
from scipy.stats import kstwo

from recipes.statistics.simplex import Array, nelder_mead

_SHAPES = (0.1, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Of the starts."""
_SCALE_WEIGHT = 0.01
"""Weight of the squared scale in the penalised negative log-likelihood."""
_MIN_P_VALUE = 0.001
_MAX_NUMBERS = 2**18
"""Number of maxima that are fitted together."""
_OUTSIDE = 100 * math.log(np.finfo(float).max)
"""Penalty in the negative log-likelihood for each observation outside the support, as in scipy."""


def upper_ends(maxima: Array) -> Array:
    """Return the end points ``(M,)`` of the distributions of ``M`` samples ``(M, n)``.

    Each sample is scaled to [0, 1], and a distribution is fitted from each start. The fit with the largest p-value of
    the Kolmogorov-Smirnov test is used; if none reaches 0.001, the largest maximum. The latter is usual for hundreds of
    maxima from one pool, which have many ties. For constant samples (up to rounding) the end point is their value.
    """
    ends: Array = maxima.max(1).astype(float)
    spread = np.ptp(maxima, axis=1) > 16 * np.finfo(maxima.dtype).eps * ends
    rows, step = spread.nonzero()[0], max(1, _MAX_NUMBERS // maxima.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        ends[part] = _fitted(maxima[part])
    return ends


def _fitted(maxima: Array) -> Array:
    top, width = maxima.max(1), np.ptp(maxima, axis=1)
    sample = np.sort((top[:, None] - maxima) / width[:, None], axis=1).astype(float)
    starts = np.concatenate([_start(sample, shape) for shape in _SHAPES])
    fits = nelder_mead(_loss(np.tile(sample, (len(_SHAPES), 1))), starts).reshape(len(_SHAPES), len(sample), 3)
    fitness = np.nan_to_num([_p_value(sample, fit) for fit in fits])
    best = fits[fitness.argmax(0), np.arange(len(sample))]
    return np.asarray(top - width * np.where(fitness.max(0) < _MIN_P_VALUE, 0.0, best[:, 1]))


def _start(sample: Array, shape: float) -> Array:
    """Return shape, location and scale ``(M, 3)`` by moments, as scipy did when CLEVER was published.

    Unlike the starts of the current ``weibull_min.fit``, the support contains the sample.
    """
    scale, least = np.sqrt(sample.var(1)), sample.min(1)
    location = sample.mean(1) - scale
    is_beyond = location >= least
    location = np.where(is_beyond, least - 0.1 * np.ptp(sample, axis=1), location)
    return np.stack([np.full(len(sample), shape), location, np.where(is_beyond, 1.0, scale)], 1)


def _loss(sample: Array) -> Callable[[Array, Array], Array]:
    """Return the penalised negative log-likelihood of Weibull distributions for samples ``(M, n)``."""

    def loss(parameters: Array, rows: Array) -> Array:
        shape, location, scale = parameters.T[..., None]
        with np.errstate(all="ignore"):
            y = (sample[rows] - location) / scale
            terms = np.log(shape) + xlogy(shape - 1, y) - y**shape
            is_inside = (y >= 0) & np.isfinite(terms)
            total = -np.where(is_inside, terms, 0.0).sum(1) + _OUTSIDE * (~is_inside).sum(1)
            total = total + sample.shape[1] * np.log(scale[:, 0]) + _SCALE_WEIGHT * scale[:, 0] ** 2
        return np.where((shape > 0) & (scale > 0), total[:, None], np.inf)[:, 0]

    return loss


def _p_value(sample: Array, fit: Array) -> Array:
    """Return the p-values ``(M,)`` of the Kolmogorov-Smirnov test of sorted samples ``(M, n)``."""
    n = sample.shape[1]
    shape, location, scale = fit.T[..., None]
    with np.errstate(over="ignore"):
        cdf = -np.expm1(-(((sample - location).clip(0) / scale) ** shape))
    steps = np.arange(n + 1) / n
    distance = np.maximum(steps[1:] - cdf, cdf - steps[:-1]).max(1)
    return np.asarray(kstwo.sf(distance, n))
