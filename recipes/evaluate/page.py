"""The page of an audit: its sections, from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from recipes.competitors.measurement import METRICS
from recipes.evaluate import figures as audit_figures
from recipes.evaluate.audit import BOUNDS, FAILURE_PROBABILITY, WIDE, Audit, outcome, share
from recipes.evaluate.reading import of_all
from recipes.reporting.page import Section, render


def page(audit: Audit, reading: list[str]) -> str:
    """Return the page as HTML; it needs no other file and no network."""
    drawn, missing = figures(audit), audit.measurement.missing
    sections = [
        Section("In plain language", reading),
        Section("Summary", table=summary(audit)),
        Section(
            "Sensitivity",
            figure=drawn["distribution"],
            caption="λ is the largest eigenvalue of the input-space Fisher matrix; ½ λ ε² is the largest divergence "
            "that a step of length ε can cause, to second order.",
        ),
        Section("Attacks", [*_about_attacks(audit)], table=attack_table(audit)),
        Section(
            "The most sensitive images",
            table=shown_table(audit),
            figure=drawn["most_sensitive"],
            caption="From the left: the image; its top eigenvector, red above and blue below zero, or as colours "
            "around grey; the image moved against and along it, with what is predicted then.",
        ),
        Section(
            "Bounds",
            [f"No {level} bound: {missing[name]}" for name, level in BOUNDS.items() if name in missing],
            figure=drawn["bounds"],
            caption="A certified bound is never exceeded. The blockwise one was computed at the first images only.",
        ),
        Section(
            "Without derivatives",
            figure=drawn["black_box"],
            caption="λ from 200 queries of the probabilities per image, against λ from derivatives.",
        ),
        Section("All measures", table=metric_table(audit)),
    ]
    return render(audit.title, [audit.data], sections)


def figures(audit: Audit) -> dict[str, Figure]:
    """Return the figures of the page by their names."""
    values = {name: value.numpy() for name, value in audit.measurement.values.items()}
    shown, names = audit.shown, []
    for place, index in enumerate(shown.index.tolist()):
        before, against, along = (
            f"{audit.name_of(int(label))}, p = {probability:.3f}"
            for label, probability in zip(shown.predicted[:, place], shown.confidence[:, place].tolist(), strict=True)
        )
        lengths = (shown.moved[:, place] - audit.images[index]).flatten(1).norm(dim=1).tolist()
        first = f"label {audit.name_of(int(audit.labels[index]))}\n{before}"
        second = f"top eigenvector\nλ = {float(shown.eigenvalues[place, 0]):.3g}"
        moved = [
            f"{sign} {length:.2g} along it\n{to}"
            for sign, length, to in zip("-+", lengths, (against, along), strict=True)
        ]
        names.append((first, second, *moved))
    return {
        "distribution": audit_figures.distribution(values["lambda"], values["margin"], audit.saturated.numpy()),
        "bounds": audit_figures.bounds(values["lambda"], values),
        "black_box": audit_figures.black_box(
            values["lambda"], values["lambda_blackbox"], audit.measurement.extra["blackbox_error"].numpy()
        ),
        "most_sensitive": audit_figures.examples(audit.images[shown.index], shown.eigenvectors, shown.moved, names),
    }


def summary(audit: Audit) -> pd.DataFrame:
    """Return the few numbers that come first."""
    values = audit.measurement.values
    rows: dict[str, str] = {"accuracy": of_all(share(audit.correct))}
    for title, name in (("λ", "lambda"), ("trace of F", "trace"), ("λ at equal margins", "lambda_tempered")):
        low, middle, high = (f"{float(values[name].quantile(level)):.3g}" for level in (0.05, 0.5, 0.95))
        rows[f"{title}, median (5 % to 95 %)"] = f"{middle} ({low} to {high})"
    rows["effective rank, median"] = f"{float(audit.effective_rank.quantile(0.5)):.3g}"
    num_wide = int((audit.interval_width > WIDE).sum())
    title = f"intervals of λ wider than {WIDE:.0%}, at a failure probability of {FAILURE_PROBABILITY:.0%}"
    rows[title] = f"{num_wide} of {len(audit.images)}"
    rows["predictions that saturate"] = f"{int(audit.saturated.sum())} of {len(audit.images)}"
    for name, level in BOUNDS.items():
        bound = values[name].nanquantile(0.5)
        rows[f"{level} bound of λ, median"] = "none" if name in audit.measurement.missing else f"10^{float(bound):.2f}"
    for name, attacked in audit.attacks.items():
        found = outcome(audit, name)
        if attacked.ball is None:
            rows[f"distance of {name}, median"] = f"{found['median_distance']:.2g} pixel units"
        else:
            rows[f"accuracy under {name}, {attacked.ball}"] = of_all(found["accuracy"])
    return pd.DataFrame({"": list(rows), "value": list(rows.values())})


def attack_table(audit: Audit) -> pd.DataFrame | None:
    """Return a row per attack."""
    rows = []
    for name, attacked in audit.attacks.items():
        found = outcome(audit, name)
        area, link = found["auc_of_lambda"], found["correlation_of_lambda"]
        row: dict[str, Any] = {"attack": name, "accuracy under it": percent(found["accuracy"])}
        row |= {
            "misclassified": f"{found['num_adversarial']} of {found['num_correct']}",
            "distance": found["median_distance"],
        }
        row |= {"masked": found["num_masked"], "ROC-AUC of λ": "–" if area is None else brackets(area)}
        row |= {"correlation with distance": "–" if link is None else brackets(link), "seconds": attacked.seconds}
        rows.append(row)
    return pd.DataFrame(rows) if rows else None


def shown_table(audit: Audit) -> pd.DataFrame:
    """Return a row per image that is shown: its largest eigenvalues."""
    shown = audit.shown
    numbers = {f"λ{place + 1}": column.tolist() for place, column in enumerate(shown.eigenvalues.unbind(1))}
    return pd.DataFrame(
        {
            "image": shown.index.tolist(),
            "label": [audit.name_of(int(audit.labels[index])) for index in shown.index],
            "predicted": [audit.name_of(int(label)) for label in shown.predicted[0]],
            "confidence": shown.confidence[0].tolist(),
            **numbers,
            "effective rank": audit.effective_rank[shown.index].tolist(),
        }
    )


def metric_table(audit: Audit) -> pd.DataFrame:
    """Return a row per measure of :data:`recipes.competitors.measurement.METRICS`."""
    rows = []
    for name, metric in METRICS.items():
        values = audit.measurement.values[name]
        low, middle, high = (float(values.nanquantile(level)) for level in (0.05, 0.5, 0.95))
        row = {"measure": metric.title, "median": middle, "5 %": low, "95 %": high, "unit": metric.unit}
        rows.append(row | {"images": int((~values.isnan()).sum()), "seconds": audit.measurement.seconds[name]})
    return pd.DataFrame(rows)


def percent(found: dict[str, Any]) -> str:
    """Return a share and its interval for a table."""
    return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


def brackets(found: dict[str, float]) -> str:
    """Return a number and its interval for a table."""
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _about_attacks(audit: Audit) -> Iterator[str]:
    if not audit.attacks:
        yield "None was run."
    for name, attacked in audit.attacks.items():
        yield f"{name} is {attacked.attack}."
        yield from (f"Warning: {text}" for text in attacked.warnings)
    yield (
        "Fooled are images that were right; distances are Euclidean in pixel units, their median. How λ orders the "
        "images that were right: ROC-AUC for those misclassified within a radius, Spearman's correlation for how far "
        "an attack without one had to go. In brackets 95 % intervals, Wilson's or by the bootstrap over these images."
    )
