"""The results of an audit: measured numbers and attacks. No network runs here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap, mannwhitneyu, quantile_test, spearmanr
from torch import Tensor

from fisher_reg import Lanczos
from recipes.attacks import Attack, AttackResult, AutoAttack
from recipes.competitors.measurement import SATURATED, Measurement
from recipes.evaluate.identity import Identity
from recipes.reporting.tables import radius_text
from recipes.statistics.agreement import Array, rho

_NUM_RESAMPLES = 500
WIDE = Lanczos().tolerance
"""An interval of λ is called wide if its width, relative to its lower end, is above this value."""
FAILURE_PROBABILITY = Lanczos().failure_probability
"""Probability that any interval of λ is wrong; the interval at each image uses this over the number of images."""
CONFIDENCE = 0.95
"""Level of the intervals that come from the number of images."""
BOUNDS = {"log10_global": "global", "log10_local": "local", "log10_blockwise": "blockwise"}
_LENGTH = re.compile(r"\b(epsilon|step_size)=([0-9.e-]+)")


@dataclass(frozen=True)
class Attacked:
    """The images after an attack.

    Attributes:
        attack: The attack with its settings.
        result: The result, whose fields have a leading axis ``B``.
        warnings: Warnings of masked gradients.
        seconds: Wall-clock time.
    """

    attack: Attack
    result: AttackResult
    warnings: tuple[str, ...]
    seconds: float

    @property
    def ball(self) -> str | None:
        """The ball that contains the attacked images, as ``ℓ∞ ≤ 8/255``; ``None`` for an attack without a radius."""
        attack: Any = self.attack
        if not hasattr(attack, "epsilon"):
            return None
        norm = {2: "ℓ₂", math.inf: "ℓ∞"}.get(attack.norm, attack.norm)
        return f"{norm} ≤ {radius_text(attack.epsilon)}"

    @property
    def text(self) -> str:
        """The attack with its settings; radius and step are written as ``8/255`` where they are such a fraction."""
        return str(self.attack) if self.ball is None else _LENGTH.sub(_length_text, str(self.attack))

    @property
    def needs_gradient(self) -> bool:
        """Whether every part of the attack needs the gradient."""
        return not isinstance(self.attack, AutoAttack)


@dataclass(frozen=True)
class Shown:
    """The most sensitive images, the most sensitive one first.

    Attributes:
        index: Indices ``(S,)`` into the images of the audit.
        eigenvalues: The largest eigenvalues ``(S, k)``, descending.
        eigenvectors: The top eigenvectors ``(S, C, H, W)``, of unit length.
        moved: The images after a step against and along the eigenvector, clamped to [0, 1], ``(2, S, C, H, W)``.
        predicted: Predicted classes of the images and of both moved images, ``(3, S)``.
        confidence: Probabilities of these classes, ``(3, S)``.
    """

    index: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    moved: Tensor
    predicted: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Sensitivity:
    """Further numbers about λ at each image; ``(B,)``, in double precision.

    Attributes:
        lower: Lower ends of the intervals of λ.
        upper: Upper ends. All intervals hold together, except with probability :data:`FAILURE_PROBABILITY`.
        interval_width: Widths of the intervals, relative to the lower end.
        effective_rank: The trace over λ.
        kl_ratio: See :func:`fisher_reg.fisher_kl_ratio`.
        single_step_ratio: See :func:`fisher_reg.single_step_ratio`.
    """

    lower: Tensor
    upper: Tensor
    interval_width: Tensor
    effective_rank: Tensor
    kl_ratio: Tensor
    single_step_ratio: Tensor


@dataclass(frozen=True)
class Audit:
    """Everything that was measured, on the CPU.

    Attributes:
        identity: Identifies this audit: who, what, when and how.
        network: The audited network, as a text.
        data: The images, as a text.
        settings: The configuration.
        images: ``(B, C, H, W)`` in [0, 1].
        labels: ``(B,)``.
        class_names: One name per class, or empty.
        measurement: Numbers per image.
        sensitivity: Further numbers about λ.
        attacks: The attacked images by the name of the attack.
        shown: The most sensitive images.
    """

    identity: Identity
    network: str
    data: str
    settings: dict[str, Any]
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    measurement: Measurement
    sensitivity: Sensitivity
    attacks: dict[str, Attacked]
    shown: Shown

    @property
    def title(self) -> str:
        """The title of the page."""
        return f"Audit of {self.network}"

    @property
    def correct(self) -> Tensor:
        """Whether the network classifies each image correctly, ``(B,)``."""
        return self.measurement.extra["correct"]

    @property
    def saturated(self) -> Tensor:
        """Whether the softmax is saturated, so that λ is small, ``(B,)``."""
        return self.measurement.extra["confidence"] > SATURATED

    def name_of(self, label: int) -> str:
        """Return the name of a class, or its number if there are no names."""
        return str(self.class_names[label]) if self.class_names else str(label)


def _length_text(found: re.Match[str]) -> str:
    shown = radius_text(float(found[2]))
    return f"{found[1]}={shown}" if "/" in shown else found[0]


def share(hits: Tensor) -> dict[str, Any]:
    """Return the share of true values with its 95 % interval (Wilson's); NaN with the interval 0 to 1 for no values."""
    if len(hits) == 0:
        return {"value": math.nan, "low": 0.0, "high": 1.0, "count": 0}
    test = binomtest(int(hits.sum()), len(hits))
    low, high = test.proportion_ci(CONFIDENCE, method="wilson")
    return {"value": float(test.statistic), "low": float(low), "high": float(high), "count": len(hits)}


def median(values: Tensor) -> dict[str, Any]:
    """Return the median of non-negative numbers with its 95 % interval.

    The interval is that of the sign test, which needs six numbers. For fewer it is 0 to infinity.
    """
    if len(values) == 0:
        return {"value": math.nan, "low": 0.0, "high": math.inf, "count": 0}
    found = quantile_test(values.numpy(), p=0.5).confidence_interval(CONFIDENCE)
    ends = (0.0 if math.isnan(found.low) else found.low, math.inf if math.isnan(found.high) else found.high)
    middle = float(np.median(values.numpy()))
    return {"value": middle, "low": float(ends[0]), "high": float(ends[1]), "count": len(values)}


def ranking(values: Tensor, misclassified: Tensor) -> dict[str, float] | None:
    """Return the ROC-AUC of ``values`` as a score for misclassification, with a 95 % bootstrap interval.

    Returns:
        ``None`` if all images are misclassified, or no image is. ``p`` is the p-value of Mann and Whitney's test.
        Unlike the bootstrap, it allows for a correct order by chance among few images.
    """
    if bool(misclassified.all()) or not bool(misclassified.any()):
        return None
    sides = values[misclassified].numpy(), values[~misclassified].numpy()
    return {"value": float(_area(*sides)), **_interval(sides, _area), "p": float(mannwhitneyu(*sides).pvalue)}


def correlation(values: Tensor, distances: Tensor) -> dict[str, float] | None:
    """Return Spearman's correlation, with a 95 % bootstrap interval.

    Returns:
        ``None`` for fewer than ten pairs, or if one side is constant.
    """
    sides = values.numpy(), distances.numpy()
    if len(values) < 10 or min(map(np.ptp, sides)) == 0:
        return None
    whole = spearmanr(*sides)
    found = _interval(sides, lambda one, other, axis: rho(one, other), paired=True)
    return {"value": float(whole.statistic), **found, "p": float(whole.pvalue)}


def _area(one: Array, other: Array, axis: int = -1) -> Array:
    """Return the area under the ROC curve: Mann and Whitney's U over the number of pairs."""
    wins = mannwhitneyu(one, other, axis=axis, method="asymptotic").statistic
    return np.asarray(wins / (one.shape[axis] * other.shape[axis]))


def _interval(sides: tuple[Array, Array], statistic: Callable[..., Array], *, paired: bool = False) -> dict[str, float]:
    drawn = bootstrap(
        [
            side.repeat(2) if len(side) == 1 else side for side in sides
        ],  # scipy needs two values; two equal ones give the same result
        statistic,
        n_resamples=_NUM_RESAMPLES,
        vectorized=True,
        paired=paired,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    low, high = drawn.confidence_interval
    return {"low": float(low), "high": float(high)}


def outcome(audit: Audit, name: str) -> dict[str, Any]:
    """Return the results of an attack as plain numbers.

    Two of them show how λ ranks the correctly classified images. For an attack within a radius, ``auc_of_lambda`` is
    the ROC-AUC of λ for the images that become misclassified. For an attack without a radius, ``correlation_of_lambda``
    is Spearman's correlation of λ with the distance to the adversarial example. ``distance`` is the median distance of
    the adversarial examples that were found. ``distance_of_all`` is the median over all correctly classified images,
    with an infinite distance where the attack found nothing, so that a few successes do not make it small.
    """
    attacked, correct = audit.attacks[name], audit.correct
    result, values = attacked.result, audit.measurement.values["lambda"]
    broken = correct & result.misclassified
    distances = result.euclidean[broken]
    of_all = torch.where(result.misclassified, result.euclidean.double(), math.inf)[correct]
    return {
        "accuracy": share(~result.misclassified),
        "num_correct": int(correct.sum()),
        "num_adversarial": int(broken.sum()),
        "success": share(result.misclassified[correct]),
        "median_distance": float(distances.quantile(0.5)) if len(distances) else math.nan,
        "distance": median(distances.double()),
        "distance_of_all": median(of_all),
        "num_masked": int(attacked.result.masked.sum()),
        "auc_of_lambda": None if attacked.ball is None else ranking(values[correct], result.misclassified[correct]),
        "correlation_of_lambda": None if attacked.ball else correlation(values[broken], distances),
    }
