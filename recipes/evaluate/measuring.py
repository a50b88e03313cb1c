"""Measure a network at the images of an audit, and attack these images."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from fisher_reg import (
    Lanczos,
    LInf,
    fisher_eigenpairs,
    fisher_kl_ratio,
    fisher_spectral_norm_and_trace,
    single_step_ratio,
)
from recipes.attacks import Attack, AttackResult, attack_all, check_pixels
from recipes.competitors.measurement import Measurement, measure, predict
from recipes.data.base import ImageData, labels_of
from recipes.data.chosen import check_noise, chosen_indices, examples_at
from recipes.evaluate.audit import FAILURE_PROBABILITY, Attacked, Audit, Sensitivity, Shown
from recipes.evaluate.identity import identity
from recipes.runtime.progress import Progress
from recipes.runtime.settings import resolved

SINGLE_STEP = 8 / 255
"""Radius of the ℓ∞ ball in which one gradient step is compared with several."""


@dataclass(frozen=True)
class Examples:
    """The images of an audit.

    Attributes:
        images: ``(B, C, H, W)`` in [0, 1].
        labels: ``(B,)``.
        indices: The indices of the images in the test split.
    """

    images: Tensor
    labels: Tensor
    indices: Sequence[int]

    def to(self, device: torch.device) -> Examples:
        """Return a copy on a device."""
        return Examples(self.images.to(device), self.labels.to(device), self.indices)


def audited_images(config: DictConfig, data: ImageData) -> Examples:
    """Choose test images, and mix in the noise.

    Returns:
        The images, on the CPU.

    Raises:
        ValueError: If there are fewer images than requested, or if they are not pixels in [0, 1].
    """
    num_test = len(labels_of(data.splits["test"]))
    if not 1 <= config.num_shown <= config.num_images <= num_test:
        raise ValueError(
            f"1 <= num_shown={config.num_shown} <= num_images={config.num_images} <= {num_test} (the test images of "
            "the data) must hold; change the first two."
        )
    if config.num_eigenvalues < 1:
        raise ValueError(f"num_eigenvalues must be at least 1; got {config.num_eigenvalues}.")
    check_noise(config.noise)
    generator = torch.Generator().manual_seed(config.seed)
    indices = chosen_indices(data, config.num_images, generator)
    images, labels = examples_at(data, indices, generator, config.noise)
    check_pixels(images)
    return Examples(images, labels, indices)


def audited(config: DictConfig, data: ImageData, network: nn.Module, examples: Examples) -> Audit:
    """Measure and attack the network at the images."""
    images, labels = examples.images, examples.labels
    attacks: dict[str, Attack] = {name: instantiate(node) for name, node in (config.attacks or {}).items() if node}
    effort = instantiate(config.effort)
    with Progress("audit", len(attacks) + 2) as progress:
        progress.describe("λ, bounds and baselines")
        measurement = measure(network, images, labels, effort)
        sensitivity = more_of_lambda(network, images)
        progress.advance("λ, bounds and baselines")
        shown = most_sensitive(config, network, images, measurement)
        progress.advance("the most sensitive images")
        attacked = {}
        for name, attack in attacks.items():
            progress.describe(name)
            attacked[name] = attack_network(attack, network, images, labels)
            progress.advance(name)
    settings = resolved(config)
    weights = "the weights of its factory" if config.checkpoint is None else Path(config.checkpoint).name
    return Audit(
        identity=identity(config, network, images, labels, examples.indices),
        network=f"{config.model._target_} with {weights}",
        data=f"{len(images)} test images of {config.data._target_}, noise {config.noise:g}.",
        settings=settings,
        images=images.cpu(),
        labels=labels.cpu(),
        class_names=tuple(data.class_names),
        measurement=measurement,
        sensitivity=sensitivity,
        attacks=attacked,
        shown=shown,
    )


def more_of_lambda(network: nn.Module, images: Tensor) -> Sensitivity:
    """Return intervals of λ that hold at all images together, and compare λ with divergences after a step."""
    solver = Lanczos(num_steps=20, is_exact=True, failure_probability=FAILURE_PROBABILITY / len(images))
    result, trace = fisher_spectral_norm_and_trace(network, images, solver=solver)
    interval = result.interval()
    parts = (
        interval.lower,
        interval.upper,
        interval.relative_width,
        torch.where(result.eigenvalue > 0, trace / result.eigenvalue, 0.0),
        fisher_kl_ratio(network, images),
        single_step_ratio(network, images, step=SINGLE_STEP, geometry=LInf()),
    )
    return Sensitivity(*(part.double().cpu() for part in parts))


def most_sensitive(config: DictConfig, network: nn.Module, images: Tensor, measurement: Measurement) -> Shown:
    """Return the images with the largest λ, their eigenvectors, and the predictions after a visible step along them."""
    index = measurement.values["lambda"].argsort(descending=True, stable=True)[: config.num_shown]
    chosen = images[index.to(images.device)]
    num_classes = predict(network, chosen[:1]).shape[1]
    pairs = fisher_eigenpairs(network, chosen, min(config.num_eigenvalues, num_classes))
    vectors = pairs.eigenvector[:, 0]
    largest = vectors.flatten(1).abs().amax(1).clamp_min(torch.finfo(vectors.dtype).tiny).view(-1, 1, 1, 1)
    step = config.visible * vectors / largest
    moved = torch.stack([chosen - step, chosen + step]).clamp(0, 1)
    probabilities = torch.stack([predict(network, part).softmax(1) for part in (chosen, *moved)])
    confidence, predicted = probabilities.max(2)
    eigenvalues = pairs.eigenvalue.double()
    return Shown(index, *(part.cpu() for part in (eigenvalues, vectors, moved, predicted, confidence.double())))


def attack_network(attack: Attack, network: nn.Module, images: Tensor, labels: Tensor) -> Attacked:
    """Attack the images; warnings of masked gradients are issued and also kept. The result is on the CPU."""
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = attack_all(attack, network, images, labels)
    told = [str(one.message) for one in caught if Path(one.filename) == Path(__file__)]
    for text in told:
        warnings.warn(text, stacklevel=2)
    parts = (getattr(found, field.name).detach().cpu() for field in fields(found))
    return Attacked(attack, AttackResult(*parts), tuple(told), time.perf_counter() - begin)
