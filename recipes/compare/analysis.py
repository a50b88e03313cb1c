"""Analysis of how well the metrics predict adversarial examples and their distances, and where λ does not.

* Per image (:mod:`recipes.compare.powers`): how well a metric orders the images of a network.
* Per model: Spearman's rho and Kendall's tau between the metric (the median over the correctly classified images, on
  which the attacks are also evaluated) and the success of an attack, within each data set, averaged over data sets. For
  positive metrics, means over seeds are means of log10. The bootstrap draws models with their training and seeds within
  them, the same for all data sets; p-values permute them. Both are for these architectures, trainings and images.
* The p-values of a table are corrected together by Benjamini and Yekutieli's procedure, which is valid for any
  dependence of the tests. Positive always means that a larger sensitivity goes with easier attacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from recipes.compare.powers import NETWORK, defined_rows, example_table
from recipes.competitors.measurement import METRICS, SATURATED
from recipes.statistics.agreement import Pair, Statistic, agreement, grid, interval, mean_over_seeds, p_value, rho, tau

NEAREST = "minimal"
"""The attack whose distances are used as those of the nearest adversarial examples."""
CONFIDENCE_BINS = (0.0, 0.9, 0.99, SATURATED, 1.0)
PREDICTORS = {
    "lambda": "√(2c/λ)",
    "lambda_tempered": "√(2c/λ), λ at equal margins",
    "linearised_distance": "linearised distance",
}
_NUM_PERMUTATIONS = 20_000  # enough for the smallest p to be significant after the correction
_MIN_IMAGES = 5  # in each of the two groups of a comparison within a network


@dataclass(frozen=True)
class Analysis:
    """The data of the report.

    Attributes:
        networks: A row per network: accuracy, seconds, ``success_<attack>``, ``distance``, and medians of the metrics.
        examples: A row per network and image, with ``distance`` to the nearest adversarial example, infinite if none is
            known.
        per_example: A row per metric and target.
        per_model: A row per metric, target and statistic, over all data sets and for each.
        distances: A row per predictor of the distance to the nearest adversarial example.
        saturation: A row per range of confidence, over all networks.
        confident: A row per network with confident images and others: the results of both groups.
    """

    networks: pd.DataFrame
    examples: pd.DataFrame
    per_example: pd.DataFrame
    per_model: pd.DataFrame
    distances: pd.DataFrame
    saturation: pd.DataFrame
    confident: pd.DataFrame


def analyse(networks: pd.DataFrame, examples: pd.DataFrame, attacks: Sequence[str], num_resamples: int) -> Analysis:
    """Compute all tables; ``attacks`` are names of columns ``misclassified_<attack>`` of the examples."""
    judged = [name for name in attacks if name != NEAREST]
    examples = examples.assign(
        distance=examples[f"distance_{NEAREST}"].where(examples[f"misclassified_{NEAREST}"], math.inf)
    )
    right = examples[examples.correct]
    networks = networks.merge(network_summary(right, judged), on=NETWORK, how="left")
    return Analysis(
        networks=networks,
        examples=examples,
        per_example=corrected(example_table(examples, judged, num_resamples)),
        per_model=model_table(networks, judged, num_resamples),
        distances=distance_table(right),
        saturation=saturation_table(right, judged),
        confident=confident_table(right, judged),
    )


def network_summary(right: pd.DataFrame, attacks: Sequence[str]) -> pd.DataFrame:
    """Return, per network, the success of the attacks on correctly classified images, and medians over them."""
    groups = right.groupby(NETWORK, sort=False)
    summary = {f"success_{name}": groups[f"misclassified_{name}"].mean() for name in attacks}
    summary |= {name: groups[name].median() for name in ("distance", *METRICS)}
    return pd.DataFrame(summary).reset_index()


def in_decades(networks: pd.DataFrame) -> pd.DataFrame:
    """Return the networks with log10 of positive metrics, so that means over seeds are means of log10."""
    positive = ["distance", *(name for name in METRICS if not name.startswith("log10_"))]
    with np.errstate(divide="ignore"):
        return networks.assign(**{name: np.log10(networks[name]) for name in positive})


def model_table(networks: pd.DataFrame, attacks: Sequence[str], num_resamples: int) -> pd.DataFrame:
    """Return the agreement of the networks' orders by metric and by attack, over all data sets and for each.

    Data sets in which a metric is missing for a network are left out; ``num_networks`` counts the remaining networks.
    Only the rows over all data sets have p-values, corrected for those of the same statistic.
    """
    networks = in_decades(networks.assign(model=networks.model + ", " + networks.training))
    networks["nearness"] = -networks.distance
    targets = {name: f"success_{name}" for name in attacks} | {"distance": "nearness"}
    groups = dict(list(networks.groupby("dataset", sort=False)))
    scopes = {"all": list(groups.values())} | {name: [part] for name, part in groups.items()}
    rows = []
    for metric, about in METRICS.items():
        for target, column in targets.items():
            for scope, parts in scopes.items():
                pairs = [(about.sign * grid(part, metric), grid(part, column)) for part in parts]
                pairs = [pair for pair in pairs if not np.isnan(np.stack(pair)).any()]
                if pairs:
                    named = {"metric": metric, "target": target, "scope": scope}
                    rows += [named | row for row in _agreement_rows(pairs, num_resamples, tested=scope == "all")]
    table = defined_rows([row for row in rows if not math.isnan(row["value"])])
    return pd.concat([corrected(part) for _, part in table.groupby("statistic")]).sort_index()


def _agreement_rows(pairs: Sequence[Pair], num_resamples: int, *, tested: bool) -> list[dict[str, Any]]:
    statistics: dict[str, Statistic] = {"rho": rho, "tau": tau}
    rows = []
    for name, statistic in statistics.items():
        low, high = interval(pairs, statistic, mean_over_seeds, num_resamples)
        value = float(agreement(pairs, statistic, mean_over_seeds))
        p = p_value(pairs, statistic, mean_over_seeds, _NUM_PERMUTATIONS) if tested else math.nan
        number = sum(one.size for one, _ in pairs)
        rows.append({"statistic": name, "num_networks": number, "value": value, "low": low, "high": high, "p": p})
    return rows


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Add ``p_corrected``: Benjamini and Yekutieli's procedure over all rows with a p-value."""
    known = table.p.notna()
    values = pd.Series(math.nan, index=table.index)
    if known.any():
        values[known] = stats.false_discovery_control(table.p[known], method="by")
    return table.assign(p_corrected=values)


def reached(right: pd.DataFrame) -> pd.DataFrame:
    """Return the images with a known nearest adversarial example and finite values of all predictors."""
    found = right[np.isfinite(right.distance) & (right.distance > 0)]
    return found[(np.isfinite(found[list(PREDICTORS)]) & (found[list(PREDICTORS)] > 0)).all(axis=1)]


def predicted(found: pd.DataFrame, name: str) -> pd.DataFrame:
    r"""Return distances and predicted distances of every second image of each network.

    The linearised distance is a prediction itself; an eigenvalue predicts :math:`\sqrt{2 c / \lambda}`. The constant
    ``c`` of each network is fitted on the *other* images: half of them are nearer than predicted.
    """
    number = found.groupby(NETWORK, sort=False).cumcount()
    fitted, judged = found[number % 2 == 0], found[number % 2 == 1]
    if name == "linearised_distance":
        return judged[[*NETWORK, "distance"]].assign(prediction=judged[name])
    constants = (fitted[name] * fitted.distance**2 / 2).groupby([fitted[key] for key in NETWORK]).median().rename("c")
    pairs = judged[[*NETWORK, "distance", name]].merge(constants.reset_index(), on=NETWORK)
    return pairs.assign(prediction=np.sqrt(2 * pairs.c / pairs[name]))


def distance_table(right: pd.DataFrame) -> pd.DataFrame:
    """Compare distances to the nearest adversarial example with the predicted distances.

    Returns:
        A row per predictor: medians over networks of the median ratio of distance to prediction, of its ``spread``
        (log10 of the ratio of its 95 % to its 5 % quantile), and of ``c``; ``num_left_out`` images had no distance, or
        a predictor that is zero or infinite.
    """
    found, rows = reached(right), []
    for name, title in PREDICTORS.items():
        pairs = predicted(found, name)
        groups = np.log10(pairs.distance / pairs.prediction).groupby([pairs[key] for key in NETWORK])
        row = {"predictor": name, "title": title, "num_judged": len(pairs), "num_left_out": len(right) - len(found)}
        row["median_ratio"] = float(10 ** groups.median().median())
        row["spread"] = float((groups.quantile(0.95) - groups.quantile(0.05)).median())
        if "c" in pairs:
            constants = pairs.groupby(NETWORK).c.first()
            row |= {key: float(constants.quantile(q)) for key, q in (("c", 0.5), ("c_low", 0.05), ("c_high", 0.95))}
        rows.append(row)
    return pd.DataFrame(rows)


def saturation_table(right: pd.DataFrame, attacks: Sequence[str]) -> pd.DataFrame:
    """Return the results of correctly classified images by confidence, over all networks and data sets."""
    bins = pd.cut(right.confidence, CONFIDENCE_BINS)
    groups = right.groupby(bins, observed=True)
    table = pd.DataFrame({"num_examples": groups.size()})
    for name in attacks:
        table[f"misclassified_{name}"] = groups[f"misclassified_{name}"].mean()
    for name in ("lambda", "lambda_tempered", "distance"):
        table[name] = groups[name].median()
    table.insert(0, "confidence", [f"{part.left:g} to {part.right:g}" for part in table.index])
    return table.reset_index(drop=True)


def confident_table(right: pd.DataFrame, attacks: Sequence[str]) -> pd.DataFrame:
    """Return the results of confident and other images, for each network with at least five of both."""
    rows = []
    columns = [*(f"misclassified_{name}" for name in attacks), "lambda", "lambda_tempered", "distance"]
    for key, part in right.groupby(NETWORK, sort=False):
        sides = {"confident": part[part.confidence > SATURATED], "other": part[part.confidence <= SATURATED]}
        if min(map(len, sides.values())) >= _MIN_IMAGES:
            row = dict(zip(NETWORK, key, strict=True))
            for side, images in sides.items():
                shares = images[columns].astype(float)
                summary = {
                    c: shares[c].mean() if c.startswith("misclassified_") else shares[c].median() for c in columns
                }
                row |= {f"{side}_num": len(images)} | {f"{side}_{name}": value for name, value in summary.items()}
            rows.append(row)
    return pd.DataFrame(rows)
