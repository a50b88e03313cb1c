r"""Robust accuracy from λ: a logistic law per image, fitted to the images of ``recipes.compare``.

To second order, a change of length :math:`\epsilon` causes a divergence of :math:`\tfrac12 \lambda \epsilon^2` at most.
An image that is classified correctly therefore keeps its class under an attack of radius :math:`\epsilon` with a
probability that depends on :math:`\epsilon^2 \lambda` alone,

.. math:: P(\text{robust}) = \operatorname{sigmoid}\bigl(a + b \log_{10}(\epsilon^2 \lambda)\bigr) ,

with :math:`a` and :math:`b` from the images of other networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from recipes.compare.powers import NETWORK
from recipes.statistics.agreement import Array

_SMALLEST = 1e-30  # in place of λ = 0


@dataclass(frozen=True)
class Law:
    """The law of one metric.

    Attributes:
        metric: Column of the examples: ``lambda`` or ``lambda_tempered``.
        intercept: a.
        slope: b, negative.
    """

    metric: str
    intercept: float
    slope: float

    def survival(self, values: Array, radius: float) -> Array:
        """Return the probability that correctly classified images ``(B,)`` keep their class.

        Args:
            values: Of the metric, ``(B,)``, in nats per squared pixel value.
            radius: Of the attack, Euclidean, in pixel values.
        """
        return np.asarray(expit(self.intercept + self.slope * _feature(values, radius)))


def fitted(examples: pd.DataFrame, metric: str, radii: Mapping[str, float]) -> Law:
    """Fit the law by maximum likelihood to correctly classified images.

    Args:
        examples: Of ``recipes.compare``: a row per network and image.
        metric: Column.
        radii: Radius of each attack, by the name in ``misclassified_<name>``.

    Returns:
        The law.
    """
    right = examples[examples.correct]
    features = np.concatenate([_feature(right[metric].to_numpy(), radius) for radius in radii.values()])
    robust = np.concatenate([~right[f"misclassified_{name}"].to_numpy(dtype=bool) for name in radii])
    model = LogisticRegression(C=np.inf).fit(features[:, None], robust)
    return Law(metric, float(model.intercept_[0]), float(model.coef_[0, 0]))


def held_out(examples: pd.DataFrame, metric: str, radii: Mapping[str, float], group: str) -> pd.DataFrame:
    """Predict the accuracy of each network under each attack by a law that is fitted without its group.

    Args:
        examples: As in :func:`fitted`.
        metric: Column.
        radii: As in :func:`fitted`.
        group: Column whose values are left out in turn: ``model`` (the family of networks) or ``dataset``.

    Returns:
        A row per network and attack: ``radius``, ``observed`` and ``predicted`` accuracy.
    """
    rows = []
    for value in examples[group].unique():
        law = fitted(examples[examples[group] != value], metric, radii)
        for key, images in examples[examples[group] == value].groupby(NETWORK, sort=False):
            for name, radius in radii.items():
                rows.append(
                    dict(zip(NETWORK, key, strict=True))
                    | {"metric": metric, "left_out": group, "radius": radius}
                    | {"observed": float((images.correct & ~images[f"misclassified_{name}"].astype(bool)).mean())}
                    | {"predicted": float((images.correct * law.survival(images[metric].to_numpy(), radius)).mean())}
                )
    return pd.DataFrame(rows)


def _feature(values: Array, radius: float) -> Array:
    return np.asarray(np.log10(np.maximum(values, _SMALLEST) * radius**2))
