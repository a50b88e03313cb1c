"""Check the mathematics on a trained network: ``python -m recipes.theory model=vgg``.

Three statements, each with the rate at which its error must decrease:

1. F is the covariance of the input gradients of the logits over labels drawn under the network: the error of n sampled
   labels decreases as n^(-1/2).
2. KL(p_x || p_{x+d}) = d'Fd / 2 + O(|d|^3), along the top eigenvector and along random directions: KL grows with slope
   2, its relative deviation from the quadratic form with slope 1, and ``breaks_at`` is the length at which the median
   deviation passes 10 %, interpolated in the logarithms between the two measured lengths around it.
3. The trace estimators have the variances of their formulas.

Writes ``theory.csv`` (the curves), ``theory.png`` and ``theory.json`` (the slopes) to Hydra's run folder. Everything is
computed in float64 on test images with a little noise: without it flat backgrounds are exactly at the kinks of max
pooling, where no expansion holds.

Takes about a minute and a half on two CPU cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn
from torch.distributions import Categorical as LabelDistribution
from torch.distributions import kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisher_reg import EigenResult, Hutchinson, Rademacher, StandardNormal, fisher_eigenpairs, fisher_trace
from fisher_reg.style import COLOURS, legend_under, look, panels, plain_ticks, style
from recipes.data.chosen import check_noise, fixed_images, prepared_data
from recipes.models.training import trained_network
from recipes.reporting.files import write
from recipes.reporting.tables import print_table
from recipes.runtime.command import command
from recipes.runtime.progress import track

BREAKS = 0.1
"""Relative deviation of the divergence from the quadratic form above which the expansion is no longer valid."""


@command("theory")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    check(config)


def check(config: DictConfig) -> dict[str, float]:
    """Check the statements, write the files, and return the content of ``theory.json``."""
    check_noise(config.noise)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    data = prepared_data(config)
    network = trained_network(config, data).double()
    images = fixed_images(data, config.num_images, config.noise)
    pairs = fisher_eigenpairs(network, images, data.spec.num_classes)
    first, last = config.log10_lengths
    parts: dict[str, Callable[[], pd.DataFrame]] = {
        "labels": lambda: label_variance(network, images, pairs, config.num_labels, config.num_repeats),
        "divergence": lambda: divergence(network, images, pairs, np.logspace(first, last, config.num_lengths)),
        "trace": lambda: trace_variance(network, images, pairs, config.num_probes, config.num_repeats),
    }
    curves = pd.concat([parts[name]() for name in track([*parts], "theory")], ignore_index=True)
    summary = summarize(curves)
    write(folder, "theory", config, rows=curves, record=summary, figure=draw(curves, summary), digits=6)
    report(summary, folder)
    return summary


def label_variance(
    network: nn.Module, images: Tensor, pairs: EigenResult, num_labels: list[int], num_repeats: int
) -> pd.DataFrame:
    """Return the relative error of the covariance of the input gradients of sampled logits, by number of samples."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        jacobians = torch.func.vmap(torch.func.jacrev(lambda image: network(image[None])[0]))(images).flatten(2)
        probabilities = network(images).softmax(1)
    vectors = pairs.eigenvector.flatten(2)
    rows = []
    for index, jacobian in enumerate(jacobians):
        fisher = vectors[index].T @ (pairs.eigenvalue[index, :, None] * vectors[index])
        for count in num_labels:
            errors = []
            for _ in range(num_repeats):
                labels = torch.multinomial(probabilities[index], count, replacement=True)
                errors.append((torch.cov(jacobian[labels].T, correction=0) - fisher).norm() / fisher.norm())
            rows.append(("label variance", "labels", index, count, float(torch.stack(errors).mean())))
    return _frame(rows)


def divergence(network: nn.Module, images: Tensor, pairs: EigenResult, lengths: np.ndarray[Any, Any]) -> pd.DataFrame:
    """Return the ratio of the divergence to the quadratic form, by step length, for two kinds of direction."""
    top = pairs.eigenvector[:, 0]
    random = torch.nn.functional.normalize(torch.randn_like(images).flatten(1)).view_as(images)
    rows = []
    with torch.no_grad():
        here = LabelDistribution(logits=network(images))
        for name, direction in (("top eigenvector", top), ("random direction", random)):
            along = (pairs.eigenvector.flatten(2) @ direction.flatten(1)[:, :, None]).squeeze(2)
            curvature = (pairs.eigenvalue * along.square()).sum(1)
            for length in lengths:
                there = LabelDistribution(logits=network(images + length * direction))
                kl = kl_divergence(here, there)
                deviation = (kl / (curvature * length**2 / 2) - 1).abs()
                for index in range(len(images)):
                    rows.append(("divergence", name, index, length, float(kl[index])))
                    rows.append(("deviation", name, index, length, float(deviation[index])))
    return _frame(rows)


def trace_variance(
    network: nn.Module, images: Tensor, pairs: EigenResult, num_probes: list[int], num_repeats: int
) -> pd.DataFrame:
    """Return the root mean square error of the trace estimators divided by that of their formula."""
    left = pairs.left_singular_vector
    gram = left.mT @ (pairs.eigenvalue[:, :, None] * left)
    trace = pairs.eigenvalue.sum(1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for probe in (Rademacher(), StandardNormal()):
        for count in num_probes:
            estimator = Hutchinson(count, probe, solver=None)
            estimates = [
                fisher_trace(network, images, estimator=estimator, generator=generator) for _ in range(num_repeats)
            ]
            measured = (torch.stack(estimates) - trace).square().mean(0).sqrt() / trace
            stated = (probe.variance(gram) / count).sqrt() / trace
            name = type(probe).__name__
            for index in range(len(images)):
                rows.append(("trace error", name, index, count, float(measured[index])))
                rows.append(("trace error, formula", name, index, count, float(stated[index])))
    return _frame(rows)


def summarize(curves: pd.DataFrame) -> dict[str, float]:
    """Fit the slopes of the logarithms of the medians over images, for lengths at which the expansion is valid."""
    medians = _medians(curves)
    summary = {"label_variance_slope": _slope(medians["label variance", "labels"])}
    for name in ("top eigenvector", "random direction"):
        deviation = medians["deviation", name]
        broken = deviation.index[deviation > BREAKS]
        valid = deviation.index[deviation.index < (broken.min() if len(broken) else math.inf)]
        key = name.replace(" ", "_")
        summary[f"divergence_slope_{key}"] = _slope(medians["divergence", name][valid])
        summary[f"deviation_slope_{key}"] = _slope(deviation[valid])
        summary[f"breaks_at_{key}"] = crossing(deviation, BREAKS)
    for name in ("Rademacher", "StandardNormal"):
        measured, stated = (curves[(curves.check == kind) & (curves.series == name)] for kind in _TRACE_KINDS)
        summary[f"trace_error_slope_{name}"] = _slope(medians["trace error", name])
        ratio = measured.value.to_numpy() / stated.value.to_numpy()
        summary[f"trace_error_over_formula_{name}"] = float(np.sqrt(np.mean(ratio**2)))
    return summary


def crossing(curve: pd.Series, level: float) -> float:
    """Return where a curve first exceeds a level, linearly interpolated between its points in the logarithms.

    Args:
        curve: Positive values by increasing positive index.
        level: A positive number.

    Returns:
        The first index if it exceeds the level already, infinity if none does.

    Example:
        >>> crossing(pd.Series([0.01, 1.0], index=[1.0, 100.0]), 0.1)
        10.0
    """
    above = np.flatnonzero(curve.to_numpy() > level)
    if not len(above):
        return math.inf
    around = curve.iloc[max(0, above[0] - 1) : above[0] + 1]
    where = np.interp(math.log(level), np.log(around.to_numpy()), np.log(around.index.to_numpy(float)))
    return round(float(np.exp(where)), _DIGITS)


@style()
def draw(curves: pd.DataFrame, summary: dict[str, float]) -> Figure:
    """Draw the medians over the images, with the slopes in the legends."""
    medians = _medians(curves)
    figure, ((labels, steps, traces),) = panels(1, 3, height=4.4)
    slope = summary["label_variance_slope"]
    labels.plot(
        medians["label variance", "labels"], label=f"sampled labels,\nslope {slope:.2f} (theory: -0.5)", **look(0)
    )
    labels.set(xlabel="sampled labels n", ylabel=r"$\|\hat F_n - F\|_F \,/\, \|F\|_F$", title="F is a label variance")
    for number, name in enumerate(("top eigenvector", "random direction")):
        key = name.replace(" ", "_")
        label = f"{name}, slope {summary[f'deviation_slope_{key}']:.2f}"
        steps.plot(medians["deviation", name], label=label, **look(number))
        if math.isfinite(length := summary[f"breaks_at_{key}"]):
            steps.axvline(length, color=COLOURS[number], linestyle=":", label=f"10 % at ε = {length:.2g}")
    steps.axhline(BREAKS, color="gray", linestyle=":")
    steps.set(xlabel="length ε of the step, pixels", title="KL and its quadratic form")
    steps.set_ylabel(r"$|KL \,/\, \frac{1}{2}\delta^T F \delta - 1|$")
    for number, name in enumerate(("Rademacher", "StandardNormal")):
        ratio, both = summary[f"trace_error_over_formula_{name}"], look(number)
        measured = both | {"linestyle": "none", "markersize": 7}
        traces.plot(medians["trace error", name], label=f"{name}: {ratio:.2f} × formula", **measured)
        traces.plot(medians["trace error, formula", name], label=f"{name}, formula", **(both | {"marker": ""}))
    traces.set(xlabel="probes", ylabel="relative error (RMS)", title="Hutchinson's trace")
    for axes in (labels, steps, traces):
        axes.set(xscale="log", yscale="log")
        legend_under(axes)
    for axes in (labels, traces):
        plain_ticks(axes.yaxis)
    return figure


def report(summary: dict[str, float], folder: Path) -> None:
    """Print the slopes."""
    theory = {"label_variance": "-0.5", "divergence": "2", "deviation": "1", "trace_error_slope": "-0.5"}
    rows = []
    for key, value in summary.items():
        expected = next((text for start, text in theory.items() if key.startswith(start)), "")
        rows.append((key.replace("_", " "), "1" if "over_formula" in key else expected, value))
    console = Console()
    shown = pd.DataFrame(rows, columns=["quantity", "theory", "measured"])
    print_table(console, "theory and measurement", shown)
    console.print(f"Files: {folder}", soft_wrap=True)


_DIGITS = 12  # more are round-off of the logarithms
_TRACE_KINDS = ("trace error", "trace error, formula")


def _frame(rows: Sequence[tuple[str, str, int, float, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["check", "series", "image", "x", "value"])


def _medians(curves: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    return {key: group.groupby("x").value.median() for key, group in curves.groupby(["check", "series"])}


def _slope(curve: pd.Series) -> float:
    return float(np.polyfit(np.log(curve.index.to_numpy(float)), np.log(curve.to_numpy()), 1)[0])


if __name__ == "__main__":
    main()
