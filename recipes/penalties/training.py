"""One network of ``recipes.compare_penalties``: trained with a method, measured, and attacked by AutoAttack."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from fisher_reg import fisher_spectral_norm
from recipes.attacks import AutoAttack, ProjectedGradient, attack_all
from recipes.data.base import ImageData
from recipes.data.chosen import prepared_data
from recipes.models.classifier import Classifier
from recipes.runtime.cache import Result, Settings, kept_file
from recipes.runtime.environment import chosen_device


def attack_name(attack: dict[str, Any]) -> str:
    """Return the column of an attack: ``l2_0.25``, ``linf_2/255``."""
    epsilon = float(attack["epsilon"])
    if math.isinf(float(attack["norm"])):
        return f"linf_{round(epsilon * 255, 2):g}/255"
    return f"l2_{epsilon:g}"


def callbacks(run: Settings) -> list[pl.Callback]:
    """Build the method of a run at its strength; none for a plain training."""
    if run["callback"] is None:
        return []
    return [instantiate(OmegaConf.create(run["callback"]), **{run["parameter"]: run["strength"]})]


def train_and_measure(run: Settings, cache: Path) -> Result:
    """Train a network, store its weights, and measure it."""
    data, device = prepared_data(DictConfig(run)), chosen_device(run["device"])
    network = instantiate(run["network"], spec=data.spec)
    module = Classifier(network, data.spec.num_classes, instantiate(run["optimizer"]))
    trainer: pl.Trainer = instantiate(run["trainer"], callbacks=callbacks(run))
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begin = clock()
    trainer.fit(module, train_dataloaders=data.train_dataloader())
    seconds = clock() - begin
    torch.save(network.state_dict(), kept_file(run, cache, ".pt"))
    return {"seconds": seconds, **measure(network.eval().to(device), data, run)}


def attack_again(settings: Settings, cache: Path) -> Result:
    """Attack the network of a finished run with AutoAttack."""
    run, auto = settings["run"], settings["auto"]
    data, device = prepared_data(DictConfig(run)), chosen_device(run["device"])
    network = instantiate(run["network"], spec=data.spec)
    network.load_state_dict(torch.load(kept_file(run, cache, ".pt"), map_location="cpu", weights_only=True))
    network = network.eval().to(device)
    images, labels = (part.to(device) for part in _test_images(data, auto["num_images"]))
    torch.manual_seed(run["seed"])
    found = {}
    for attack in auto["attacks"]:
        name, ball = attack_name(attack), (float(attack["norm"]), attack["epsilon"])
        gradient = ProjectedGradient(*ball, run["num_attack_steps"])
        found[f"same_{name}"] = attack_all(gradient, network, images, labels).accuracy
        found[f"auto_{name}"] = attack_all(AutoAttack(*ball), network, images, labels).accuracy
    return found


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


def _test_images(data: ImageData, count: int) -> tuple[Tensor, Tensor]:
    """Return the first test images, the same for every network, and their labels."""
    images, labels = zip(*(data.splits["test"][index] for index in range(count)), strict=True)
    return torch.stack(images), torch.tensor([int(label) for label in labels])
