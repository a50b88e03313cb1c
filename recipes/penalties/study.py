"""Which regulariser buys robustness, and at what price: ``python -m recipes.compare_penalties``.

Trains each model with each method at several strengths and seeds, and measures on the test images: accuracy, accuracy
under projected gradient attacks of kept libraries, the largest Fisher eigenvalue, the expected calibration error, and
the seconds of the training (of one processor on a CPU, so that runs beside each other do not count twice). The best
setting of each method, by the first of ``attacks``, is attacked by AutoAttack too, since a penalty may mask gradients
instead of buying robustness. A method that is null is left out.

Leaves ``penalties.csv`` (a row per network), ``penalties.md``, ``penalties.json`` and ``penalties.png`` in Hydra's run
folder. Finished networks are kept in ``cache_dir``, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from fisher_reg import fisher_spectral_norm
from recipes.attacks.libraries import AutoAttack, ProjectedGradient, attack_all
from recipes.data.base import ImageData
from recipes.data.chosen import prepared_data
from recipes.models.classifier import Classifier
from recipes.penalties.report import KEYS, attack_name, draw, finalists, markdown, short, summarize
from recipes.reporting.records import without_folders
from recipes.runtime.cache import cache_path, cached
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device, provenance
from recipes.runtime.jobs import Settings, execute, quiet

_SETTINGS = ("data", "optimizer", "trainer", "attacks", "num_attack_steps", "num_attacked", "num_probes", "device")


@command("compare_penalties")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    compare_penalties(config)


def compare_penalties(config: DictConfig) -> pd.DataFrame:
    """Train and measure what is not in the cache, and write the files.

    Returns:
        One row per network, as in ``penalties.csv``.

    Raises:
        ValueError: For settings that :func:`check` refuses; before any training.
    """
    runs = plan(config)
    check(config, runs)
    folder, cache = Path(config.output_dir), Path(config.cache_dir)
    for path in (folder, cache):
        path.mkdir(parents=True, exist_ok=True)
    shared = {"num_processes": config.num_processes, "num_threads": config.num_threads, "describe": _described}
    rows = execute("training", runs, partial(train_and_measure, cache=cache), **shared)
    frame = pd.DataFrame([_named(run) | row for run, row in rows]).sort_values([*KEYS, "seed"], ignore_index=True)
    frame.to_csv(folder / "penalties.csv", index=False, float_format="%.6g")
    robust = attack_name(config.attacks[0])
    if config.auto_attacks:
        best = finalists(frame, config.max_clean_loss, robust)
        chosen = [run for run in runs if (run["model"], run["method"], run["strength"]) in best]
        chosen = [run | {"auto": OmegaConf.to_container(config.auto_attacks)} for run in chosen]
        found = execute("AutoAttack on the best", chosen, partial(attack_again, cache=cache), **shared)
        auto = pd.DataFrame([_named(run) | row for run, row in found])
        frame = frame.merge(auto, how="left")
        frame.to_csv(folder / "penalties.csv", index=False, float_format="%.6g")
    cells = summarize(frame)
    (folder / "penalties.md").write_text(markdown(cells), encoding="utf-8")
    shown = {key: config[key] for key in (*_SETTINGS, "models", "methods", "seeds", "auto_attacks")}
    settings = without_folders(OmegaConf.to_container(OmegaConf.create(shown)))
    (folder / "penalties.json").write_text(json.dumps(settings | {"provenance": provenance(config)}, indent=2) + "\n")
    draw(frame, robust).savefig(folder / "penalties.png", dpi=120)
    console = Console()
    console.print(markdown(short(cells, robust)), soft_wrap=True, highlight=False)
    console.print(f"Files: {folder}", soft_wrap=True)
    return frame


def _described(run: Settings) -> str:
    return f"{run['model']}, {run['method']}"


def _named(run: Settings) -> Settings:
    return {key: run[key] for key in (*KEYS, "seed")}


def plan(config: DictConfig) -> list[Settings]:
    """Return everything that the numbers of each network depend on, the first seed of all methods first."""
    everything = OmegaConf.to_container(OmegaConf.merge(config, {"output_dir": config.cache_dir}), resolve=True)
    return [
        {key: everything[key] for key in _SETTINGS}
        | {"model": name, "network": network, "method": method, "strength": strength, "seed": seed}
        | {"parameter": options["parameter"], "callback": options["callback"]}
        for seed in everything["seeds"]
        for name, network in everything["models"].items()
        for method, options in everything["methods"].items()
        if options is not None
        for strength in options["strengths"]
    ]


def check(config: DictConfig, runs: list[Settings]) -> None:
    """Refuse what would fail after hours of training.

    Raises:
        ValueError: If nothing is to be done, a seed occurs twice, or there are fewer test images than asked for. A
            network or a callback that cannot be built raises what its constructor says.
    """
    if not runs:
        raise ValueError("There is nothing to train: give models, methods with strengths, and seeds.")
    if len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"A seed occurs twice in seeds={list(config.seeds)}; standard errors would be too small.")
    data = prepared_data(OmegaConf.create(runs[0] | {"data": config.data}))
    wanted = max(config.num_attacked, config.num_probes)
    if not 1 <= wanted <= len(data.splits["test"]):
        raise ValueError(
            f"num_attacked={config.num_attacked} and num_probes={config.num_probes} must be between 1 and the "
            f"{len(data.splits['test'])} test images."
        )
    for run in runs:
        callbacks(run)
    for network in config.models.values():
        instantiate(network, spec=data.spec)


def callbacks(run: Settings) -> list[pl.Callback]:
    """Build the method of a run at its strength; none for a plain training."""
    if run["callback"] is None:
        return []
    return [instantiate(OmegaConf.create(run["callback"]), **{run["parameter"]: run["strength"]})]


def train_and_measure(run: Settings, cache: Path) -> dict[str, Any]:
    """Train a network, keep its weights, and measure it; or read the results."""
    return cached(run, cache, partial(_train_and_measure, run, cache_path(run, cache).with_suffix(".pt")))


def attack_again(run: Settings, cache: Path) -> dict[str, Any]:
    """Attack the network of a finished run with AutoAttack; or read the results."""
    return cached(run, cache, partial(_attack_again, run, cache))


def _attack_again(run: Settings, cache: Path) -> dict[str, Any]:
    trained = {key: value for key, value in run.items() if key != "auto"}
    data = _quietly_prepared(run)
    network = instantiate(run["network"], spec=data.spec)
    path = cache_path(trained, cache).with_suffix(".pt")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    images, labels = _test_images(data, run["auto"]["num_images"])
    device = chosen_device(run["device"])
    network = network.eval().to(device)
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(run["seed"])
    found = {}
    for attack in run["auto"]["attacks"]:
        name, ball = attack_name(attack), (float(attack["norm"]), attack["epsilon"])
        gradient = ProjectedGradient(*ball, run["num_attack_steps"])
        found[f"same_{name}"] = attack_all(gradient, network, images, labels).accuracy
        found[f"auto_{name}"] = attack_all(AutoAttack(*ball), network, images, labels).accuracy
    return found


def _train_and_measure(run: Settings, weights: Path) -> dict[str, Any]:
    data = _quietly_prepared(run)
    network = instantiate(run["network"], spec=data.spec)
    module = Classifier(network, data.spec.num_classes, instantiate(run["optimizer"]))
    trainer: pl.Trainer = instantiate(run["trainer"], callbacks=callbacks(run))
    clock = time.process_time if chosen_device(run["device"]).type == "cpu" else time.perf_counter
    begin = clock()
    trainer.fit(module, train_dataloaders=data.train_dataloader())
    seconds = clock() - begin
    torch.save(network.state_dict(), weights)
    return {"seconds": seconds, **measure(network.eval().to(chosen_device(run["device"])), data, run)}


def measure(network: nn.Module, data: ImageData, run: Settings) -> dict[str, float]:
    """Measure a trained network on the test images."""
    device = chosen_device(run["device"])
    torch.manual_seed(run["seed"])
    with torch.no_grad():
        parts = [(network(images.to(device)), labels.to(device)) for images, labels in data.test_dataloader()]
    logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    images, known = (part.to(device) for part in _test_images(data, run["num_attacked"]))
    probes = _test_images(data, run["num_probes"])[0].to(device)
    eigenvalues = fisher_spectral_norm(network, probes).eigenvalue.double()
    return {
        "clean": float((logits.argmax(1) == labels).double().mean()),
        **{
            attack_name(attack): attack_all(
                ProjectedGradient(float(attack["norm"]), attack["epsilon"], run["num_attack_steps"]),
                network,
                images,
                known,
            ).accuracy
            for attack in run["attacks"]
        },
        "lambda_mean": float(eigenvalues.mean()),
        "lambda_median": float(eigenvalues.quantile(0.5)),
        "calibration_error": float(multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1])),
        "finite": math.isfinite(float(logits.sum())),
    }


def _quietly_prepared(run: Settings) -> ImageData:
    quiet()
    return prepared_data(OmegaConf.create(run))


def _test_images(data: ImageData, count: int) -> tuple[Tensor, Tensor]:
    """Return the first test images, the same for every network, and their labels."""
    images, labels = zip(*(data.splits["test"][index] for index in range(count)), strict=True)
    return torch.stack(images), torch.tensor([int(label) for label in labels])
