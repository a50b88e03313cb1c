"""Agreement of two rankings of networks, with bootstrap intervals and permutation tests.

Values are arrays ``(models, seeds)``, one pair for each group of networks that can be compared (for example a data
set). A statistic over several groups is its mean over them. The groups contain the same models in the same order, and
are resampled and permuted together, since the results of one model in several groups are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

Array = np.ndarray[Any, Any]
Pair = tuple[Array, Array]
Statistic = Callable[[Array, Array], Array]
Merge = Callable[[Array], Array]

INTERVAL = (0.025, 0.975)
SIGNIFICANCE = 0.05
MIN_MODELS = 3
"""By chance two models have the same order in half of the cases."""
_BATCH = 2000  # permutations in memory at once


def grid(rows: pd.DataFrame, column: str) -> Array:
    """Return a column of a frame with ``model`` and ``seed`` as ``(models, seeds)``."""
    table = rows.pivot(index="model", columns="seed", values=column)
    result: Array = table.reindex(rows.model.unique()).to_numpy(float)
    return result


def mean_over_seeds(values: Array) -> Array:
    """Return one value per model, ``(..., models, seeds)`` to ``(..., models)``."""
    return np.asarray(values.mean(-1))


def every_network(values: Array) -> Array:
    """Return one value per network, ``(..., models, seeds)`` to ``(..., models * seeds)``."""
    return values.reshape(*values.shape[:-2], -1)


def tau(one: Array, other: Array) -> Array:
    """Return Kendall's tau-b along the last axis, NaN for constants."""
    pairs = [(values[..., :, None], values[..., None, :]) for values in (one, other)]
    signs = [1.0 * (left > right) - (left < right) for left, right in pairs]  # infinities are equal
    return _cosine(*(sign.reshape(*sign.shape[:-2], -1) for sign in signs))


def rho(one: Array, other: Array) -> Array:
    """Return Spearman's rank correlation along the last axis, NaN for constants."""
    ranks = [stats.rankdata(values, axis=-1) for values in (one, other)]
    return _cosine(*(rank - rank.mean(-1, keepdims=True) for rank in ranks))


def _cosine(one: Array, other: Array) -> Array:
    lengths = np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.asarray((one * other).sum(-1) / np.where(lengths == 0, np.nan, lengths))


def agreement(groups: Sequence[Pair], statistic: Statistic, merge: Merge) -> Array:
    """Return the mean of the statistic over the groups in which it is defined."""
    values = np.stack([statistic(merge(one), merge(other)) for one, other in groups])
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, values, 0).sum(0) / defined.sum(0))


def interval(groups: Sequence[Pair], statistic: Statistic, merge: Merge, num_resamples: int) -> tuple[float, float]:
    """Bootstrap models, and seeds within each; a draw of only one model has no order and is left out."""
    generator = np.random.default_rng(0)
    draws = [_drawn(groups, generator) for _ in range(num_resamples)]
    stacked = [
        (np.stack([one for one, _ in group]), np.stack([other for _, other in group]))
        for group in zip(*draws, strict=True)
    ]
    return quantiles(agreement(stacked, statistic, merge))


def _drawn(groups: Sequence[Pair], generator: np.random.Generator) -> list[Pair]:
    shape = groups[0][0].shape
    models = generator.integers(shape[0], size=shape[0])
    seeds = generator.integers(shape[1], size=shape)  # the same for each draw of a model, so that such pairs are ties

    def draw(part: Array) -> Array:
        return np.asarray(np.take_along_axis(part, seeds, 1)[models])

    return [(draw(one), draw(other)) for one, other in groups]


def p_value(groups: Sequence[Pair], statistic: Statistic, merge: Merge, num_resamples: int) -> float:
    """Permute the models of the second ranking, equally in all groups and each with all its seeds.

    Returns:
        The two-sided p-value, exact for few models.
    """
    if np.isnan(agreement(groups, statistic, merge)):
        return math.nan

    def permuted(order: Array, axis: int) -> Array:
        place = np.moveaxis(order.astype(int), axis, -1)
        return agreement([(one, other[place]) for one, other in groups], statistic, merge)

    tested = stats.permutation_test(
        (np.arange(len(groups[0][0])),),
        permuted,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=num_resamples,
        batch=_BATCH,
        random_state=np.random.default_rng(0),
    )
    return float(tested.pvalue)


def quantiles(values: Array) -> tuple[float, float]:
    """Return the ends of the interval of bootstrapped values; NaN if none is defined."""
    defined = values[~np.isnan(values)]
    low, high = np.quantile(defined, INTERVAL) if len(defined) else (math.nan, math.nan)
    return float(low), float(high)
