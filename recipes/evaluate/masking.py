"""Checks for masked gradients: a network can look robust only because gradient-based attacks fail.

The limits are rules of thumb. A sign is a reason to look closer; the absence of a sign proves nothing. Athalye et al.
(arXiv 1802.00420) and Carlini et al. (arXiv 1902.06705) recommend most of the checks; the others are of this package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from recipes.evaluate.audit import Attacked
from recipes.evaluate.numbers import Number

Sign = Literal["no sign", "sign", "not tested"]
LOW_RATIO = 0.5
"""A ratio of divergences below this value is a sign."""
HIGH_RATIO = 2.0
"""A ratio of λ by queries to λ above this value is a sign."""


@dataclass(frozen=True)
class Check:
    """One check for masked gradients.

    Attributes:
        name: What was checked.
        value: The observed value, as a short text.
        sign: The verdict.
        text: The meaning, in a sentence.
    """

    name: str
    value: str
    sign: Sign
    text: str


def masking(attacks: Mapping[str, Attacked], measured: Mapping[str, Number]) -> tuple[Check, ...]:
    """Return the checks, from the attacks and the numbers of an audit."""
    return (
        _divergence_ratio(measured["kl_ratio_median"]),
        _single_step(measured["single_step_ratio_median"]),
        *(_zero_gradients(name, attacked) for name, attacked in attacks.items()),
        *_without_gradient(attacks),
        *_missed(attacks),
        _black_box(measured["blackbox_ratio_median"]),
    )


def _divergence_ratio(number: Number) -> Check:
    texts: dict[Sign, str] = {
        "no sign": "A step along the top eigenvector changes the prediction by about what λ predicts, or by more.",
        "sign": "A step along the top eigenvector changes the prediction by far less than λ predicts: the function is "
        "not smooth, and its gradient can mislead an attack.",
    }
    return _of_ratio("divergence over ½ λ ε²", number, texts, lambda value: value < LOW_RATIO)


def _single_step(number: Number) -> Check:
    texts: dict[Sign, str] = {
        "no sign": "One gradient step finds most of the divergence that several steps find.",
        "sign": "One gradient step finds little of the divergence that several steps find: an attack with one step "
        "would overestimate the robustness.",
    }
    return _of_ratio("divergence of one step over several", number, texts, lambda value: value < LOW_RATIO)


def _black_box(number: Number) -> Check:
    texts: dict[Sign, str] = {
        "no sign": "Queries of the probabilities find no more sensitivity than derivatives.",
        "sign": "Queries of the probabilities find more sensitivity than derivatives: the network may not be "
        "differentiable at the images. Repeat the audit with noise=0.1.",
    }
    return _of_ratio("λ by queries over λ", number, texts, lambda value: value > HIGH_RATIO)


def _of_ratio(name: str, number: Number, texts: Mapping[Sign, str], is_sign: Any) -> Check:
    if math.isnan(number.value):
        return Check(
            name, "–", "not tested", "The ratio is not known at any image: λ is zero, or could not be estimated."
        )
    sign: Sign = "sign" if is_sign(number.value) else "no sign"
    return Check(name, f"{number.value:.3g}, median of n = {number.count}", sign, texts[sign])


def _zero_gradients(name: str, attacked: Attacked) -> Check:
    result = attacked.result
    num_survivors, num_masked = int((~result.misclassified).sum()), int(result.masked.sum())
    texts: dict[Sign, str] = {
        "no sign": "No image that is still classified correctly has a gradient of exactly zero.",
        "sign": "These images have a gradient of exactly zero, so that no attack by gradients can succeed. This is not "
        "robustness.",
    }
    if not num_survivors:
        text = f"No image is still classified correctly after {name}."
        return Check(f"zero gradients after {name}", "–", "not tested", text)
    sign: Sign = "sign" if num_masked else "no sign"
    return Check(
        f"zero gradients after {name}", f"{num_masked} of {num_survivors} images still correct", sign, texts[sign]
    )


def _without_gradient(attacks: Mapping[str, Attacked]) -> Iterator[Check]:
    """Compare attacks with a part that needs no gradient with attacks in the same ball that use gradients alone."""
    pairs = [
        (free, led)
        for free, one in attacks.items()
        for led, other in attacks.items()
        if not one.needs_gradient and other.needs_gradient and _ball(one) == _ball(other)
    ]
    for free, led in pairs:
        more = attacks[free].result.misclassified & ~attacks[led].result.misclassified
        count, survivors = int(more.sum()), int((~attacks[led].result.misclassified).sum())
        sign: Sign = "sign" if count else "no sign"
        text = (
            f"{free}, which ends with a search without gradients, succeeds where {led} in the same ball fails. Either "
            f"the gradients are masked there, or {led} has too few steps."
            if count
            else f"{free}, which ends with a search without gradients, succeeds at no image where {led} fails."
        )
        yield Check(f"{free} where {led} failed", f"{count} of {survivors} images still correct", sign, text)
    if not pairs:
        text = (
            "This check needs two attacks in the same ball: one with a search without gradients, such as AutoAttack, "
            "and one by gradients alone. To add the second, use +attack@attacks.auto_pgd=auto_pgd."
        )
        yield Check("a search without gradients", "–", "not tested", text)


def _missed(attacks: Mapping[str, Attacked]) -> Iterator[Check]:
    """Check whether attacks without a radius found examples in the ball of an attack that found none."""
    nearest = [one.result for one in attacks.values() if one.ball is None]
    for name, attacked in attacks.items():
        ball = _ball(attacked)
        if ball is None or ball[0] != 2 or not nearest:
            continue
        near = torch.stack([result.misclassified & (result.euclidean <= ball[1]) for result in nearest]).any(0)
        survivors = ~attacked.result.misclassified
        count = int((near & survivors).sum())
        sign: Sign = "sign" if count else "no sign"
        text = (
            f"An attack without a radius found adversarial examples in the ball of {name}, which {name} did not find: "
            f"{name} is too weak, and the accuracy under it is too high."
            if count
            else f"No attack without a radius found an adversarial example in the ball of {name} that {name} missed."
        )
        yield Check(f"missed by {name}", f"{count} of {int(survivors.sum())} images still correct", sign, text)


def _ball(attacked: Attacked) -> tuple[float, float] | None:
    attack: Any = attacked.attack
    return (float(attack.norm), float(attack.epsilon)) if hasattr(attack, "epsilon") else None
