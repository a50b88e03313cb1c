"""The stages of ``recipes.compare`` for one network, each kept in a cache: training, attacks, metrics.

A stage that was killed is done anew, a training from its last finished epoch on, with the same numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from recipes.attacks import attack_all
from recipes.competitors.measurement import measure, predict
from recipes.data.base import ImageData
from recipes.data.chosen import chosen_examples, prepared_data
from recipes.models.classifier import Classifier
from recipes.runtime.cache import cache_path, cached
from recipes.runtime.environment import chosen_device
from recipes.runtime.jobs import Settings, quiet


def train(settings: Settings, cache: Path) -> dict[str, Any]:
    """Train a network from its last finished epoch, if there is one, and keep its weights; or read the results."""
    weights = weights_path(settings["run"], cache)
    result = cached(settings, cache, partial(_train, settings["run"], weights))
    shutil.rmtree(_epochs(weights), ignore_errors=True)
    return result


def attack(settings: Settings, cache: Path) -> dict[str, Any]:
    """Attack a trained network with examples of its own, or read the results."""
    return cached(settings, cache, partial(_attack, settings, cache))


def take_metrics(settings: Settings, cache: Path) -> dict[str, Any]:
    """Measure a trained network, or read the results."""
    return cached(settings, cache, partial(_take_metrics, settings, cache))


STAGES = {"training": train, "attacks": attack, "metrics": take_metrics}


def weights_path(run: Settings, cache: Path) -> Path:
    """Return where the weights of a run are kept."""
    return cache_path(run, cache).with_suffix(".pt")


class RandomStateCheckpoint(pl.Callback):
    """Keeps the state of torch's generators in the checkpoint, so that a training that goes on draws the same.

    And the seconds until then, so that they are those of all its legs.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def seconds(self) -> float:
        """Return how long the training has taken."""
        return time.perf_counter() - self._begin

    def state_dict(self) -> dict[str, Any]:
        """Return the states."""
        states = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        return states | {"seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the states."""
        self._begin -= state_dict["seconds"]
        torch.set_rng_state(state_dict["cpu"].cpu())
        torch.cuda.set_rng_state_all([state.cpu() for state in state_dict["cuda"]])


def _train(run: Settings, weights: Path) -> dict[str, Any]:
    quiet()
    data = _loaded(json.dumps(run["data"]))
    pl.seed_everything(run["seed"], workers=True, verbose=False)
    network = instantiate(run["network"], spec=data.spec)
    made_by = instantiate(run["attack"]) if run["attack"] else None
    optimizer = instantiate(run["optimizer"])
    module = Classifier(network, data.spec.num_classes, optimizer, made_by, run["annealed"])
    epochs, state = _epochs(weights), RandomStateCheckpoint()
    callbacks = [state, ModelCheckpoint(epochs, save_on_train_epoch_end=True)]
    trainer: pl.Trainer = instantiate(run["trainer"], callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, train_dataloaders=data.train_dataloader(), ckpt_path=_last(epochs))
    seconds = state.seconds()
    partial_path = weights.with_suffix(f".{os.getpid()}")
    torch.save(network.state_dict(), partial_path)
    os.replace(partial_path, weights)
    device = chosen_device(run["device"])
    network = network.eval().to(device)
    hits = [predict(network, images.to(device)).argmax(1).cpu() == labels for images, labels in data.test_dataloader()]
    return {"accuracy": float(torch.cat(hits).double().mean()), "seconds": seconds}


def _epochs(weights: Path) -> Path:
    return weights.with_suffix(".epochs")


def _last(epochs: Path) -> Path | None:
    """Return the newest checkpoint, if there is one: a new one is whole before the old one is removed."""
    return max(epochs.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def _attack(settings: Settings, cache: Path) -> dict[str, Any]:
    quiet()
    network, images, labels = _prepared(settings, cache)
    found = {}
    for name, options in settings["attacks"].items():
        torch.manual_seed(settings["run"]["seed"])
        result = attack_all(instantiate(options), network, images, labels)
        parts = {"fooled": result.fooled, "distance": result.euclidean, "masked": result.masked}
        found[name] = {key: value.tolist() for key, value in parts.items()}
    return found


def _take_metrics(settings: Settings, cache: Path) -> dict[str, Any]:
    quiet()
    network, images, labels = _prepared(settings, cache)
    torch.manual_seed(settings["run"]["seed"])
    return measure(network, images, labels, instantiate(settings["effort"])).lists()


def _prepared(settings: Settings, cache: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the trained network and the test images, which are the same for every network of a data set."""
    run = settings["run"]
    data, device = _loaded(json.dumps(run["data"])), chosen_device(run["device"])
    network = instantiate(run["network"], spec=data.spec)
    network.load_state_dict(torch.load(weights_path(run, cache), map_location="cpu", weights_only=True))
    generator = torch.Generator().manual_seed(0)
    images, labels = chosen_examples(data, settings["num_images"], generator, settings["noise"])
    return network.eval().to(device), images.to(device), labels.to(device)


@lru_cache(maxsize=1)
def _loaded(data: str) -> ImageData:
    """Read a data set once for consecutive networks."""
    return prepared_data(OmegaConf.create({"data": json.loads(data), "seed": 0}))
