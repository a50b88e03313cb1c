"""The training of a network of ``recipes.compare``; an interrupted training resumes at its last finished epoch.

It is separate from the other stages, so that a change of their code does not repeat trainings.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from recipes.data.base import ImageData
from recipes.data.chosen import prepared_data
from recipes.models.classifier import Classifier
from recipes.models.resuming import ResumePoint, stopped_at
from recipes.models.training import share_correct
from recipes.runtime.cache import Result, Settings, kept_file
from recipes.runtime.environment import chosen_device


def weights_path(run: Settings, cache: Path) -> Path:
    """Return the path of the weights of a run."""
    return kept_file(run, cache, ".pt")


def train(run: Settings, cache: Path) -> Result:
    """Train a network, from its last finished epoch if there is one, and store its weights."""
    data, weights = loaded(run["data"]), weights_path(run, cache)
    pl.seed_everything(run["seed"], workers=True, verbose=False)
    network = instantiate(run["network"], spec=data.spec)
    made_by = instantiate(run["attack"]) if run["attack"] else None
    optimizer = instantiate(run["optimizer"])
    module = Classifier(network, data.spec.num_classes, optimizer, made_by, run["annealed"])
    epochs = weights.with_suffix(".epochs")
    point = ResumePoint(epochs)
    trainer: pl.Trainer = instantiate(run["trainer"], callbacks=[point], enable_checkpointing=True)
    trainer.fit(module, train_dataloaders=data.train_dataloader(), ckpt_path=stopped_at(epochs).checkpoint)
    seconds, device = point.seconds(), chosen_device(run["device"])
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
