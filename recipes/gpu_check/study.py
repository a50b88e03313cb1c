"""Check numbers and measure times on a GPU: ``python -m recipes.gpu_check``.

1. ``numbers``: all numbers of this package, on four families of networks and an LSTM, compared with the CPU.
2. ``trainer``: the logged numbers of the monitor in a short training on the device, compared with the CPU.
3. ``estimates``, ``large``, ``paper``: times of estimates and of the paper's algorithm in forwards of the same images.
4. ``steps``: times of penalised training steps in plain steps, in each precision and compiled.

Sections are independent: the error of one is recorded, and the others continue. No round of timing starts after the
``max_seconds`` of its section. Writes ``gpu_check.json``, ``gpu_check.csv`` and ``gpu_check.md`` to Hydra's run folder
after each section, and exits with status 1 if a number is wrong or could not be compared.
``python -m recipes.gpu_check --config-name gpu_check_small device=cpu`` is a smaller version.

Takes about a minute on two CPU cores with ``gpu_check_small``; a GPU was not measured.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from recipes.data.spec import ImageSpec
from recipes.gpu_check import timings
from recipes.gpu_check.numbers import CPU, Number, check_trainer, compared, numbers, reference, settled
from recipes.reporting.files import settings_of, show, write
from recipes.reporting.records import plain
from recipes.reporting.tables import markdown_table
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device, environment
from recipes.runtime.progress import track
from recipes.runtime.settings import resolved

Rows = list[dict[str, Any]]


@command("gpu_check")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    if wrong(gpu_check(config)):
        sys.exit(1)


def gpu_check(config: DictConfig) -> dict[str, dict[str, Any]]:
    """Run the sections that ``config.sections`` names and write the files.

    Returns:
        For each section its rows, its seconds and its error (None).
    """
    folder, device = Path(config.output_dir), chosen_device(config.device)
    sections: dict[str, dict[str, Any]] = {}
    for name in track(config.sections, "check"):
        begin, error = time.perf_counter(), None
        rows: Rows = []
        try:
            SECTIONS[name](config, device, rows)
        except Exception as raised:  # a device may raise any error: continue with the other sections
            error = "".join(traceback.format_exception_only(raised)).strip()
        sections[name] = {"rows": rows, "seconds": time.perf_counter() - begin, "error": error}
        _write(config, device, folder, sections)
    show(markdown(sections), folder)
    return sections


def check_numbers(config: DictConfig, device: torch.device, rows: Rows) -> None:
    """Add a row for each number of each network."""
    images, labels = _images(config.small)
    some, begin = list(numbers()), time.perf_counter()
    for name, network in config.networks.items():
        if time.perf_counter() - begin > config.max_seconds.numbers:
            raise TimeoutError(f"max_seconds.numbers={config.max_seconds.numbers} were used up before {name}.")
        rows += [
            {"network": name, **row} for row in compare(_small(config, network, images), images, labels, some, device)
        ]


def compare(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    some: list[Number],
    device: torch.device,
    expected: dict[str, Tensor | str] | None = None,
) -> Rows:
    """Return a row per number: on the device, compared with ``expected`` (by default the numbers on the CPU)."""
    if expected is None:
        expected = reference(network.to(CPU), images, labels, some)
    found = reference(network.to(device), images.to(device), labels.to(device), some)
    return compared(some, found, expected)


def check_training(config: DictConfig, device: torch.device, rows: Rows) -> None:
    """Add a row for each key of the monitor."""
    images, labels = _images(config.small)
    for name in config.trained_networks:
        network = _small(config, config.networks[name], images)
        rows += [{"network": name, **row} for row in check_trainer(config, network, images, labels, device)]


def time_estimates(config: DictConfig, device: torch.device, rows: Rows) -> None:
    """Add rows of the small images."""
    for name, network in config.networks.items():
        images, _ = _images(config.timed)
        built = _small(config, network, images).to(device)
        images = images.to(device)
        _add(rows, config, "estimates", name, timings.of_estimates(built, images), built, images, device)


def time_large(config: DictConfig, device: torch.device, rows: Rows) -> None:
    """Add rows of the large images."""
    network, images = _large(config, device)
    _add(rows, config, "large", config.large.name, timings.of_estimates(network, images), network, images, device)


def time_paper(config: DictConfig, device: torch.device, rows: Rows) -> None:
    """Add rows of the paper's algorithm and of this package."""
    network, images = _large(config, device)
    some = timings.of_the_paper(network, images, config.large.num_paper_images)
    _add(rows, config, "paper", config.large.name, some, network, images, device)
    theirs, ours = rows[-2:]
    theirs["times_ours"] = ours["images_per_second"] / theirs["images_per_second"]


def time_steps(config: DictConfig, device: torch.device, rows: Rows) -> None:
    """Add rows of training steps, in each variant of precision and compilation."""
    images, labels = _images(config.timed)
    batch = [images.to(device), labels.to(device)]
    seconds = config.max_seconds.steps / sum(len(chosen.networks) for chosen in config.variants.values())
    for variant, chosen in config.variants.items():
        settings = DictConfig(resolved(config))  # allows keys that the configuration does not have
        settings.trainer.update(accelerator="gpu" if device.type == "cuda" else "cpu", devices=1)
        settings.trainer.precision = chosen.precision
        for name in chosen.networks:
            network = _small(config, config.networks[name], images).train()
            if chosen.compile_backend is not None:
                network = cast("nn.Module", torch.compile(network, backend=chosen.compile_backend))
            found = timings.of_steps(settings, network, batch, seconds)
            rows += [{"network": name, "variant": variant, **row} for row in found]


SECTIONS: dict[str, Callable[[DictConfig, torch.device, Rows], None]] = {
    "numbers": check_numbers,
    "trainer": check_training,
    "estimates": time_estimates,
    "large": time_large,
    "paper": time_paper,
    "steps": time_steps,
}
JUDGED = ("numbers", "trainer")


def wrong(sections: dict[str, dict[str, Any]]) -> bool:
    """Whether a number did not pass, or a section that compares numbers was not finished."""
    rows = [row for section in sections.values() for row in section["rows"]]
    return any(row.get("passed") is False for row in rows) or any(
        sections[name]["error"] is not None for name in JUDGED if name in sections
    )


def markdown(sections: dict[str, dict[str, Any]]) -> str:
    """Return a heading and a table per section."""
    parts = []
    for name, section in sections.items():
        parts.append(f"## {name} ({section['seconds']:.0f} s)\n")
        if section["error"] is not None:
            parts.append(f"Error: {section['error']}\n")
        if section["rows"]:
            cells = pd.DataFrame(section["rows"], dtype=object)  # integers stay integers
            parts.append(markdown_table(cells.map(_shown)) + "\n")
    return "\n".join(parts)


def _shown(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return None if value == "" else value


def _write(config: DictConfig, device: torch.device, folder: Path, sections: dict[str, dict[str, Any]]) -> None:
    result = {
        "environment": environment(device),
        "config": settings_of(config),
        "sections": sections,
    }
    rows = [{"section": name, **row} for name, section in sections.items() for row in section["rows"]]
    write(folder, "gpu_check", config, rows=pd.DataFrame(rows), page=markdown(sections), record=plain(result))


def _add(
    rows: Rows,
    config: DictConfig,
    section: str,
    name: str,
    some: list[timings.Timed],
    network: nn.Module,
    images: Tensor,
    device: torch.device,
) -> None:
    share = len(config.networks) if section == "estimates" else 1
    seconds = config.max_seconds[section] / share
    found = timings.alternately(some, network, images, device, config.num_rounds, seconds)
    rows += [{"network": name, **row} for row in found]


def _images(size: DictConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size.num_images, 3, size.image_size, size.image_size, generator=generator)
    return images, torch.randint(10, (size.num_images,), generator=generator)


def _small(config: DictConfig, network: DictConfig, images: Tensor) -> nn.Module:
    spec = ImageSpec(10, 3, images.shape[-1], (0.5,) * 3, (0.25,) * 3)
    return settled(timings.built(network, spec=spec), images[:_NUM_TO_SETTLE])


def _large(config: DictConfig, device: torch.device) -> tuple[nn.Module, Tensor]:
    images = _images(config.large)[0].to(device)
    network = timings.built(config.large.network).to(device)
    return settled(network, images[:_NUM_TO_SETTLE]), images


_NUM_TO_SETTLE = 16
