"""Comparison of bounds in balls with the global bound, and of certified radii with those of the global constant.

For the first ``num_ball_images`` images of each network, :func:`fisher_reg.local_fisher_bound` at each of ``radii`` is
compared with :func:`fisher_reg.fisher_bound`, and :func:`fisher_reg.certified_radius` with the radius from the global
constant. Every bound is tested at ``num_attacks`` points per image and radius, half of them random, half found by
ascent of the largest eigenvalue.
"""

from __future__ import annotations

import math
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from fisher_reg import Exact, certified_radius, fisher_bound, fisher_spectral_norm, local_fisher_bound
from recipes.runtime.timing import timed

_ROUND_OFF = 1e-6
"""Rounding tolerance of a bound below the eigenvalue, in log10."""


def balls(network: nn.Module, images: Tensor, radii: list[float], num_attacks: int) -> pd.DataFrame:
    """Return one row per radius, and a row of the certified radii.

    Args:
        network: In float64.
        images: ``(B, C, H, W)`` in pixels.
        radii: Euclidean, in pixels.
        num_attacks: Number of points per image and radius.
    """
    everywhere = fisher_bound(network, images).log10_value
    rows = []
    for radius in radii:
        found, seconds = timed(partial(local_fisher_bound, network, images, radius=radius), images.device)
        attacked = strongest(network, images, radius, num_attacks)
        gained = everywhere - found.log10_value
        rows.append(
            {
                "radius": f"{radius:g}",
                "log10_global": everywhere,
                "log10_bound": float(found.log10_value.mean()),
                "gained_mean": float(gained.mean()),
                "gained_median": float(gained.median()),
                "log10_attacked": float(attacked.mean()),
                "num_attacked": num_attacks * len(images),
                "num_violations": int((attacked - found.log10_value > _ROUND_OFF).sum()),
                "evidence": ", ".join(f"{name} {found.evidence.count(name)}" for name in dict.fromkeys(found.evidence)),
                "seconds": seconds,
            }
        )
    certified, seconds = timed(lambda: certified_radius(network, images), images.device)
    ratio = certified / certified_radius(network, images, uses_balls=False)
    changed = attack_classes(network, images, certified, num_attacks)
    rows.append(
        {
            "radius": f"certified, median {float(certified.median()):.2g}",
            "log10_global": everywhere,
            "gained_mean": float(ratio.log10().mean()),
            "gained_median": float(ratio.median()),
            "num_attacked": num_attacks * len(images),
            "num_violations": changed,
            "evidence": "gains: mean log10 and median of the ratio to the global radius",
            "seconds": seconds,
        }
    )
    return pd.DataFrame(rows)


def strongest(network: nn.Module, images: Tensor, radius: float, num_attacks: int) -> Tensor:
    """Return log10 of the largest eigenvalue found within the radius of each image, ``(B,)``."""
    generator = torch.Generator().manual_seed(0)
    best = torch.full((len(images),), -math.inf, dtype=torch.float64)
    point = images.clone()
    for number in range(num_attacks):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        if number % 2:  # random step from the last point, accepted if it increases the value
            trial = _within(point + 0.3 * radius * _unit(noise), images, radius)
        else:
            trial = _within(images + radius * _unit(noise), images, radius)
        value = fisher_spectral_norm(network, trial, solver=Exact()).eigenvalue.log10()
        better = value > best
        best = torch.where(better, value, best)
        point = torch.where(better.view(-1, 1, 1, 1), trial, point)
    return best


def attack_classes(network: nn.Module, images: Tensor, radii: Tensor, num_attacks: int) -> int:
    """Return the number of images with another class at 0.999 of the radius, found by gradient and random steps."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        predicted = network(images).argmax(1)
    fallen = torch.zeros(len(images), dtype=torch.bool)
    size = 0.999 * radii.view(-1, 1, 1, 1)
    point = images.clone()
    for number in range(num_attacks):
        moving = point.clone().requires_grad_()
        logits = network(moving)
        fallen |= logits.argmax(1) != predicted
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, predicted, reduction="sum"), moving)
        point = images + size * _unit(point - images + 0.5 * size * _unit(gradient))
        if number % 20 == 19:  # restart from a random point of the sphere
            noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            point = images + size * _unit(noise)
    return int(fallen.sum())


def _within(point: Tensor, images: Tensor, radius: float) -> Tensor:
    offset = point - images
    length: Tensor = torch.linalg.vector_norm(offset.flatten(1), dim=1).view(-1, 1, 1, 1)
    return images + offset * (radius / length).clamp_max(1.0) * (1 - 1e-12)


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors.flatten(1), dim=1).view(-1, 1, 1, 1)
    return vectors / length.clamp_min(1e-300)
