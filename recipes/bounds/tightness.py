"""Compare the bounds of trained networks with lambda, the largest eigenvalue of the Fisher matrix at test images.

A gap is log10 of the ratio of bound and lambda. The largest bound is compared with the largest lambda, the median with
the median, and the mean over images of log10 with that of lambda. The global bound is the same at every image. The
blockwise bound is computed by an iteration that converges from below, so its gap may be slightly negative. All values
are computed in float64. A little noise on the images avoids the points where max pooling is not differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from omegaconf import DictConfig
from torch import Tensor, nn

from fisher_reg import Tightening, blockwise_fisher_bound, fisher_spectral_norm
from recipes.bounds.balls import balls
from recipes.bounds.speed import LEVELS
from recipes.data.chosen import check_noise, fixed_images, prepared_data
from recipes.models.training import share_correct, trained_network
from recipes.runtime.cache import Settings
from recipes.runtime.environment import chosen_device
from recipes.runtime.settings import merged
from recipes.runtime.timing import timed

_ROUND_OFF = 1e-6
"""Round-off: log10 by which a bound may lie below lambda."""


def check(config: DictConfig) -> None:
    """Check the settings, so that no run fails after a training.

    Raises:
        ValueError: For settings that :func:`cumulative` or this part cannot use.
    """
    for level, steps in _steps(config).items():
        if config.baseline not in steps:
            raise ValueError(f"baseline={config.baseline!r} is no step of the {level} bound; there are {list(steps)}.")
    if not 1 <= config.num_blockwise_images <= config.num_images:
        raise ValueError(
            f"num_blockwise_images={config.num_blockwise_images} must lie in 1..num_images={config.num_images}."
        )
    check_noise(config.noise)


def tightness(settings: Settings, _: Path) -> dict[str, pd.DataFrame]:
    """Train and measure a network of ``settings["piece"]``, one of ``families``.

    Returns:
        Rows of ``segments``, of ``balls`` and of ``tightness``.
    """
    config, family = merged(settings["config"]), settings["piece"]
    part = merged(config, {"model": config.networks[family], "checkpoint": config.checkpoints.get(family)})
    data, device = prepared_data(part), chosen_device(config.device)
    network = trained_network(part, data).to(device)
    facts = {"network": family, "accuracy": share_correct(network, data, device)}
    network = network.double()
    images = fixed_images(data, config.num_images, config.noise).to(device)
    lambdas = fisher_spectral_norm(network, images, solver=instantiate(config.solver)).eigenvalue.log10()
    facts |= {"log10_lambda_max": float(lambdas.max()), "log10_lambda_median": float(lambdas.quantile(0.5))}
    few, some = config.num_blockwise_images, images[: config.num_ball_images]
    found = {
        "segments": segments(network, images[:few], lambdas[:few]),
        "balls": balls(network, some, list(config.radii), config.num_attacks),
        "tightness": ladder(network, images, lambdas, _steps(config), config.baseline, config.num_rounds),
    }
    return {name: pd.concat([pd.DataFrame([facts] * len(rows)), rows], axis=1) for name, rows in found.items()}


def _steps(config: DictConfig) -> dict[str, dict[str, Tightening]]:
    """Return the tightening of each step, for each level that takes it."""
    settings = cumulative(config.ladder)
    return {
        level: {step.name: settings[step.name] for step in config.ladder if level in step.get("levels", LEVELS)}
        for level in LEVELS
    }


def cumulative(steps: Sequence[Mapping[str, Any]]) -> dict[str, Tightening]:
    """Return the tightening at each step: the settings of all steps so far. Before the first step all are off.

    Args:
        steps: ``{"name": ..., "tightening": {field: value, ...}}`` each.

    Raises:
        ValueError: If two steps have the same name.

    Example:
        >>> cumulative([{"name": "a", "tightening": {"folded": True}}, {"name": "b", "tightening": {}}])["b"].merged
        False
    """
    settings = {name: type(value)() for name, value in asdict(Tightening()).items()}
    result = {}
    for step in steps:
        settings |= step["tightening"]
        result[step["name"]] = Tightening(**settings)
    if len(result) < len(steps):
        raise ValueError(f"No two steps of the ladder may have the same name; got {[step['name'] for step in steps]}.")
    return result


def ladder(
    network: nn.Module,
    images: Tensor,
    lambdas: Tensor,
    steps: Mapping[str, Mapping[str, Tightening]],
    baseline: str,
    num_rounds: int,
) -> pd.DataFrame:
    """Return one row per level and step.

    ``log10_bound`` is the mean over images, as are ``gained`` over the step before and ``gained_since_baseline``.

    Args:
        network: The network.
        images: ``(B, C, H, W)``.
        lambdas: Their log10 lambda, ``(B,)``.
        steps: For each level, the tightening at each of its steps.
        baseline: Name of the step that gains are counted from.
        num_rounds: Calls per step; the median of their times is reported.
    """
    parts = []
    for level, bound in LEVELS.items():
        rows = []
        for name, tightening in steps[level].items():
            call = partial(bound, network, images, tightening=tightening)
            found, seconds = timed(call, images.device, num_rounds)
            rows.append({"level": level, "step": name} | gaps(found.log10_value, lambdas) | {"seconds": seconds})
        part = pd.DataFrame(rows)
        part["gained"] = -part.log10_bound.diff()
        part["gained_since_baseline"] = float(part.log10_bound[part.step == baseline].iloc[0]) - part.log10_bound
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def segments(network: nn.Module, images: Tensor, lambdas: Tensor) -> pd.DataFrame:
    """Return one row per number of segments of the blockwise bound, from as many as there are down to one."""
    available = len(blockwise_fisher_bound(network, images[:1]).terms)
    rows = []
    for count in range(available, 0, -1):
        call = partial(blockwise_fisher_bound, network, images, num_segments=count)
        found, seconds = timed(call, images.device)
        rows.append({"num_segments": count} | gaps(found.log10_value, lambdas) | {"seconds": seconds})
    return pd.DataFrame(rows)


def gaps(bounds: Tensor | float, lambdas: Tensor) -> dict[str, float]:
    """Compare log10 bounds with log10 lambdas.

    Args:
        bounds: ``(B,)``, or one number for all images.
        lambdas: ``(B,)``.

    Returns:
        The mean bound, the gaps, and how often a bound was below its lambda, beyond round-off.

    Example:
        >>> gaps(2.0, torch.tensor([0.0, 1.0]))["mean_gap"]
        1.5
    """
    bounds = torch.as_tensor(bounds, dtype=lambdas.dtype, device=lambdas.device).expand_as(lambdas)
    return {
        "log10_bound": float(bounds.mean()),
        "gap_of_max": float(bounds.max() - lambdas.max()),
        "gap_of_median": float(bounds.quantile(0.5) - lambdas.quantile(0.5)),
        "mean_gap": float((bounds - lambdas).mean()),
        "num_violations": int((lambdas - bounds > _ROUND_OFF).sum()),
        "num_images": len(lambdas),
    }


def draw(rows: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Draw the gaps: by step of the ladder, and by number of segments; a colour per network."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = list(rows.step.unique())
    for index, network in enumerate(rows.network.unique()):
        for level, style, face in (("global", "o-", None), ("local", "o--", "none")):
            part = rows[(rows.network == network) & (rows.level == level)]
            label = f"{network}, {level}"
            places = [steps.index(step) for step in part.step]
            left.plot(places, part.gap_of_max, style, color=f"C{index}", markerfacecolor=face, label=label)
        curve = curves[curves.network == network]
        right.plot(curve.num_segments, curve.mean_gap, "o-", color=f"C{index}", markersize=4, label=network)
    left.set_xticks(range(len(steps)), steps, rotation=30, ha="right")
    left.set(ylabel="decades above the largest lambda", title="certified bounds, as improvements are added")
    right.set(xlabel="segments", ylabel="decades above lambda, mean over images", title="blockwise bound")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_yscale("log")  # log10 of the ratio: from 1 for a small network to 100 for a transformer
    left.yaxis.set_major_formatter(LogFormatter())
    left.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 0.5)))
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize="small")
    right.legend(frameon=False)
    return figure
