"""Tightness of the bounds of trained networks relative to lambda, the largest Fisher eigenvalue at test images.

A gap is log10 of the ratio of bound to lambda: of the largest bound to the largest lambda, of the medians, or the mean
over images. The global bound is the same at every image. The blockwise bound is computed by iteration from below, so
that its gap may be slightly negative. All are computed in float64, on images with a little noise, which avoids the
kinks of max pooling.
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
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from omegaconf import DictConfig
from torch import Tensor, nn

from fisher_reg import Tightening, blockwise_fisher_bound, fisher_spectral_norm
from fisher_reg.style import legend_below, look, panels, style
from recipes.bounds.balls import balls
from recipes.bounds.speed import LEVELS
from recipes.data.chosen import check_noise, fixed_images, prepared_data
from recipes.models.training import share_correct, trained_network
from recipes.runtime.cache import Settings
from recipes.runtime.environment import chosen_device
from recipes.runtime.settings import merged
from recipes.runtime.timing import timed

_ROUND_OFF = 1e-6
"""Rounding tolerance of a bound below the eigenvalue, in log10."""


def check(config: DictConfig) -> None:
    """Raise an error for settings that would fail after a training.

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
    """Return the tightening of each step, for each level that uses it."""
    settings = cumulative(config.ladder)
    return {
        level: {step.name: settings[step.name] for step in config.ladder if level in step.get("levels", LEVELS)}
        for level in LEVELS
    }


def cumulative(steps: Sequence[Mapping[str, Any]]) -> dict[str, Tightening]:
    """Return the tightening at each step: the union of the steps so far; before the first step everything is off.

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
        num_rounds: Number of calls per step; their median time is reported.
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
        The mean bound, the gaps, and the number of bounds below their lambda, beyond rounding.

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


@style()
def draw(rows: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Draw the gaps: by step of the ladder, and by number of segments; a colour and a marker per network."""
    figure, ((left, right),) = panels(1, 2, height=4.8)
    steps, networks = (list(rows[name].unique()) for name in ("step", "network"))
    for index, network in enumerate(networks):
        for level, line in _DRAWN.items():
            part = rows[(rows.network == network) & (rows.level == level)]
            places = [steps.index(step) for step in part.step]
            left.plot(places, part.gap_of_max, label=f"{network}, {level}", **(look(index) | line))
        curve = curves[curves.network == network]
        right.plot(curve.num_segments, curve.mean_gap, label=f"{network}, blockwise", **(look(index) | _BLOCKWISE))
    left.set_xticks(range(len(steps)), steps, rotation=35, ha="right")
    left.set(ylabel="log₁₀ of the bound over λ, largest of each", title="certified bounds, step by step")
    right.set(xlabel="segments", ylabel="log₁₀ of the bound over λ, mean", title="blockwise bound, not certified")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_yscale("log")  # log10 of the ratio: from 1 for a small network to 100 for a transformer
    left.yaxis.set_major_formatter(LogFormatter())
    left.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 0.5)))
    left.grid(alpha=0.3, which="both")
    legend_below(figure, sorted([*left.lines, *right.lines], key=_network), ncols=len(networks))
    return figure


def _network(line: Line2D) -> str:
    return str(line.get_label()).partition(",")[0]


_DRAWN = {"global": {"linestyle": "-"}, "local": {"linestyle": "--", "markerfacecolor": "none"}}
_BLOCKWISE = {"linestyle": ":"}
