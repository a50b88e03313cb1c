"""What an audit tested, what it did not test, and which documents ask for its numbers."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from recipes.evaluate.audit import Audit
from recipes.evaluate.numbers import Number

NO_CONFORMITY = (
    "This table helps to find a number. It is not a statement of conformity, and it does not quote requirements: read "
    "the documents. ISO/IEC DIS 24029-3 is a draft (December 2025) whose text can change."
)


def covered(audit: Audit) -> list[str]:
    """Return what was tested, in sentences."""
    count, shape = len(audit.images), " x ".join(map(str, audit.images.shape[1:]))
    noise = audit.settings["noise"]
    lines = [
        f"{count} images of the test split of {audit.settings['data']['_target_']}, chosen at random with seed "
        f"{audit.settings['seed']}. Their indices are in the record.",
        f"Inputs of shape {shape} (channels, height, width), with pixels from 0 to 1. Every radius, distance, λ and "
        "bound is in this unit. A normalisation is part of the network.",
        f"Uniform noise with a share of {noise:g} in each pixel."
        if noise
        else "The images as they are, without noise.",
        "The network in evaluation mode: with running statistics, without dropout.",
        "λ, trace and bounds describe perturbations that are small in the Euclidean norm.",
    ]
    for name, attacked in audit.attacks.items():
        reach = f"in the ball {attacked.ball}" if attacked.ball else "without a radius, Euclidean distance"
        lines.append(f"Attack {name}, {reach}: {attacked.text}.")
    return lines


def not_tested(audit: Audit) -> list[str]:
    """Return what was not tested, in sentences."""
    lines = [
        "Other data: other images of the split, other distributions, other classes, inputs that belong to no class.",
        "Other corruptions: blur, weather, compression, rotation, translation, and other noise than listed above.",
        "Poisoned training data and backdoors.",
        "Other training runs of the same network: the audit is about one set of weights.",
        "Extraction of the model, membership inference, and other attacks on confidentiality.",
        "The system around the network: preprocessing of images, use of the outputs, hardware.",
    ]
    if not audit.attacks:
        return ["Attacks of any kind: no attack was configured.", *lines]
    balls = sorted({attacked.ball for attacked in audit.attacks.values() if attacked.ball})
    norms = {ball.split(" ")[0] for ball in balls}
    missing = [norm for norm in ("ℓ₂", "ℓ∞", "ℓ₁", "ℓ₀") if norm not in norms]
    attacks = [
        f"Larger radii than {', '.join(balls)}." if balls else "Attacks within a radius.",
        f"Attacks in the norms {', '.join(missing)}, within a radius." if missing else "",
        "Larger budgets of the attacks: more steps, restarts and queries than those above.",
        "Attacks designed for this network (adaptive attacks), transfer attacks, and attacks with a target class.",
        "Physical attacks: patches, printed images, cameras.",
    ]
    return [line for line in attacks if line] + lines


def crosswalk(audit: Audit, measured: Mapping[str, Number]) -> pd.DataFrame:
    """Return a row per document and topic, with the place in this audit."""
    attacks = ", ".join(f"accuracy under {name}" for name in audit.attacks) or "nothing: no attack was run"
    bounds = [level for level in ("global", "local") if f"log10_{level}" not in audit.measurement.missing]
    certified = f"{' and '.join(bounds)} bound of λ (certified)" if bounds else "nothing: no certified bound was found"
    rows = [
        ("ISO/IEC 24029-2:2023, 5.4 sensitivity (formal methods)", certified),
        (
            "ISO/IEC 24029-2:2023, 5.3 stability (formal methods)",
            "nothing: no radius with unchanged decisions is certified",
        ),
        (
            "ISO/IEC DIS 24029-3, robustness assessment through curvature analysis",
            "λ with its interval: the largest curvature of the Kullback-Leibler divergence at the image",
        ),
        (
            "ISO/IEC DIS 24029-3, robustness assessment based on performance drops",
            f"accuracy and {attacks}" if audit.attacks else attacks,
        ),
        ("ISO/IEC DIS 24029-3, measuring adversarial robustness", attacks),
        ("Regulation (EU) 2024/1689 (AI Act), Article 15: accuracy", f"accuracy, n = {measured['accuracy'].count}"),
        (
            "Regulation (EU) 2024/1689 (AI Act), Article 15(5): adversarial examples, model evasion",
            attacks,
        ),
        (
            "Regulation (EU) 2024/1689 (AI Act), Article 15(5): data and model poisoning, confidentiality",
            "nothing: not tested",
        ),
        ("Hugging Face hub, model-index of a model card", "model_card.yaml"),
        ("Hugging Face hub, .eval_results/", "written if hub_dataset names the benchmark"),
    ]
    return pd.DataFrame(rows, columns=["document and topic", "where in this audit"])
