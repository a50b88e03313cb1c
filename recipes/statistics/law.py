r"""Robust accuracy from λ: a logistic law per image.

To second order, a change of length :math:`\epsilon` causes a divergence of :math:`\tfrac12 \lambda \epsilon^2` at most.
An image that is classified correctly therefore keeps its class under an attack of radius :math:`\epsilon` with a
probability that is assumed to depend on :math:`\epsilon^2 \lambda` alone,

.. math:: P(\text{robust}) = \operatorname{sigmoid}\bigl(a + b \log_{10}(\epsilon^2 \lambda)\bigr) .
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from recipes.statistics.agreement import Array

_SMALLEST = 1e-30  # in place of λ = 0


@dataclass(frozen=True)
class Law:
    """The coefficients.

    Attributes:
        intercept: a.
        slope: b.
    """

    intercept: float
    slope: float

    @classmethod
    def fit(cls, values: Array, radii: Array, is_robust: Array) -> Law:
        """Fit by maximum likelihood to pairs of a correctly classified image and an attack.

        Args:
            values: λ, ``(N,)``.
            radii: Of the attacks, ``(N,)``.
            is_robust: Whether the image kept its class, ``(N,)``.

        Returns:
            The law.
        """
        model = LogisticRegression(C=np.inf).fit(_feature(values, radii)[:, None], is_robust)
        return cls(float(model.intercept_[0]), float(model.coef_[0, 0]))

    def survival(self, values: Array, radius: float) -> Array:
        """Return the probability that correctly classified images keep their class.

        Args:
            values: λ, ``(B,)``, in nats per squared pixel value.
            radius: Of the attack, Euclidean, in pixel values.

        Returns:
            Probabilities ``(B,)``.
        """
        return np.asarray(expit(self.intercept + self.slope * _feature(values, radius)))


def _feature(values: Array, radius: Array | float) -> Array:
    return np.asarray(np.log10(np.maximum(values, _SMALLEST) * np.square(radius)))
