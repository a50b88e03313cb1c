"""Accuracy under attack of networks, predicted from λ by the images of other networks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from recipes.compare.powers import NETWORK
from recipes.statistics.law import Law


def fitted(examples: pd.DataFrame, metric: str, radii: Mapping[str, float]) -> Law:
    """Fit the law to the correctly classified images.

    Args:
        examples: Of ``recipes.compare``: a row per network and image.
        metric: Column of λ.
        radii: Radius of each attack, by the name in ``misclassified_<name>``.

    Returns:
        The law.
    """
    right = examples[examples.correct]
    return Law.fit(
        np.tile(right[metric].to_numpy(), len(radii)),
        np.repeat(list(radii.values()), len(right)),
        np.concatenate([~right[f"misclassified_{name}"].to_numpy(dtype=bool) for name in radii]),
    )


def held_out(examples: pd.DataFrame, metric: str, radii: Mapping[str, float], group: str) -> pd.DataFrame:
    """Predict the accuracy of each network under each attack by a law that is fitted without its group.

    Args:
        examples: As in :func:`fitted`.
        metric: As in :func:`fitted`.
        radii: As in :func:`fitted`.
        group: Column whose values are left out in turn: ``model`` (the family of networks) or ``dataset``.

    Returns:
        A row per network and attack: ``radius``, ``observed`` and ``predicted`` accuracy over all its images.
    """
    rows = []
    for value in examples[group].unique():
        law = fitted(examples[examples[group] != value], metric, radii)
        for key, images in examples[examples[group] == value].groupby(NETWORK, sort=False):
            names = dict(zip(NETWORK, key, strict=True)) | {"metric": metric, "left_out": group}
            rows += [names | _accuracies(images, metric, name, radius, law) for name, radius in radii.items()]
    return pd.DataFrame(rows)


def _accuracies(images: pd.DataFrame, metric: str, attack: str, radius: float, law: Law) -> dict[str, float]:
    robust = images.correct & ~images[f"misclassified_{attack}"].astype(bool)
    expected = images.correct * law.survival(images[metric].to_numpy(), radius)
    return {"radius": radius, "observed": float(robust.mean()), "predicted": float(expected.mean())}
