"""What the numbers of an audit say, in sentences that claim no more than they do."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fisher_reg import MarginTempered
from recipes.competitors.measurement import SATURATED
from recipes.evaluate.audit import BOUNDS, Audit, outcome, share
from recipes.evaluate.reference import comparison

_STEP = 0.1  # of which the reading tells the divergence, in pixel units
_SECOND_ORDER = 0.5  # nats, above which the second order is taken for a sign of danger and not for a value
_SIGNIFICANCE = 0.05  # of each verdict by itself: nothing is corrected for their number
_ROUND_OFF = 1e-5  # decades by which an estimate may lie above a bound


def reading(audit: Audit) -> list[str]:
    """Return the paragraphs, in the order in which one would ask."""
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
        f"The network is right on {of_all(found)} of {found['count']} images. All that follows is about these images."
    ]


def _lambda(audit: Audit) -> list[str]:
    values, count = audit.measurement.values, len(audit.images)
    middle, num_zero = float(values["lambda"].quantile(0.5)), int((values["lambda"] == 0).sum())
    texts = []
    if num_zero:
        texts.append(
            f"λ is exactly zero at {num_zero} of {count} images: their softmax is saturated beyond the precision of "
            "the arithmetic. λ says nothing about them, which is not the same as robust."
        )
    if middle > 0:
        nats = 0.5 * middle * _STEP**2
        doubt = " That is too much for the second order: read it as 'can change the prediction'."
        texts.append(
            f"λ is {middle:.3g} nats / pixel² at the median image. To second order, a step of length ε = {_STEP} pixel "
            f"units in the worst direction changes the prediction by ½ λ ε² = {nats:.2g} nats (Kullback-Leibler), and "
            f"one in any other direction by less.{doubt if nats > _SECOND_ORDER else ''}"
        )
        rank, size = float(audit.sensitivity.effective_rank.quantile(0.5)), audit.images[0].numel()
        texts.append(
            f"The sensitivity is that of about {rank:.2g} directions out of {size} (trace over λ, median): a random "
            f"step of the same length does {size / rank:.0f} times less on average."
        )
    return texts


def _saturation(audit: Audit) -> list[str]:
    tempered, likelihood = audit.measurement.values["lambda_tempered"], MarginTempered()
    middle = float(tempered.quantile(0.5))
    num_saturated, count = int(audit.saturated.sum()), len(audit.images)
    texts = []
    if num_saturated:
        texts.append(
            f"{num_saturated} of {count} predictions have a confidence above {SATURATED}. There λ understates how near "
            "another prediction is, because p (1 - p) is small however steep the logits are."
        )
    if middle > 0:
        p = 1 / (1 + math.exp(-likelihood.margin))
        distance = likelihood.margin * math.sqrt(p * (1 - p) / middle)
        texts.append(
            f"Free of the scale of the logits is λ at equal margins, {middle:.3g} at the median image. Were there only "
            f"the two likeliest classes, the boundary of the linearised network would lie {distance:.2g} pixel "
            "units away."
        )
    return texts


def _attacks(audit: Audit) -> list[str]:
    if not audit.attacks:
        return ["No attack was run: nothing here says how easily an attack succeeds."]
    texts = []
    for name, attacked in audit.attacks.items():
        found = outcome(audit, name)
        if attacked.ball is not None:
            texts.append(f"Under {name} ({attacked.ball}) {of_all(found['accuracy'])} stay right.")
        elif found["num_adversarial"]:
            texts.append(
                f"{name}, which goes as far as it must, found adversarial examples for {found['num_adversarial']} of "
                f"the {found['num_correct']} images that were right. The median distance of these is "
                f"{found['median_distance']:.2g} pixel units; of the others nothing is said. Nearer ones may exist."
            )
        if found["num_masked"]:
            texts.append(
                f"Masked gradients: {found['num_masked']} images survived {name} because the gradient is exactly zero "
                "there. That is no robustness."
            )
    return texts


def _rankings(audit: Audit) -> list[str]:
    texts = []
    for name in audit.attacks:
        found = outcome(audit, name)
        area, link = found["auc_of_lambda"], found["correlation_of_lambda"]
        if area is not None:
            says = verdict(area, 0.5, "is higher at", "is lower at", "does not tell")
            texts.append(
                f"λ {says} the images on which {name} succeeded ({found['num_adversarial']} of {found['num_correct']}; "
                f"ROC-AUC {interval(area)}, chance is 0.5)."
            )
        if link is not None:
            says = verdict(link, 0, "farther from", "nearer to", "neither nearer to nor farther from")
            texts.append(
                f"Images of larger λ are {says} the adversarial examples of {name} (Spearman's correlation with the "
                f"distance {interval(link)})."
            )
    if audit.attacks and not texts:
        texts.append("No attack left enough images of both kinds to tell whether λ ranks them.")
    elif len(texts) > 1:
        texts.append(f"Each of these {len(texts)} judgements is made at 5 % by itself, not corrected for their number.")
    return texts


def verdict(found: dict[str, float], chance: float, above: str, below: str, neither: str) -> str:
    """Choose by the side of chance on which the whole interval lies, if the test agrees."""
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
            f"The weights certify λ ≤ 10^{bound:.1f} for every input whatever, {bound - largest:.1f} decades above the "
            "largest λ here."
        )
    if "log10_local" not in missing and math.isfinite(largest):
        gap = (values["log10_local"] - logs)[logs.isfinite()]
        texts.append(
            f"At the images themselves the certified bound is {float(gap.quantile(0.5)):.1f} decades above λ (median)."
        )
    above = _num_above(audit, logs)
    if above:
        texts.append(
            f"λ lies above a certified bound {above} times, which rounding or an error in a bound would explain."
        )
    return texts


def _num_above(audit: Audit, logs: Tensor) -> int:
    certified = [audit.measurement.values[name] for name in ("log10_global", "log10_local")]
    return sum(int((logs > bound + _ROUND_OFF).sum()) for bound in certified)  # NaN is above nothing


def _black_box(audit: Audit) -> list[str]:
    values, errors = audit.measurement.values, audit.measurement.extra["blackbox_error"]
    resolved = values["lambda_blackbox"].isfinite()
    known = (values["lambda"] > 0) & resolved
    num_missing = int((~resolved).sum())
    missing = f" At {num_missing} images the answers do not determine it." if num_missing else ""
    if not bool(known.any()):
        return [f"Queries of the probabilities alone give no λ.{missing}"] if missing else []
    white, black = values["lambda"][known], values["lambda_blackbox"][known]
    ratio = float((black / white).quantile(0.5))
    near = int(((black - white).abs() <= 2 * errors[known]).sum())
    text = (
        f"Queries of the probabilities alone give {ratio:.2g} times λ (median) and lie within two standard errors "
        f"of it at {near} of {int(known.sum())} images.{missing}"
    )
    if ratio > 2:
        text += (
            " Far above one is a sign of images on kinks of the network, as flat backgrounds before a max pooling are: "
            "neither value is to be trusted then, repeat with noise=0.1."
        )
    return [text]
