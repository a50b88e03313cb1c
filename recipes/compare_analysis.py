"""How well each metric tells which examples and which networks fall: statistics and sentences of ``recipes.compare``.

* Per example: among the images that a network classifies correctly, the area under the ROC curve for being fooled by an
  attack, and Spearman's rank correlation with the nearness of the nearest fooling image; one value per network.
  Reported are the mean over networks and a bootstrap interval over cells (a model and a training on a data set), with
  the seeds within; p-values of Wilcoxon's signed-rank test over cells.
* Per model: Kendall's tau and Spearman's rho between the median of the metric over the images and the success of an
  attack, within each data set, averaged over data sets; bootstrap over cells and seeds; p-values by permutation of
  cells within their data set.
* All p-values of a table are corrected together by Benjamini and Yekutieli's procedure, which holds whatever the tests
  have to do with one another. Positive always means: a larger sensitivity goes with an easier fall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_auc_score

from recipes.agreement import (
    Array,
    Pair,
    Statistic,
    agreement,
    grid,
    interval,
    mean_over_seeds,
    p_value,
    quantiles,
    rho,
    tau,
)
from recipes.measure import METRICS

NEAREST = "minimal"
"""The attack whose distances count as those of the nearest fooling images."""
NETWORK = ["dataset", "model", "training", "seed"]
CELL = NETWORK[:-1]
SIGNIFICANCE = 0.05
CONFIDENCE_BINS = (0.0, 0.9, 0.99, 0.999, 1.0)
PREDICTORS = {
    "lambda": "√(2c/λ)",
    "lambda_tempered": "√(2c/λ), λ at equal margins",
    "linearised_distance": "linearised distance",
}


@dataclass(frozen=True)
class Analysis:
    """Everything that the report shows.

    Attributes:
        networks: A row per network: accuracy, seconds, ``success_<attack>``, ``distance``, and medians of the metrics.
        examples: A row per network and image.
        per_example: A row per metric and target.
        per_model: A row per metric, target and statistic, over all data sets and for each.
        distances: A row per predictor of the distance to the nearest fooling image.
        saturation: A row per range of confidence.
        findings: Sentences.
    """

    networks: pd.DataFrame
    examples: pd.DataFrame
    per_example: pd.DataFrame
    per_model: pd.DataFrame
    distances: pd.DataFrame
    saturation: pd.DataFrame
    findings: list[str]


def analyse(networks: pd.DataFrame, examples: pd.DataFrame, attacks: Sequence[str], num_resamples: int) -> Analysis:
    """Ask everything; ``attacks`` are names of columns ``fooled_<attack>`` of the examples."""
    judged = [name for name in attacks if name != NEAREST]
    right = examples[examples.correct]
    networks = networks.merge(network_summary(examples, judged), on=NETWORK)
    powers = network_powers(right, judged)
    per_example = example_table(powers, num_resamples)
    per_model = model_table(networks, judged, num_resamples)
    distances, saturation = distance_table(right), saturation_table(right, judged)
    findings = [
        *accuracy_findings(networks, examples, attacks),
        *power_findings(per_example, per_model),
        *distance_findings(distances),
        *saturation_findings(saturation, per_example, judged),
    ]
    return Analysis(networks, examples, per_example, per_model, distances, saturation, findings)


def network_summary(examples: pd.DataFrame, attacks: Sequence[str]) -> pd.DataFrame:
    """Return, per network, the success of the attacks on what it classifies correctly, and medians over images."""
    right = examples[examples.correct].groupby(NETWORK, sort=False)
    summary = {f"success_{name}": right[f"fooled_{name}"].mean() for name in attacks}
    summary["distance"] = right[f"distance_{NEAREST}"].median()
    summary |= {name: examples.groupby(NETWORK, sort=False)[name].median() for name in METRICS}
    return pd.DataFrame(summary).reset_index()


def network_powers(right: pd.DataFrame, attacks: Sequence[str]) -> pd.DataFrame:
    """Return how well each metric orders the examples of each network, a row per network, metric and target."""
    rows = []
    for key, part in right.groupby(NETWORK, sort=False):
        for name, metric in METRICS.items():
            known = part[part[name].notna()]
            score = metric.sign * known[name]
            named = dict(zip(NETWORK, key, strict=True)) | {"metric": name}
            values = {attack: roc_area(known[f"fooled_{attack}"], score) for attack in attacks}
            found = known[f"fooled_{NEAREST}"] & (known[f"distance_{NEAREST}"] > 0)
            values["distance"] = _rank_correlation(score[found], -known.loc[found, f"distance_{NEAREST}"])
            rows += [named | {"target": target, "value": value} for target, value in values.items()]
    return pd.DataFrame(rows)


def roc_area(fooled: pd.Series, score: pd.Series) -> float:
    """Return the area under the ROC curve, NaN where all or none are fooled or the score is one constant."""
    if fooled.nunique() < 2 or score.nunique() < 2:
        return math.nan
    return float(roc_auc_score(fooled, score))


def _rank_correlation(score: pd.Series, nearness: pd.Series) -> float:
    return float(rho(score.to_numpy(), nearness.to_numpy())) if len(score) > 2 else math.nan


def example_table(powers: pd.DataFrame, num_resamples: int) -> pd.DataFrame:
    """Return means over networks with intervals over cells, and corrected p-values."""
    rows = []
    for (metric, target), part in powers.groupby(["metric", "target"], sort=False):
        chance = 0.0 if target == "distance" else 0.5
        cells = [cell.value.dropna().to_numpy() for _, cell in part.groupby(CELL, sort=False)]
        cells = [cell for cell in cells if len(cell)]
        if len(cells) < 2:
            continue
        low, high = quantiles(_cell_means(cells, num_resamples))
        p = float(stats.wilcoxon([cell.mean() - chance for cell in cells]).pvalue)
        named = {"metric": metric, "target": target, "statistic": "rho" if target == "distance" else "auc"}
        number = sum(len(cell) for cell in cells)
        value = float(np.mean([cell.mean() for cell in cells]))
        rows.append(named | {"num_networks": number, "value": value, "low": low, "high": high, "p": p})
    return corrected(pd.DataFrame(rows))


def _cell_means(cells: Sequence[Array], num_resamples: int) -> Array:
    generator = np.random.default_rng(0)
    draws = [
        np.mean([generator.choice(cells[index], len(cells[index])).mean() for index in chosen])
        for chosen in generator.integers(len(cells), size=(num_resamples, len(cells)))
    ]
    return np.array(draws)


def model_table(networks: pd.DataFrame, attacks: Sequence[str], num_resamples: int) -> pd.DataFrame:
    """Return the agreement of the networks' orders by metric and by attack, over all data sets and for each."""
    networks = networks.assign(model=networks.model + ", " + networks.training, nearness=-networks.distance)
    targets = {name: f"success_{name}" for name in attacks} | {"distance": "nearness"}
    groups = dict(list(networks.groupby("dataset", sort=False)))
    scopes = {"all": list(groups.values())} | (
        {name: [part] for name, part in groups.items()} if len(groups) > 1 else {}
    )
    rows = []
    for metric, about in METRICS.items():
        for target, column in targets.items():
            for scope, parts in scopes.items():
                pairs = [(about.sign * grid(part, metric), grid(part, column)) for part in parts]
                pairs = [pair for pair in pairs if np.isfinite(np.stack(pair)).all()]
                for name, statistic in (("tau", tau), ("rho", rho)):
                    row = _agreement_row(pairs, statistic, num_resamples)
                    rows.append({"metric": metric, "target": target, "scope": scope, "statistic": name} | row)
    return corrected(pd.DataFrame(rows).dropna(subset="value").reset_index(drop=True))


def _agreement_row(pairs: Sequence[Pair], statistic: Statistic, count: int) -> dict[str, float]:
    low, high = interval(pairs, statistic, mean_over_seeds, count)
    value = float(agreement(pairs, statistic, mean_over_seeds))
    p = p_value(pairs, statistic, mean_over_seeds, count)
    return {"num_networks": sum(one.size for one, _ in pairs), "value": value, "low": low, "high": high, "p": p}


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Add ``p_corrected``: Benjamini and Yekutieli's procedure over all rows."""
    return table.assign(
        p_corrected=stats.false_discovery_control(table.p.clip(0, 1), method="by") if len(table) else []
    )


def reached(right: pd.DataFrame) -> pd.DataFrame:
    """Return the images whose nearest fooling image was found, with ``distance``."""
    found = right[right[f"fooled_{NEAREST}"] & (right[f"distance_{NEAREST}"] > 0)]
    return found.rename(columns={f"distance_{NEAREST}": "distance"})


def predicted(found: pd.DataFrame, name: str) -> pd.DataFrame:
    r"""Return the distances of :func:`reached` beside what a predictor says, without images where it says nothing.

    The linearised distance predicts by itself; an eigenvalue by :math:`\sqrt{2 c / \lambda}`, with a ``c`` for each
    network such that half of its images lie nearer.
    """
    known = found[(found[name] > 0) & np.isfinite(found[name])]
    if name == "linearised_distance":
        return known[[*NETWORK, "distance"]].assign(prediction=known[name])
    constant = (known[name] * known.distance**2 / 2).groupby([known[key] for key in NETWORK]).transform("median")
    return known[[*NETWORK, "distance"]].assign(c=constant, prediction=np.sqrt(2 * constant / known[name]))


def distance_table(right: pd.DataFrame) -> pd.DataFrame:
    """Compare distances to the nearest fooling image with what each predictor says.

    Returns:
        A row per predictor. ``c``: the median over networks. ``spread``: decades between the 5 % and the 95 % quantile
        of distance over prediction in a network, the median over networks.
    """
    rows = []
    for name, title in PREDICTORS.items():
        pairs = predicted(reached(right), name)
        ratio = pairs.distance / pairs.prediction
        groups = np.log10(ratio).groupby([pairs[key] for key in NETWORK])
        spread = float((groups.quantile(0.95) - groups.quantile(0.05)).median())
        row = {"predictor": name, "title": title, "num_examples": len(pairs), "median_ratio": float(ratio.median())}
        row["spread"] = spread
        if "c" in pairs:
            constants = pairs.groupby(NETWORK).c.first()
            ends = {"c_low": float(constants.quantile(0.05)), "c_high": float(constants.quantile(0.95))}
            row |= {"c": float(constants.median())} | ends
        rows.append(row)
    return pd.DataFrame(rows)


def saturation_table(right: pd.DataFrame, attacks: Sequence[str]) -> pd.DataFrame:
    """Return what becomes of correctly classified images by how confident the network is."""
    bins = pd.cut(right.confidence, CONFIDENCE_BINS, include_lowest=True)
    groups = right.assign(**{f"fooled_{name}": right[f"fooled_{name}"].astype(float) for name in attacks}).groupby(
        bins, observed=True
    )
    table = pd.DataFrame({"num_examples": groups.size()})
    for name in attacks:
        table[f"fooled_{name}"] = groups[f"fooled_{name}"].mean()
    for name in ("lambda", "lambda_tempered", f"distance_{NEAREST}"):
        table[name] = groups[name].median()
    table.insert(0, "confidence", [f"{part.left:g} to {part.right:g}" for part in table.index])
    return table.reset_index(drop=True).assign(confidence=lambda t: t.confidence.str.replace("-0.001", "0"))


def accuracy_findings(networks: pd.DataFrame, examples: pd.DataFrame, attacks: Sequence[str]) -> list[str]:
    """Say what was trained, and where attacks were without power."""
    cells = networks.groupby("dataset", sort=False).accuracy
    ranges = "; ".join(f"{name} {part.min():.2f} to {part.max():.2f}" for name, part in cells)
    found = [f"{len(networks)} networks; accuracy on all test images: {ranges}."]
    for name in attacks:
        masked = examples[examples[f"masked_{name}"]]
        if len(masked):
            number = masked.groupby(NETWORK).ngroups
            found.append(
                f"{name} could do nothing to {len(masked)} images that survived it, of {number} networks: the "
                "gradient is exactly zero there. Masked gradients are not robustness."
            )
    return found


def power_findings(per_example: pd.DataFrame, per_model: pd.DataFrame) -> list[str]:
    """Say for λ and for the best metric how well they order examples and networks, and what that is worth."""
    found = []
    for target, part in per_example.groupby("target", sort=False):
        best = part.loc[part.value.idxmax()]
        thing = "nearness of the nearest fooling image" if target == "distance" else f"fall to {target}"
        said = [_said(part, "lambda"), _said(part, "lambda_tempered")]
        said += [] if best.metric in ("lambda", "lambda_tempered") else [f"best {_said(part, best.metric)}"]
        found.append(
            f"Which examples of a network ({thing}, mean {best.statistic}): {'; '.join(s for s in said if s)}."
        )
    for target, part in per_model[(per_model.scope == "all") & (per_model.statistic == "rho")].groupby(
        "target", sort=False
    ):
        best = part.loc[part.value.idxmax()]
        said = [_said(part, "lambda"), _said(part, "lambda_tempered")]
        said += [] if best.metric in ("lambda", "lambda_tempered") else [f"best {_said(part, best.metric)}"]
        found.append(f"Which networks of a data set ({target}, rho): {'; '.join(s for s in said if s)}.")
    return found


def _said(part: pd.DataFrame, metric: str) -> str:
    rows = part[part.metric == metric]
    if rows.empty:
        return ""
    row = rows.iloc[0]
    doubt = "" if row.p_corrected <= SIGNIFICANCE else ", not to be told from chance"
    return f"{METRICS[metric].title} {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]{doubt}"


def distance_findings(distances: pd.DataFrame) -> list[str]:
    """Say how far the predicted distances are off."""
    found = []
    for _, row in distances.iterrows():
        constant = row.get("c", math.nan)
        law = "" if math.isnan(constant) else f"; c has median {row.c:.2g} ({row.c_low:.2g} to {row.c_high:.2g})"
        found.append(
            f"Distance to the nearest fooling image over {row.title}: median {row.median_ratio:.2f}, and 90 % of the "
            f"images of a network lie within {row.spread:.2f} decades{law}."
        )
    return found


def saturation_findings(saturation: pd.DataFrame, per_example: pd.DataFrame, attacks: Sequence[str]) -> list[str]:
    """Say where λ fails, and whether taking every prediction at the same margin mends it."""
    first, last = saturation.iloc[0], saturation.iloc[-1]
    falls = ", ".join(f"{last[f'fooled_{name}']:.0%} to {name} ({first[f'fooled_{name}']:.0%})" for name in attacks)
    found = [
        f"Saturation: {last.num_examples} images are classified correctly with confidence {last.confidence}; their "
        f"median λ is {last['lambda']:.2g}, against {first['lambda']:.2g} at confidence {first.confidence}. There "
        f"fall, and in brackets of the others, {falls}."
    ]
    by_distance = per_example[per_example.target == "distance"].set_index("metric")
    names = [name for name in ("lambda", "lambda_confident", "lambda_tempered") if name in by_distance.index]
    values = ", ".join(f"{METRICS[name].title} {by_distance.value[name]:.2f}" for name in names)
    found.append(f"Multiplying all logits changes no decision: rho with nearness is {values}.")
    return found
