"""The training of a network of ``recipes.compare``; one that was killed goes on at its last finished epoch.

It is apart from the other stages, so that a change of what they use trains nothing anew.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from recipes.data.base import ImageData
from recipes.data.chosen import prepared_data
from recipes.models.classifier import Classifier
from recipes.models.training import share_correct
from recipes.runtime.cache import Result, Settings, kept_file
from recipes.runtime.environment import chosen_device


def weights_path(run: Settings, cache: Path) -> Path:
    """Return where the weights of a run are kept."""
    return kept_file(run, cache, ".pt")


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


def train(run: Settings, cache: Path) -> Result:
    """Train a network from its last finished epoch, if there is one, and keep its weights."""
    data, weights = loaded(run["data"]), weights_path(run, cache)
    pl.seed_everything(run["seed"], workers=True, verbose=False)
    network = instantiate(run["network"], spec=data.spec)
    made_by = instantiate(run["attack"]) if run["attack"] else None
    optimizer = instantiate(run["optimizer"])
    module = Classifier(network, data.spec.num_classes, optimizer, made_by, run["annealed"])
    epochs, state = weights.with_suffix(".epochs"), RandomStateCheckpoint()
    callbacks = [state, ModelCheckpoint(epochs, save_on_train_epoch_end=True)]
    trainer: pl.Trainer = instantiate(run["trainer"], callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, train_dataloaders=data.train_dataloader(), ckpt_path=_last(epochs))
    seconds, device = state.seconds(), chosen_device(run["device"])
    partial_path = weights.with_suffix(f".{os.getpid()}")
    torch.save(network.state_dict(), partial_path)
    os.replace(partial_path, weights)
    accuracy = share_correct(network.eval().to(device), data, device)
    shutil.rmtree(epochs, ignore_errors=True)
    return {"accuracy": accuracy, "seconds": seconds}


def loaded(data: Settings) -> ImageData:
    """Read a data set once for consecutive networks."""
    return _loaded(json.dumps(data))


@lru_cache(maxsize=1)
def _loaded(data: str) -> ImageData:
    return prepared_data(OmegaConf.create({"data": json.loads(data), "seed": 0}))


def _last(epochs: Path) -> Path | None:
    """Return the newest checkpoint, if there is one: a new one is whole before the old one is removed."""
    return max(epochs.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
