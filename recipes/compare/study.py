"""Replicate the experiment of arXiv 2606.04767: ``python -m recipes.compare [experiment=compare/cpu|compare/paper]``.

Every network (data set x model x training x seed) is trained, attacked, and measured on the same test images: λ white
box and black box, the paper's two estimators, and the other measures of
:data:`recipes.competitors.measurement.METRICS`. The analysis measures how well each number predicts which examples are
misclassified under attack and which networks are less robust. A little uniform noise avoids the kinks of max pooling on
flat backgrounds.

Writes to Hydra's run folder ``networks.csv`` (a row per network), ``examples.csv.gz`` (a row per network and image),
``per_example.csv`` and ``per_model.csv`` (the statistics), ``compare.json`` (settings and findings), ``compare.md``,
five figures, and the self-contained page ``compare.html``. Each stage of each network is cached in ``cache_dir`` by its
settings, its data, the source that it uses, and the versions of torch and fisher-reg: an interrupted run resumes where
it was, a training at its last epoch, and a change repeats only the work that depends on it.

Takes about a quarter of an hour on two CPU cores, and half an hour with ``experiment=compare/cpu``, both with
``num_processes=2``; ``experiment=compare/paper`` was not measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from recipes.compare.analysis import NEAREST, Analysis, analyse
from recipes.compare.findings import findings
from recipes.compare.powers import NETWORK
from recipes.compare.report import write
from recipes.compare.stages import STAGES
from recipes.compare.training import train
from recipes.competitors.measurement import METRICS, predict
from recipes.data.base import ImageData
from recipes.data.chosen import check_noise, prepared_data
from recipes.runtime.cache import Settings, stamped
from recipes.runtime.command import command
from recipes.runtime.jobs import Workers, execute, folders
from recipes.runtime.settings import merged, resolved
from recipes.statistics.agreement import MIN_MODELS

_TRAINED_BY = ("optimizer", "trainer", "annealed", "device")
_MEASURED_BY = ("num_images", "noise", "effort", "num_resamples")
_SHOWN = ("datasets", "models", "trainings", "attacks", "seeds", *_TRAINED_BY, *_MEASURED_BY)


@command("compare")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    compare(config)


def compare(config: DictConfig) -> Analysis:
    """Train, attack and measure what is not in the cache, analyse it, and write the files.

    Returns:
        The data of the files.

    Raises:
        ValueError: For settings that :func:`check` rejects; before any training.
    """
    begin = time.perf_counter()
    workers = Workers.of(config)
    check(config, plan(config))
    folder, cache = folders(config)
    runs = [stamped(run, train) for run in plan(config)]
    results: list[dict[str, Any]] = [{"run": run} for run in runs]
    for stage, work in STAGES.items():
        todo = [stage_settings(config, stage, run) for run in runs]
        for index, result in execute(stage, todo, work, workers, _described, cache):
            results[index][stage] = result
    found = analyse(networks_frame(results), examples_frame(results), list(config.attacks), config.num_resamples)
    settings = resolved(OmegaConf.masked_copy(config, list(_SHOWN)))
    texts = findings(found)
    write(found, texts, settings, folder)
    console = Console()
    for text in texts:
        console.print(f"- {text}", highlight=False)
    console.print(f"{len(runs)} networks in {time.perf_counter() - begin:.0f} s. Files: {folder}", soft_wrap=True)
    return found


def plan(config: DictConfig) -> list[Settings]:
    """Return the settings on which the weights of each network depend, sorted by seed."""
    everything = resolved(config, output_dir=config.cache_dir)
    return [
        {key: everything[key] for key in _TRAINED_BY}
        | {"dataset": dataset, "model": model, "training": training, "seed": seed}
        | {"data": data, "network": network, "attack": options["attack"]}
        for seed in everything["seeds"]
        for dataset, data in everything["datasets"].items()
        for model, network in everything["models"].items()
        for training, options in everything["trainings"].items()
    ]


def check(config: DictConfig, runs: list[Settings]) -> None:
    """Raise an error for settings that would fail or mislead after hours of training.

    Raises:
        ValueError: If there is no work, the nearest adversarial examples are not searched, a seed occurs twice, there
            are fewer test images than requested, or a network does not fit the data. Objects that cannot be built raise
            the errors of their constructors.
    """
    if not runs or not config.attacks:
        raise ValueError("There is nothing to compare: set datasets, models, trainings, seeds and attacks.")
    if NEAREST not in config.attacks:
        raise ValueError(f"The comparison needs the distances of the attack {NEAREST}; got {list(config.attacks)}.")
    if len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"A seed occurs twice in seeds={list(config.seeds)}; intervals would be too narrow.")
    if len(config.models) * len(config.trainings) < MIN_MODELS:
        raise ValueError(f"A rank correlation needs at least {MIN_MODELS} pairs of model and training; add some.")
    if config.num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1; got {config.num_resamples}.")
    check_noise(config.noise)
    for attack in [*config.attacks.values(), *(options.attack for options in config.trainings.values())]:
        instantiate(attack)
    instantiate(config.effort)
    for name, data_config in config.datasets.items():
        data = prepared_data(merged({"data": data_config, "seed": 0}))
        num_test = len(data.splits["test"])
        if not 1 <= config.num_images <= num_test:
            raise ValueError(
                f"num_images={config.num_images} must be between 1 and the {num_test} test images of {name}."
            )
        for model, network in config.models.items():
            _check_forward(f"{model} on {name}", instantiate(network, spec=data.spec), data)


def _check_forward(title: str, network: nn.Module, data: ImageData) -> None:
    shape = (2, data.spec.num_channels, data.spec.image_size, data.spec.image_size)
    try:
        outputs = predict(network, torch.zeros(shape))
    except RuntimeError as error:
        raise ValueError(f"{title} does not take images {shape[1:]}: {error}") from error
    if outputs.shape != (2, data.spec.num_classes):
        raise ValueError(f"{title} returns {tuple(outputs.shape[1:])} numbers for {data.spec.num_classes} classes.")


def stage_settings(config: DictConfig, stage: str, run: Settings) -> Settings:
    """Return the settings on which one stage of a network depends, with the stamped run of its training."""
    if stage == "training":
        return run
    needed = ["num_images", "noise", {"attacks": "attacks", "metrics": "effort"}[stage]]
    part = resolved(OmegaConf.masked_copy(config, needed))
    return stamped({"run": run} | part, STAGES[stage])


def _described(settings: Settings) -> str:
    return " ".join(str(settings.get("run", settings)[name]) for name in NETWORK)


def networks_frame(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Return accuracy and seconds: a row per network."""
    return pd.DataFrame(
        {name: entry["run"][name] for name in NETWORK}
        | {"accuracy": entry["training"]["accuracy"], "seconds_training": entry["training"]["seconds"]}
        | {f"seconds_{name}": entry["metrics"]["seconds"][name] for name in METRICS}
        for entry in results
    )


def examples_frame(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Return metrics and attacks: a row per network and image."""
    return pd.concat([pd.DataFrame(dict(_columns(entry))) for entry in results], ignore_index=True)


def _columns(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in NETWORK:
        yield name, entry["run"][name]
    for name in ("correct", "confidence", "blackbox_error", *METRICS):
        yield name, entry["metrics"][name]
    for name, result in entry["attacks"].items():
        for key, values in result.items():
            yield f"{key}_{name}", values
