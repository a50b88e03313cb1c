"""The findings of ``recipes.compare`` in sentences that claim no more than the numbers show."""

from __future__ import annotations

import math

import pandas as pd

from recipes.compare.analysis import NEAREST, Analysis
from recipes.compare.powers import NETWORK
from recipes.competitors.measurement import METRICS, SATURATED
from recipes.statistics.agreement import SIGNIFICANCE


def findings(found: Analysis) -> list[str]:
    """Return the sentences in a fixed order."""
    over_models = found.per_model[(found.per_model.scope == "all") & (found.per_model.statistic == "rho")]
    return [
        *_accuracy(found),
        *_masked(found.examples),
        *_powers("Prediction of the misclassified images of a network", found.per_example),
        *_powers("Prediction of the least robust networks of a data set", over_models),
        *_distances(found.distances),
        *_confident(found),
        *_scale(found.per_example),
    ]


def _accuracy(found: Analysis) -> list[str]:
    cells = found.networks.groupby("dataset", sort=False).accuracy
    ranges = "; ".join(f"{name} {part.min():.2f} to {part.max():.2f}" for name, part in cells)
    texts = [f"{len(found.networks)} networks; accuracy on all test images: {ranges}."]
    missed = int((found.examples.correct & ~found.examples[f"misclassified_{NEAREST}"]).sum())
    if missed:
        texts.append(f"No adversarial example was found for {missed} images; their distance counts as infinite.")
    return texts


def _masked(examples: pd.DataFrame) -> list[str]:
    texts = []
    for column in examples.columns[examples.columns.str.startswith("masked_")]:
        masked = examples[examples[column]]
        if len(masked):
            texts.append(
                f"{column.removeprefix('masked_')} could not attack {len(masked)} images of "
                f"{masked.groupby(NETWORK).ngroups} networks: the gradient is exactly zero there. Masked gradients are "
                "not robustness."
            )
    return texts


def _powers(question: str, table: pd.DataFrame) -> list[str]:
    texts = []
    for target, part in table.groupby("target", sort=False):
        complete = part[part.num_networks == part.num_networks.max()].set_index("metric")
        complete = complete.drop(["clever", "log10_blockwise"], errors="ignore")  # computed for fewer images
        ranked = complete.value.sort_values(ascending=False)
        said = [_said(part, name) for name in ("lambda", "lambda_tempered")]
        if ranked.index[0] not in ("lambda", "lambda_tempered"):
            said.append(f"the largest of {len(ranked)}, chosen afterwards: {_said(part, ranked.index[0])}")
        goal = "nearness of the nearest adversarial example" if target == "distance" else f"by {target}"
        texts.append(f"{question} ({goal}, {part.statistic.iloc[0]}): {'; '.join(text for text in said if text)}.")
    return texts


def _said(part: pd.DataFrame, metric: str) -> str:
    rows = part[part.metric == metric]
    if rows.empty:
        return ""
    row = rows.iloc[0]
    doubt = "" if row.p_corrected <= SIGNIFICANCE else ", not significant"
    return f"{METRICS[metric].title} {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]{doubt}"


def _distances(distances: pd.DataFrame) -> list[str]:
    texts = []
    for _, row in distances.iterrows():
        constant = row.get("c", math.nan)
        law = "" if math.isnan(constant) else f" (c has median {row.c:.2g}, {row.c_low:.2g} to {row.c_high:.2g})"
        texts.append(
            f"Distance to the nearest adversarial example over {row.title}{law}: median {row.median_ratio:.2f}, and "
            f"90 % of the images of a network lie within {row.spread:.2f} orders of magnitude."
        )
    return texts


def _confident(found: Analysis) -> list[str]:
    table = found.confident
    if table.empty:
        return [f"No network has enough images of confidence above {SATURATED} and others to compare them."]
    attacks = [
        name.removeprefix("confident_misclassified_") for name in table if name.startswith("confident_misclassified_")
    ]
    middle = table.drop(columns=NETWORK).median()
    shares = ", ".join(
        f"{middle[f'confident_misclassified_{name}']:.0%} by {name} "
        f"(others {middle[f'other_misclassified_{name}']:.0%})"
        for name in attacks
    )
    by_lambda = math.sqrt(middle.other_lambda / middle.confident_lambda)
    by_tempered = math.sqrt(middle.other_lambda_tempered / middle.confident_lambda_tempered)
    return [
        f"Saturation: {len(table)} networks have images of confidence above {SATURATED} and others. Medians over these "
        f"networks: λ is {middle.confident_lambda:.2g} at the confident images and {middle.other_lambda:.2g} at the "
        f"others. By λ, the adversarial examples of the confident images should be {by_lambda:.2g} times as far away "
        f"as those of the others; they are {middle.confident_distance / middle.other_distance:.2g} times as far away. "
        f"λ at equal margins predicts {by_tempered:.2g}. Misclassified confident images: {shares}.",
        _pooled(found.saturation, attacks),
    ]


def _pooled(saturation: pd.DataFrame, attacks: list[str]) -> str:
    first, last = saturation.iloc[0], saturation.iloc[-1]
    shares = ", ".join(f"{last[f'misclassified_{name}']:.0%} by {name}" for name in attacks)
    return (
        f"Over all networks and data sets, {last.num_examples} images have a confidence of {last.confidence} and a "
        f"median λ of {last['lambda']:.2g}, against {first['lambda']:.2g} at {first.confidence}; of these images "
        f"{shares} are misclassified."
    )


def _scale(per_example: pd.DataFrame) -> list[str]:
    by_distance = per_example[per_example.target == "distance"].set_index("metric")
    names = [name for name in ("lambda", "lambda_confident", "lambda_tempered") if name in by_distance.index]
    values = ", ".join(f"{METRICS[name].title} {by_distance.value[name]:.2f}" for name in names)
    return [
        "Multiplying all logits changes no prediction, but changes λ by orders of magnitude, and not λ at equal "
        f"margins. Mean rank correlation with nearness: {values}."
    ]
