"""Measure the cost of a penalised training step relative to a plain step: ``python -m recipes.penalty_cost``.

Every network is trained for a few steps with each method in turn, round after round, so that all methods run under the
same conditions. A step is timed from the start of its batch to its end, with backward pass and optimiser. The ratio is
that of the median times. For a method that penalises only some steps, it uses the mean over a cycle of the median at
each position. The first cycle of each round, which tests whether the forward can be reused, is left out.
``memory_ratio`` is the ratio of the peaks of allocated memory in one step.

Writes ``penalty_cost.csv``, ``penalty_cost.md`` and ``penalty_cost.json`` (versions, settings) to Hydra's run folder.

Takes about 25 minutes on two CPU cores; a GPU was not measured.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import pandas as pd
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from recipes.data.chosen import prepared_data
from recipes.models.classifier import Classifier
from recipes.reporting.files import settings_of, show, write
from recipes.reporting.tables import markdown_table
from recipes.runtime.command import command
from recipes.runtime.environment import environment
from recipes.runtime.progress import Progress
from recipes.runtime.timing import peak_memory

PLAIN = "none"


class StepTimer(pl.Callback):
    """Seconds of each training step; must be the first callback."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Record the start time."""
        _synchronize(pl_module)
        self.begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        """Record the duration of the step."""
        _synchronize(pl_module)
        self.seconds.append(time.perf_counter() - self.begin)


@command("penalty_cost")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    penalty_cost(config)


def penalty_cost(config: DictConfig) -> pd.DataFrame:
    """Measure every method on every network, and write the files.

    Returns:
        One row per network and method.
    """
    folder = Path(config.output_dir)
    rows: list[dict[str, Any]] = []
    with Progress("penalty cost", len(config.networks) * len(config.methods) * config.num_rounds) as progress:
        for name, network in config.networks.items():
            rows += [{"network": name, **row} for row in measure(config, network, partial(progress.advance, name))]
    frame = pd.DataFrame(rows)
    result = {"environment": environment(device_of(config)), "config": settings_of(config)}
    write(folder, "penalty_cost", config, rows=frame, page=markdown(frame), record=result)
    show(markdown(frame), folder)
    return frame


def measure(config: DictConfig, network: DictConfig, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Return the ratios of all methods on a network."""
    data = prepared_data(config)
    batch = next(iter(data.train_dataloader()))
    built = instantiate(network, spec=data.spec)
    seconds = step_seconds(config, data.spec.num_classes, built, batch, config.num_rounds, advance=advance)
    times = {name: mean_of_medians(rounds, config.methods[name].cycle) for name, rounds in seconds.items()}
    memory = {
        name: peak_memory(
            partial(fit, config, data.spec.num_classes, built, method.callback, batch, 1, []), device_of(config)
        )
        for name, method in config.methods.items()
    }
    return [
        {
            "method": name,
            "seconds": times[name],
            "ratio": times[name] / times[PLAIN],
            "memory_ratio": memory[name] / memory[PLAIN],
        }
        for name in config.methods
    ]


def step_seconds(
    config: DictConfig,
    num_classes: int,
    network: nn.Module,
    batch: list[Tensor],
    num_rounds: int,
    *,
    max_seconds: float = math.inf,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[list[float]]]:
    """Return the seconds of training steps by method and round; the methods alternate.

    Args:
        config: Its ``methods`` and ``num_cycles``; a round starts with one more cycle, as warm-up.
        num_classes: Number of classes of the data.
        network: Copied for each training.
        batch: Images and labels of every step.
        num_rounds: Number of rounds of each method.
        max_seconds: After this time no further round starts, except the first of each method.
        advance: Called after each training.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in config.methods}
    begin = time.perf_counter()
    for number in range(num_rounds):
        for name, method in config.methods.items():
            if number == 0 or time.perf_counter() - begin <= max_seconds:
                timer, num_steps = StepTimer(), method.cycle * (1 + config.num_cycles)
                fit(config, num_classes, network, method.callback, batch, num_steps, [timer])
                seconds[name].append(timer.seconds[method.cycle :])
            advance()
    return seconds


def mean_of_medians(rounds: list[list[float]], cycle: int) -> float:
    """Return the mean over the positions of a cycle of the median time at each position."""
    places = [[second for one in rounds for second in one[place::cycle]] for place in range(cycle)]
    return sum(median(place) for place in places) / cycle


def device_of(config: DictConfig) -> torch.device:
    """Return the device of the Trainer."""
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    return torch.device("cuda" if on_gpu else "cpu")


def fit(
    config: DictConfig,
    num_classes: int,
    network: nn.Module,
    method: DictConfig | None,
    batch: list[Tensor],
    num_steps: int,
    callbacks: list[pl.Callback],
) -> None:
    """Train a copy of a network for some steps on one batch."""
    module = Classifier(copy.deepcopy(network), num_classes, instantiate(config.optimizer))
    own = [] if method is None else [instantiate(method)]
    trainer: pl.Trainer = instantiate(config.trainer, callbacks=[*callbacks, *own], max_epochs=1)
    batches = cast("Dataset[list[Tensor]]", [[part.clone() for part in batch] for _ in range(num_steps)])
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))


def markdown(frame: pd.DataFrame) -> str:
    """Return a table: a row per method, ratio and memory per network."""
    networks = list(frame.network.unique())
    cells = frame.ratio.map("{:.2f} (".format) + frame.memory_ratio.map("{:.2f})".format)
    table = frame.assign(cells=cells).pivot(index="method", columns="network", values="cells")
    table = table.loc[frame.method.unique(), networks].rename_axis("steps of plain training (memory)")
    return markdown_table(table.reset_index()) + "\n"


def _synchronize(module: pl.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


if __name__ == "__main__":
    main()
