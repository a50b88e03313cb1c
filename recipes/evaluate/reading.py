"""The numbers of an audit in sentences, which claim no more than the numbers show."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fisher_reg import MarginTempered
from recipes.competitors.measurement import SATURATED
from recipes.evaluate.audit import BOUNDS, Audit, outcome, share
from recipes.evaluate.reference import comparison

_STEP = 0.1  # length of the step whose divergence is given, in pixel units
_SECOND_ORDER = 0.5  # nats, above which the second-order value is too large to be accurate
_SIGNIFICANCE = 0.05  # level of each single test, without a correction for multiple testing
_ROUND_OFF = 1e-5  # tolerance in log10 by which an estimate may exceed a bound


def reading(audit: Audit) -> list[str]:
    """Return the paragraphs, from the accuracy to the queries without derivatives."""
    parts = (_accuracy, _lambda, _saturation, comparison, _attacks, _rankings, _bounds, _black_box)
    return [text for part in parts for text in part(audit)]


def of_all(found: dict[str, Any]) -> str:
    """Return a share of :func:`recipes.evaluate.audit.share` with its interval, in percent."""
    return f"{found['value']:.1%} (95 % interval {found['low']:.1%} to {found['high']:.1%})"


def interval(found: dict[str, float]) -> str:
    """Return a number with its interval."""
    return f"{found['value']:.2f} (95 % interval {found['low']:.2f} to {found['high']:.2f})"


def _accuracy(audit: Audit) -> list[str]:
    found = share(audit.correct)
    return [
        f"The network classifies {of_all(found)} of {found['count']} images correctly. All other statements are "
        "also about these images."
    ]


def _lambda(audit: Audit) -> list[str]:
    values, count = audit.measurement.values, len(audit.images)
    middle, num_zero = float(values["lambda"].quantile(0.5)), int((values["lambda"] == 0).sum())
    texts = []
    if num_zero:
        texts.append(
            f"λ is exactly zero at {num_zero} of {count} images, because the softmax is saturated there beyond the "
            "floating-point precision. λ gives no information about these images. They are not necessarily robust."
        )
    if middle > 0:
        nats = 0.5 * middle * _STEP**2
        doubt = (
            " This value is too large for the second-order approximation. It only shows that such a step can change "
            "the prediction strongly."
        )
        texts.append(
            f"λ is {middle:.3g} nats / pixel² at the median image. To second order, a step of length ε = {_STEP} pixel "
            f"units in the most sensitive direction changes the prediction by ½ λ ε² = {nats:.2g} nats "
            f"(Kullback-Leibler divergence). No other direction changes it more.{doubt if nats > _SECOND_ORDER else ''}"
        )
        rank, size = float(audit.sensitivity.effective_rank.quantile(0.5)), audit.images[0].numel()
        texts.append(
            f"The effective rank of the Fisher matrix (trace over λ) is {rank:.2g} at the median image, out of {size} "
            "directions. The divergence of a step of the same length in a random direction is smaller by a factor of "
            f"{size / rank:.0f} on average."
        )
    return texts


def _saturation(audit: Audit) -> list[str]:
    tempered, likelihood = audit.measurement.values["lambda_tempered"], MarginTempered()
    middle = float(tempered.quantile(0.5))
    num_saturated, count = int(audit.saturated.sum()), len(audit.images)
    texts = []
    if num_saturated:
        texts.append(
            f"{num_saturated} of {count} predictions have a confidence above {SATURATED}. λ is small at these images "
            "because p (1 - p) is small, even where the gradients of the logits are large. Another class can be nearer "
            "than λ suggests."
        )
    if middle > 0:
        p = 1 / (1 + math.exp(-likelihood.margin))
        distance = likelihood.margin * math.sqrt(p * (1 - p) / middle)
        texts.append(
            f"λ at equal margins does not depend on the scale of the logits: it is {middle:.3g} at the median image. "
            "If there were only the two most likely classes, the decision boundary of the linearised network would be "
            f"at a distance of {distance:.2g} pixel units."
        )
    return texts


def _attacks(audit: Audit) -> list[str]:
    if not audit.attacks:
        return ["No attack was run. This audit does not show how easily an attack succeeds."]
    texts = []
    for name, attacked in audit.attacks.items():
        found = outcome(audit, name)
        if attacked.ball is not None:
            texts.append(
                f"Under {name} ({attacked.ball}), {of_all(found['accuracy'])} of the images are still classified "
                "correctly."
            )
        elif found["num_adversarial"]:
            texts.append(
                f"{name}, which has no radius, found adversarial examples for {found['num_adversarial']} of the "
                f"{found['num_correct']} correctly classified images. The median distance of these examples is "
                f"{found['median_distance']:.2g} pixel units. Images without an adversarial example are not included. "
                "Nearer adversarial examples may exist."
            )
        if found["num_masked"]:
            texts.append(
                f"Masked gradients: {found['num_masked']} images are still classified correctly under {name} because "
                "their gradient is exactly zero. This is not robustness."
            )
    return texts


def _rankings(audit: Audit) -> list[str]:
    texts = []
    for name in audit.attacks:
        found = outcome(audit, name)
        area, link = found["auc_of_lambda"], found["correlation_of_lambda"]
        if area is not None:
            says = verdict(area, 0.5, "is higher at", "is lower at", "does not distinguish")
            texts.append(
                f"λ {says} the images on which {name} succeeded ({found['num_adversarial']} of {found['num_correct']}; "
                f"ROC-AUC {interval(area)}, chance is 0.5)."
            )
        if link is not None:
            says = verdict(link, 0, "farther from", "closer to", "neither closer to nor farther from")
            texts.append(
                f"Images with a larger λ are {says} the adversarial examples that {name} found (Spearman's correlation "
                f"with the distance: {interval(link)})."
            )
    if audit.attacks and not texts:
        texts.append("No attack had enough successes and failures to test whether λ ranks the images.")
    elif len(texts) > 1:
        texts.append(
            f"Each of these {len(texts)} statements is tested at the 5 % level, without correction for multiple tests."
        )
    return texts


def verdict(found: dict[str, float], chance: float, above: str, below: str, neither: str) -> str:
    """Choose a text: the test must be significant, and the whole interval on one side of ``chance``."""
    if found["p"] > _SIGNIFICANCE:
        return neither
    if found["low"] > chance:
        return above
    return below if found["high"] < chance else neither


def _bounds(audit: Audit) -> list[str]:
    values, missing = audit.measurement.values, audit.measurement.missing
    logs = values["lambda"].log10()
    texts = [f"There is no {level} bound: {missing[name]}" for name, level in BOUNDS.items() if name in missing]
    largest = float(logs.max())
    if "log10_global" not in missing and math.isfinite(largest):
        bound = float(values["log10_global"][0])
        texts.append(
            f"The weights certify λ ≤ 10^{bound:.1f} for every input. This bound is a factor of "
            f"10^{bound - largest:.1f} above the largest λ of these images."
        )
    if "log10_local" not in missing and math.isfinite(largest):
        gap = (values["log10_local"] - logs)[logs.isfinite()]
        texts.append(
            "The certified local bound, which holds at the images, is a factor of "
            f"10^{float(gap.quantile(0.5)):.1f} above λ (median)."
        )
    above = _num_above(audit, logs)
    if above:
        texts.append(f"λ is above a certified bound in {above} cases. Rounding errors or a wrong bound can cause this.")
    return texts


def _num_above(audit: Audit, logs: Tensor) -> int:
    certified = [audit.measurement.values[name] for name in ("log10_global", "log10_local")]
    return sum(int((logs > bound + _ROUND_OFF).sum()) for bound in certified)  # NaN is above nothing


def _black_box(audit: Audit) -> list[str]:
    values, errors = audit.measurement.values, audit.measurement.extra["blackbox_error"]
    resolved = values["lambda_blackbox"].isfinite()
    known = (values["lambda"] > 0) & resolved
    num_missing = int((~resolved).sum())
    missing = f" The queries do not determine λ at {num_missing} images." if num_missing else ""
    if not bool(known.any()):
        return [f"Queries of the probabilities alone give no estimate of λ.{missing}"] if missing else []
    white, black = values["lambda"][known], values["lambda_blackbox"][known]
    ratio = float((black / white).quantile(0.5))
    near = int(((black - white).abs() <= 2 * errors[known]).sum())
    text = (
        f"An estimate from queries of the probabilities alone is {ratio:.2g} times λ (median). It is within two "
        f"standard errors of λ at {near} of {int(known.sum())} images.{missing}"
    )
    if ratio > 2:
        text += (
            " A ratio far above one can mean that the network is not differentiable at the images, for example at flat "
            "backgrounds before a max pooling. Neither value is reliable then. Repeat the audit with noise=0.1."
        )
    return [text]
