"""The stages of ``recipes.compare`` for one network, with cached results: training, attacks, metrics.

An interrupted stage is repeated; a training resumes from its last finished epoch, with the same numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from recipes.attacks import attack_all
from recipes.compare.training import loaded, train, weights_path
from recipes.competitors.measurement import measure
from recipes.data.chosen import chosen_examples
from recipes.runtime.cache import Result, Settings
from recipes.runtime.environment import chosen_device


def attack(settings: Settings, cache: Path) -> Result:
    """Attack a trained network."""
    network, images, labels = _prepared(settings, cache)
    found = {}
    for name, options in settings["attacks"].items():
        torch.manual_seed(settings["run"]["seed"])
        result = attack_all(instantiate(options), network, images, labels)
        parts = {"misclassified": result.misclassified, "distance": result.euclidean, "masked": result.masked}
        found[name] = {key: value.tolist() for key, value in parts.items()}
    return found


def take_metrics(settings: Settings, cache: Path) -> Result:
    """Measure a trained network."""
    network, images, labels = _prepared(settings, cache)
    torch.manual_seed(settings["run"]["seed"])
    return measure(network, images, labels, instantiate(settings["effort"])).lists()


STAGES = {"training": train, "attacks": attack, "metrics": take_metrics}


def _prepared(settings: Settings, cache: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the trained network and the test images, which are the same for every network of a data set."""
    run = settings["run"]
    data, device = loaded(run["data"]), chosen_device(run["device"])
    network = instantiate(run["network"], spec=data.spec)
    network.load_state_dict(torch.load(weights_path(run, cache), map_location="cpu", weights_only=True))
    generator = torch.Generator().manual_seed(0)
    images, labels = chosen_examples(data, settings["num_images"], generator, settings["noise"])
    return network.eval().to(device), images.to(device), labels.to(device)
