"""The page of an audit: its sections, from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from recipes.evaluate import figures as audit_figures
from recipes.evaluate.audit import BOUNDS, Audit
from recipes.evaluate.masking import masking
from recipes.evaluate.numbers import GUARANTEES, Number
from recipes.evaluate.scope import NO_CONFORMITY, covered, crosswalk, not_tested
from recipes.evaluate.tables import (
    attack_table,
    identity_table,
    metric_table,
    number_table,
    shown_table,
    summary,
    verdict_table,
)
from recipes.evaluate.thresholds import Verdict
from recipes.reporting.page import Section, render


def page(audit: Audit, measured: Mapping[str, Number], verdicts: Sequence[Verdict], reading: Sequence[str]) -> str:
    """Return the page as HTML, which needs no other file and no network."""
    sections = [*_first(audit, measured, verdicts, reading), *_details(audit), *_last(audit, measured)]
    return render(audit.title, [audit.data, _verdict_line(verdicts)], sections)


def _first(
    audit: Audit, measured: Mapping[str, Number], verdicts: Sequence[Verdict], reading: Sequence[str]
) -> Iterator[Section]:
    who = audit.identity
    yield Section("Record", table=identity_table(who), signatures=(("Author", who.author), ("Reviewer", who.reviewer)))
    yield Section("In plain language", reading)
    yield Section(
        "Summary",
        table=summary(audit, measured),
        items=[f"{name}: {text}" for name, text in GUARANTEES.items()],
    )
    if verdicts:
        about = (
            "If a number has an interval, the less favourable end of the interval is compared with the limit. A number "
            "therefore passes only if the whole interval passes. A number that was not measured fails."
        )
        yield Section("Thresholds", [about], table=verdict_table(verdicts))


def _details(audit: Audit) -> Iterator[Section]:
    drawn, missing = figures(audit), audit.measurement.missing
    yield Section(
        "Sensitivity",
        figure=drawn["distribution"],
        caption="λ is the largest eigenvalue of the input-space Fisher matrix. To second order, ½ λ ε² is the largest "
        "divergence that a step of length ε can cause.",
    )
    yield Section("Attacks", [*_about_attacks(audit)], table=attack_table(audit))
    yield Section(
        "The most sensitive images",
        table=shown_table(audit),
        figure=drawn["most_sensitive"],
        caption="From left to right: the image; its top eigenvector, with red for positive and blue for negative "
        "entries, or in colours where grey is zero; the image after a step against and along the eigenvector, with the "
        "new prediction.",
    )
    yield Section(
        "Bounds",
        [f"No {level} bound: {missing[name]}" for name, level in BOUNDS.items() if name in missing],
        figure=drawn["bounds"],
        caption="λ cannot exceed a certified bound. The blockwise bound was computed at the first images only.",
    )
    yield Section(
        "Without derivatives",
        figure=drawn["black_box"],
        caption="Vertical: λ from 200 queries of the probabilities per image. Horizontal: λ from derivatives.",
    )


def _last(audit: Audit, measured: Mapping[str, Number]) -> Iterator[Section]:
    about = (
        "A sign is a reason to look closer. The absence of a sign proves nothing: each check can miss masked gradients."
    )
    checks = pd.DataFrame(
        [(check.name, check.value, check.sign, check.text) for check in masking(audit.attacks, measured)],
        columns=["check", "observed", "verdict", "meaning"],
    )
    yield Section("Checks for masked gradients", [about], table=checks)
    yield Section("Scope: what was tested", items=covered(audit))
    yield Section("What was not tested", items=not_tested(audit))
    yield Section("Documents that ask for these numbers", [NO_CONFORMITY], table=crosswalk(audit, measured))
    yield Section("All measures", table=metric_table(audit))
    about = "Thresholds use these names."
    yield Section("All numbers", [about], table=number_table(measured, measured, len(audit.images), with_names=True))


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


def _verdict_line(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "No thresholds were set. The audit has no verdict."
    failed = [str(verdict.threshold) for verdict in verdicts if not verdict.passed]
    if not failed:
        return f"All {len(verdicts)} thresholds pass."
    return f"{len(failed)} of {len(verdicts)} thresholds fail: {', '.join(failed)}."


def _about_attacks(audit: Audit) -> Iterator[str]:
    if not audit.attacks:
        yield "No attack was run."
        return
    for name, attacked in audit.attacks.items():
        yield f"{name} is {attacked.text}."
        yield from (f"Warning: {text}" for text in attacked.warnings)
    yield (
        "An adversarial example is found if the image is classified correctly and the attacked image is not. Distances "
        "are Euclidean, in pixel units. The median distance of those found is over the successes alone: an attack with "
        "few successes can have a small one. The median over all correctly classified images takes the distance as "
        "infinite where no example was found. It is not reached if the attack succeeds on fewer than half of them. To "
        "compare attacks, use this median and the number of adversarial examples."
    )
    yield (
        "Two numbers show how λ ranks the correctly classified images. For an attack within a radius, it is the "
        "ROC-AUC of λ for the images that become misclassified. For an attack without a radius, it is Spearman's "
        "correlation of λ with the distance. Brackets contain 95 % intervals: Wilson's for shares, the bootstrap over "
        "these images for the others."
    )
