"""What an audit has measured, and what its attacks did. No network is run here."""

from __future__ import annotations

import math
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
from recipes.statistics.agreement import Array, rho

_NUM_RESAMPLES = 500
WIDE = Lanczos().tolerance
"""Width of an interval of λ, relative to its lower end, from which on it counts as wide."""
FAILURE_PROBABILITY = Lanczos().failure_probability
"""With which the interval of λ is wrong at any of the images: that of each is asked for at this over their number."""
CONFIDENCE = 0.95
"""Of the intervals that come from the number of images."""
BOUNDS = {"log10_global": "global", "log10_local": "local", "log10_blockwise": "blockwise"}


@dataclass(frozen=True)
class Attacked:
    """What became of the images under an attack.

    Attributes:
        attack: With its settings.
        result: Fields with leading axis ``B``.
        warnings: Of masked gradients.
        seconds: Wall clock.
    """

    attack: Attack
    result: AttackResult
    warnings: tuple[str, ...]
    seconds: float

    @property
    def ball(self) -> str | None:
        """In which the attack stays; none if it goes as far as it must."""
        attack: Any = self.attack
        if not hasattr(attack, "epsilon"):
            return None
        norm = {2: "ℓ₂", math.inf: "ℓ∞"}.get(attack.norm, attack.norm)
        return f"{norm} ≤ {attack.epsilon:.3g}"

    @property
    def needs_gradient(self) -> bool:
        """Whether no part of the attack can do without the gradient."""
        return not isinstance(self.attack, AutoAttack)


@dataclass(frozen=True)
class Shown:
    """The most sensitive images, the most sensitive one first.

    Attributes:
        index: ``(S,)``, into the images of the audit.
        eigenvalues: The largest ones ``(S, k)``, descending.
        eigenvectors: The first of each, ``(S, C, H, W)``, of unit length.
        moved: The images against and along it, clamped to [0, 1], ``(2, S, C, H, W)``.
        predicted: Classes of the images and of both moved ones, ``(3, S)``.
        confidence: Their probabilities, ``(3, S)``.
    """

    index: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    moved: Tensor
    predicted: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Sensitivity:
    """What is known of λ at each image beside its value; ``(B,)``, in double precision.

    Attributes:
        lower: Lower ends of the intervals of λ.
        upper: Upper ends. All intervals hold together, except with :data:`FAILURE_PROBABILITY`.
        interval_width: Relative to the lower end.
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
        identity: What tells this audit from every other one.
        network: What was audited, in words.
        data: On which images, in words.
        settings: As configured.
        images: ``(B, C, H, W)`` in [0, 1].
        labels: ``(B,)``.
        class_names: One per class, or none.
        measurement: Numbers per image.
        sensitivity: More about λ.
        attacks: By name.
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
        """Of the page."""
        return f"Audit of {self.network}"

    @property
    def correct(self) -> Tensor:
        """Whether the network is right, ``(B,)``."""
        return self.measurement.extra["correct"]

    @property
    def saturated(self) -> Tensor:
        """Whether the confidence leaves λ little room, ``(B,)``."""
        return self.measurement.extra["confidence"] > SATURATED

    def name_of(self, label: int) -> str:
        """Return the name of a class, or its number."""
        return str(self.class_names[label]) if self.class_names else str(label)


def share(hits: Tensor) -> dict[str, Any]:
    """Return the share of true values with its 95 % interval (Wilson's); NaN, from 0 to 1, of none."""
    if len(hits) == 0:
        return {"value": math.nan, "low": 0.0, "high": 1.0, "count": 0}
    test = binomtest(int(hits.sum()), len(hits))
    low, high = test.proportion_ci(CONFIDENCE, method="wilson")
    return {"value": float(test.statistic), "low": float(low), "high": float(high), "count": len(hits)}


def median(values: Tensor) -> dict[str, Any]:
    """Return the median of numbers that are not negative with its 95 % interval, 0 to infinity where there is none.

    The interval is that of the sign test: it takes six numbers.
    """
    if len(values) == 0:
        return {"value": math.nan, "low": 0.0, "high": math.inf, "count": 0}
    found = quantile_test(values.numpy(), p=0.5).confidence_interval(CONFIDENCE)
    ends = (0.0 if math.isnan(found.low) else found.low, math.inf if math.isnan(found.high) else found.high)
    middle = float(np.median(values.numpy()))
    return {"value": middle, "low": float(ends[0]), "high": float(ends[1]), "count": len(values)}


def ranking(values: Tensor, misclassified: Tensor) -> dict[str, float] | None:
    """Return the ROC-AUC of ``values`` for telling the misclassified images, with a 95 % bootstrap interval.

    Returns:
        Nothing if all images are misclassified, or none. ``p`` is that of Mann and Whitney's test: unlike the interval,
        it knows that two images can be in order by chance.
    """
    if bool(misclassified.all()) or not bool(misclassified.any()):
        return None
    sides = values[misclassified].numpy(), values[~misclassified].numpy()
    return {"value": float(_area(*sides)), **_interval(sides, _area), "p": float(mannwhitneyu(*sides).pvalue)}


def correlation(values: Tensor, distances: Tensor) -> dict[str, float] | None:
    """Return Spearman's correlation, with a 95 % bootstrap interval.

    Returns:
        Nothing for fewer than ten pairs, or if one side is constant.
    """
    sides = values.numpy(), distances.numpy()
    if len(values) < 10 or min(map(np.ptp, sides)) == 0:
        return None
    whole = spearmanr(*sides)
    found = _interval(sides, lambda one, other, axis: rho(one, other), paired=True)
    return {"value": float(whole.statistic), **found, "p": float(whole.pvalue)}


def _area(one: Array, other: Array, axis: int = -1) -> Array:
    """Return the area under the ROC curve: the share of pairs that Mann and Whitney's U counts."""
    wins = mannwhitneyu(one, other, axis=axis, method="asymptotic").statistic
    return np.asarray(wins / (one.shape[axis] * other.shape[axis]))


def _interval(sides: tuple[Array, Array], statistic: Callable[..., Array], *, paired: bool = False) -> dict[str, float]:
    drawn = bootstrap(
        [side.repeat(2) if len(side) == 1 else side for side in sides],  # scipy needs two; equal ones change nothing
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
    """Return what an attack did, as plain numbers.

    Among them how λ orders the images that were right: those that an attack within a radius changed before those that
    it did not, as ROC-AUC; or, without a radius, by the distance to the adversarial example, as Spearman's correlation.
    ``distance`` is of the adversarial examples that were found. ``distance_of_all`` is of all images that were right,
    with an infinite one where the attack found nothing: a few successes do not make it small.
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
