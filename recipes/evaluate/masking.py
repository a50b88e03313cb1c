"""Signs that gradients say less than they seem to: what looks robust may only hide from the attack.

The limits are rules of thumb: a sign is a reason to look, and no sign is no proof. Each check is one that Athalye et
al. (arXiv 1802.00420) or Carlini et al. (arXiv 1902.06705) advise, or one of this package.
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
"""Ratio of divergences below which it counts as a sign."""
HIGH_RATIO = 2.0
"""Ratio of λ by queries to λ above which it counts as a sign."""


@dataclass(frozen=True)
class Check:
    """One check for masked gradients.

    Attributes:
        name: What was checked.
        value: What was seen, in a few words.
        sign: The verdict.
        text: What it means, in a sentence.
    """

    name: str
    value: str
    sign: Sign
    text: str


def masking(attacks: Mapping[str, Attacked], measured: Mapping[str, Number]) -> tuple[Check, ...]:
    """Return the checks, from what the attacks of an audit did and its numbers."""
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
        "no sign": "A step along the top eigenvector changes the prediction by about what λ says, or by more.",
        "sign": "A step along the top eigenvector changes the prediction by far less than λ says: the function is "
        "rough, and its gradient does not lead an attack.",
    }
    return _of_ratio("divergence over ½ λ ε²", number, texts, lambda value: value < LOW_RATIO)


def _single_step(number: Number) -> Check:
    texts: dict[Sign, str] = {
        "no sign": "One step finds most of the divergence that several steps find.",
        "sign": "One step finds little of what several steps find: an attack of one step would overrate the network.",
    }
    return _of_ratio("divergence of one step over several", number, texts, lambda value: value < LOW_RATIO)


def _black_box(number: Number) -> Check:
    texts: dict[Sign, str] = {
        "no sign": "Queries of the probabilities find no more sensitivity than derivatives do.",
        "sign": "Queries of the probabilities find more sensitivity than derivatives: the derivatives miss something, "
        "as at kinks of the network. Repeat with noise=0.1.",
    }
    return _of_ratio("λ by queries over λ", number, texts, lambda value: value > HIGH_RATIO)


def _of_ratio(name: str, number: Number, texts: Mapping[Sign, str], is_sign: Any) -> Check:
    if math.isnan(number.value):
        return Check(name, "–", "not tested", "It is not known at any image, since λ is zero or was not resolved.")
    sign: Sign = "sign" if is_sign(number.value) else "no sign"
    return Check(name, f"{number.value:.3g}, median of n = {number.count}", sign, texts[sign])


def _zero_gradients(name: str, attacked: Attacked) -> Check:
    result = attacked.result
    num_survivors, num_masked = int((~result.misclassified).sum()), int(result.masked.sum())
    texts: dict[Sign, str] = {
        "no sign": "No survivor has a gradient of exactly zero.",
        "sign": "These survivors have a gradient of exactly zero, which no attack can follow: that is not robustness.",
    }
    sign: Sign = "sign" if num_masked else "no sign"
    return Check(f"zero gradients after {name}", f"{num_masked} of {num_survivors} survivors", sign, texts[sign])


def _without_gradient(attacks: Mapping[str, Attacked]) -> Iterator[Check]:
    """Compare attacks with a part that needs no gradient with those in the same ball that follow it alone."""
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
            f"{free}, which ends with a search without gradients, succeeds where {led} in the same ball does not. "
            "Gradients may be masked there, or the attack too short."
            if count
            else f"{free}, which ends with a search without gradients, finds nothing that {led} misses."
        )
        yield Check(f"{free} where {led} failed", f"{count} of {survivors} survivors", sign, text)
    if not pairs:
        text = (
            "No attack with a part without gradients and one by gradients alone were run in the same ball. For "
            "AutoAttack add +attack@attacks.auto_pgd=auto_pgd."
        )
        yield Check("a search without gradients", "–", "not tested", text)


def _missed(attacks: Mapping[str, Attacked]) -> Iterator[Check]:
    """Look whether an attack without a radius found nearer examples than the ball of one that found none."""
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
            f"An attack without a radius found adversarial examples in the ball of {name}, which missed them: {name} "
            "is too weak here, and its accuracy too high."
            if count
            else f"No attack without a radius found in the ball of {name} what {name} missed."
        )
        yield Check(f"missed by {name}", f"{count} of {int(survivors.sum())} survivors", sign, text)


def _ball(attacked: Attacked) -> tuple[float, float] | None:
    attack: Any = attacked.attack
    return (float(attack.norm), float(attack.epsilon)) if hasattr(attack, "epsilon") else None
