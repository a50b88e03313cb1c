"""The power of each metric to predict which images are misclassified under attack, with bootstrap intervals.

All networks of a data set use the same images, and the same model and training occurs on every data set. Therefore one
draw of the bootstrap takes images (the same for all networks of a data set), models with their training (the same for
all data sets), and seeds within them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from recipes.competitors.measurement import METRICS
from recipes.statistics.agreement import Array, quantiles

NETWORK = ["dataset", "model", "training", "seed"]


def example_table(examples: pd.DataFrame, attacks: Sequence[str], num_resamples: int) -> pd.DataFrame:
    """Return a row per metric and target: mean, 95 % interval and two-sided p-value of the bootstrap.

    Args:
        examples: A row per network and image, in the same order of images for all networks of a data set, with
            ``correct``, ``misclassified_<attack>``, the metrics, and ``distance``, infinite where no attack succeeded.
        attacks: The attacks whose success is predicted: by the area under the ROC curve (1/2 by chance), among the
            images that the network classifies correctly. The target ``distance`` is Spearman's correlation with
            nearness.
        num_resamples: Number of draws.

    Returns:
        Also ``num_networks``, the number of networks for which the value is defined (not if an attack succeeds on all
        images or on none), of ``num_all``. A metric that is defined for no network has no row.
    """
    networks = [part for _, part in examples.groupby(NETWORK, sort=False)]
    draws = _image_draws(networks, num_resamples)
    places = _places(networks)
    models = _model_draws(places.max(0) + 1, num_resamples)
    rows = []
    for name, metric in METRICS.items():
        scores = [metric.sign * part[name].to_numpy() for part in networks]
        for target in [*attacks, "distance"]:
            values = np.full((*(places.max(0) + 1), num_resamples + 1), np.nan)
            for place, part, score, draw in zip(places, networks, scores, draws, strict=True):
                known = part.correct.to_numpy() & ~np.isnan(score)
                if target == "distance":
                    values[tuple(place)] = rank_correlations(score, -part.distance.to_numpy(), known, draw)
                else:
                    values[tuple(place)] = areas(score, part[f"misclassified_{target}"].to_numpy(), known, draw)
            defined = int(np.isfinite(values[..., 0]).sum())
            if defined:
                chance = 0.0 if target == "distance" else 0.5
                row: dict[str, Any] = {
                    "metric": name,
                    "target": target,
                    "statistic": "rho" if target == "distance" else "auc",
                }
                row |= {"num_networks": defined, "num_all": len(networks)}
                rows.append(row | _summary(values, models, chance))
    return defined_rows(rows)


def defined_rows(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return the rows as a frame.

    Raises:
        ValueError: If there are none.
    """
    if not rows:
        raise ValueError(
            "Nothing can be ordered: the networks classify too few of the images correctly, or every attack succeeds "
            "on all of them or none. Train longer, use more images or other attacks; finished work is cached."
        )
    return pd.DataFrame(rows)


# sklearn.metrics.roc_auc_score(sample_weight=) gives the same numbers in 400 times the time, since it takes one draw.
def areas(score: Array, misclassified: Array, known: Array, draws: Array) -> Array:
    """Return the area under the ROC curve for each draw of images ``(R, n)``; NaN if a class is empty."""
    counts = np.stack([np.bincount(draw, minlength=len(score)) for draw in draws]).astype(float)
    hit, robust = known & misclassified, known & ~misclassified
    if len(np.unique(score[known])) < 2:
        return np.full(len(draws), np.nan)
    one, other = score[hit][:, None], score[robust]
    wins = (one > other) + 0.5 * (one == other)
    number = counts[:, hit].sum(1) * counts[:, robust].sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.einsum("ra,ab,rb->r", counts[:, hit], wins, counts[:, robust], optimize=True) / number)


def rank_correlations(score: Array, nearness: Array, known: Array, draws: Array) -> Array:
    """Return Spearman's correlation for each draw of images ``(R, n)``, over those that are known."""
    drawn = known[draws]
    centred = []
    for values in (score, nearness):
        ranks = pd.DataFrame(np.where(known, values, np.nan)[draws]).rank(axis=1).to_numpy()
        mean = np.where(drawn, ranks, 0).sum(1, keepdims=True) / drawn.sum(1, keepdims=True).clip(1)
        centred.append(np.where(drawn, ranks - mean, 0))
    one, other = centred
    lengths = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    return np.asarray((one * other).sum(1) / np.where(lengths == 0, np.nan, lengths))


def _image_draws(networks: Sequence[pd.DataFrame], num_resamples: int) -> list[Array]:
    """Return the images ``(R + 1, n)`` of each draw; the first draw is the original, and a data set has equal draws."""
    draws: dict[str, Array] = {}
    for part in networks:
        dataset = part.dataset.iloc[0]
        if dataset not in draws:
            drawn = np.random.default_rng(len(draws)).integers(len(part), size=(num_resamples, len(part)))
            draws[dataset] = np.concatenate([np.arange(len(part))[None], drawn])
    return [draws[part.dataset.iloc[0]] for part in networks]


def _places(networks: Sequence[pd.DataFrame]) -> Array:
    """Return data set, model with training, and seed of each network as numbers ``(N, 3)``."""
    names = [part[NETWORK].iloc[0] for part in networks]
    keys = [(name.dataset, (name.model, name.training), name.seed) for name in names]
    return np.stack([pd.factorize(pd.Series(column))[0] for column in zip(*keys, strict=True)], 1)


def _model_draws(sizes: Array, num_resamples: int) -> list[tuple[Array, Array]]:
    generator = np.random.default_rng(0)
    _, num_models, num_seeds = sizes
    return [
        (generator.integers(num_models, size=num_models), generator.integers(num_seeds, size=(num_models, num_seeds)))
        for _ in range(num_resamples)
    ]


def _summary(values: Array, models: Sequence[tuple[Array, Array]], chance: float) -> dict[str, float]:
    drawn = np.array(
        [
            _mean(np.take_along_axis(values[..., draw], seeds[None], 2)[:, chosen])
            for draw, (chosen, seeds) in enumerate(models, 1)
        ]
    )
    low, high = quantiles(drawn)
    drawn = drawn[~np.isnan(drawn)]
    beyond = min((drawn <= chance).sum(), (drawn >= chance).sum())
    return {
        "value": _mean(values[..., 0]),
        "low": low,
        "high": high,
        "p": min(1.0, 2 * (1 + beyond) / (1 + len(drawn))),
    }


def _mean(values: Array) -> float:
    """Return the mean of the defined values."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else np.nan
