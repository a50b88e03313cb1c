r"""Audit a classifier: ``python -m recipes.evaluate run=FOLDER`` for one that ``recipes.train`` has trained there.

Data, network and checkpoint are then those of the training. Others are named one by one::

    python -m recipes.evaluate checkpoint=model.ckpt data=cifar10 model=resnet

Any importable factory goes, with its own arguments (``~model`` drops those of the group)::

    python -m recipes.evaluate checkpoint=weights.pt data=npz data.path=images.npz \
        ~model model._target_=torchvision.models.resnet18 model.num_classes=10 \
        'normalize={mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}'

Leaves in Hydra's run folder ``audit.html`` (one page that needs nothing else), ``audit.json`` (every number of every
image) and TensorBoard events.

Takes about half a minute on two CPU cores for the network and the images of ``recipes.train``'s defaults.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from fisher_reg import Lanczos, fisher_eigenpairs, fisher_spectral_norm_and_trace, summarize
from recipes.attacks import Attack, AttackResult, attack_all, check_pixels
from recipes.competitors.measurement import Measurement, measure, predict
from recipes.data.base import ImageData, labels_of
from recipes.data.chosen import check_noise, chosen_examples, prepared_data
from recipes.evaluate.audit import Attacked, Audit, Shown, outcome, record
from recipes.evaluate.page import figures, page, summary
from recipes.evaluate.reading import reading
from recipes.models.checkpoints import built_network, check_network
from recipes.models.runs import with_run
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device
from recipes.runtime.progress import Progress
from recipes.runtime.provenance import provenance
from recipes.runtime.settings import resolved


@command("evaluate")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    evaluate(config)


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Audit the network and write the files.

    Returns:
        What ``audit.json`` holds.

    Raises:
        FileNotFoundError: If ``run`` is no folder of a training.
        ValueError: Before any measurement, for data, a checkpoint or a network that do not fit one another.
    """
    config = with_run(config)
    data = prepared_data(config)
    device = chosen_device(config.device)
    network = built_network(config, data.spec).to(device)
    images, labels = (part.to(device) for part in audited_images(config, data))
    check_network(network, images[:1], data.spec.num_classes)
    audit = measured(config, data, network, images, labels)
    texts = reading(audit)
    result = record(audit, texts) | {"provenance": provenance(config)}
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.html").write_text(page(audit, texts), encoding="utf-8")
    (folder / "audit.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    log(audit, texts, folder / "tensorboard")
    report(audit, texts, folder)
    return result


def audited_images(config: DictConfig, data: ImageData) -> tuple[Tensor, Tensor]:
    """Choose test images, and mix in the noise.

    Returns:
        Images ``(B, C, H, W)`` and labels ``(B,)``.

    Raises:
        ValueError: If there are not as many as asked for, or they are not pixels in [0, 1].
    """
    num_test = len(labels_of(data.splits["test"]))
    if not 1 <= config.num_shown <= config.num_images <= num_test:
        raise ValueError(
            f"1 <= num_shown={config.num_shown} <= num_images={config.num_images} <= {num_test} (the test images of "
            "the data) must hold; change the first two."
        )
    check_noise(config.noise)
    generator = torch.Generator().manual_seed(config.seed)
    images, labels = chosen_examples(data, config.num_images, generator, config.noise)
    check_pixels(images)
    return images, labels


def measured(config: DictConfig, data: ImageData, network: nn.Module, images: Tensor, labels: Tensor) -> Audit:
    """Measure and attack the network at the images."""
    attacks: dict[str, Attack] = {name: instantiate(node) for name, node in (config.attacks or {}).items()}
    effort = instantiate(config.effort)
    with Progress("audit", len(attacks) + 2) as progress:
        progress.describe("λ, bounds and baselines")
        measurement = measure(network, images, labels, effort)
        solver = Lanczos(num_steps=20, is_exact=True)
        result, trace = fisher_spectral_norm_and_trace(network, images, solver=solver)
        effective_rank = torch.where(result.eigenvalue > 0, trace / result.eigenvalue, 0.0)
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
        network=f"{config.model._target_} with {weights}",
        data=f"{len(images)} test images of {config.data._target_}, noise {config.noise:g}.",
        settings=settings,
        images=images.cpu(),
        labels=labels.cpu(),
        class_names=tuple(data.class_names),
        measurement=measurement,
        effective_rank=effective_rank.double().cpu(),
        interval_width=result.interval().relative_width.double().cpu(),
        attacks=attacked,
        shown=shown,
    )


def most_sensitive(config: DictConfig, network: nn.Module, images: Tensor, measurement: Measurement) -> Shown:
    """Return the images of the largest λ, with their eigenvectors and what a visible step along them does."""
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
    """Attack the images, and keep the warnings of masked gradients besides giving them; everything on the CPU."""
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = attack_all(attack, network, images, labels)
    told = [str(one.message) for one in caught if Path(one.filename) == Path(__file__)]
    for text in told:
        warnings.warn(text, stacklevel=2)
    parts = (getattr(found, field.name).detach().cpu() for field in fields(found))
    return Attacked(attack, AttackResult(*parts), tuple(told), time.perf_counter() - begin)


def log(audit: Audit, texts: list[str], folder: Path) -> None:
    """Write scalars, the histogram of log10 λ, the figures and the reading for TensorBoard."""
    values = audit.measurement.values["lambda"]
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("audit/accuracy", audit.correct.double().mean())
        for name, value in summarize(values).items():
            writer.add_scalar(f"fisher/lambda_max_{name}", value)
        for name in ("global", "local", "blockwise"):
            bound = float(audit.measurement.values[f"log10_{name}"].nanmean())
            if bound == bound:
                writer.add_scalar(f"fisher/log10_bound_{name}", bound)
        for name in audit.attacks:
            found = outcome(audit, name)
            writer.add_scalar(f"attack/{name}/accuracy", found["accuracy"]["value"])
            if found["num_adversarial"]:
                writer.add_scalar(f"attack/{name}/median_distance", found["median_distance"])
        if bool((values > 0).any()):
            writer.add_histogram("fisher/log10_lambda_max", values[values > 0].log10())
        for name, figure in figures(audit).items():
            writer.add_figure(f"audit/{name}", figure)
        writer.add_text("audit/reading", "\n\n".join(texts))


def report(audit: Audit, texts: list[str], folder: Path) -> None:
    """Print the summary, the reading and where the files are."""
    table = Table(title=audit.title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in summary(audit).itertuples(index=False):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for text in texts:
        console.print(text, highlight=False, markup=False)
    console.print(f"Files: {folder}", soft_wrap=True)
