"""Test whether singular vectors of the last epoch make a measurement cheaper: ``python -m recipes.warm_starts``.

A network is trained, and after each epoch the same validation images are measured by several variants of the solver:

- ``cold``: the default solver, whose guess is the contrast of the two most probable classes
- ``warm``: the same with the left singular vector of the previous epoch as its guess, made orthogonal to ``sqrt(p)``,
  which is not in the range of ``A``
- ``perfect``: the same with the left singular vector of the current network, the best possible warm start
- ``cold, 1 step`` and ``warm, 1 step``: stopped after one step, so that most intervals stay wide

``passes`` is the cost per image in forwards: one for the graph, one for each backward pass and for each difference
quotient, three for each exact forward-mode pass. ``error_p95`` and ``error_max`` are relative to the exact eigenvalue.

Writes ``warm_starts.csv`` (every epoch), ``warm_starts.md`` (means over the epochs from the second one on) and
``warm_starts.json`` (settings) to Hydra's run folder.

Takes about a minute on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fisher_reg import Categorical, Exact, InputFisher, Lanczos, evaluation_operator, fisher_spectral_norm
from recipes.data.chosen import prepared_data
from recipes.models.classifier import Classifier
from recipes.reporting.files import settings_of, show, write
from recipes.runtime.command import command
from recipes.runtime.counted import Counted, Passes
from recipes.runtime.environment import environment
from recipes.runtime.progress import track


@command("warm_starts")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    warm_starts(config)


def warm_starts(config: DictConfig) -> pd.DataFrame:
    """Measure while each network trains, write the files, and return the rows of ``warm_starts.csv``."""
    folder = Path(config.output_dir)
    rows = pd.DataFrame(
        [row for name in track([*config.networks], "warm starts") for row in _of_a_network(name, config)]
    )
    later = rows[rows.epoch > 0].groupby(["network", "search"], sort=False).mean(numeric_only=True)
    table = later.drop(columns="epoch").reset_index().to_string(index=False, float_format=lambda value: f"{value:.3g}")
    page = f"Means over the epochs from the second one on.\n\n```\n{table}\n```\n"
    result = {"environment": environment(torch.device("cpu")), "config": settings_of(config)}
    write(folder, "warm_starts", config, rows=rows, page=page, record=result)
    show(table, folder)
    return rows


def _of_a_network(name: str, config: DictConfig) -> list[dict[str, Any]]:
    data = prepared_data(config)
    network = instantiate(config.networks[name], spec=data.spec)
    module = Classifier(network, data.spec.num_classes, instantiate(config.optimizer))
    images = torch.cat([batch[0] for batch in data.val_dataloader()])[: config.num_images]
    searches = _Searches(name, images)
    trainer: pl.Trainer = instantiate(config.trainer, callbacks=[searches], num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    return searches.rows


class _Searches(pl.Callback):
    """Measures the same images after each epoch with each search."""

    def __init__(self, name: str, images: Tensor) -> None:
        self.name = name
        self.images = images
        self.last: Tensor | None = None
        self.rows: list[dict[str, Any]] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        exact = fisher_spectral_norm(pl_module, self.images, solver=Exact()).eigenvalue
        with evaluation_operator(pl_module, self.images, Categorical()) as fisher:
            for search, (starts, solver) in self._searches(fisher).items():
                passes = Passes()
                result = solver.solve(Counted(fisher, passes, starts))
                error = ((exact - result.eigenvalue) / exact).clamp_min(0)[exact > 0]
                self.rows.append(
                    {
                        "network": self.name,
                        "epoch": trainer.current_epoch,
                        "search": search,
                        "passes": passes.in_forwards,
                        "error_p95": float(error.quantile(0.95)),
                        "error_max": float(error.max()),
                        "error_of_mean": float(1 - result.eigenvalue.mean() / exact.mean()),
                        "wide_share": float((~result.converged).float().mean()),
                    }
                )
                if search == "cold":
                    found = result.left_singular_vector
        self.last = found

    def _searches(self, fisher: InputFisher) -> dict[str, tuple[Tensor, Lanczos]]:
        cold, one_step = fisher.starts(1), Lanczos(num_steps=1)
        searches = {"cold": (cold, Lanczos()), "cold, 1 step": (cold, one_step)}
        if self.last is not None:
            root = (0.5 * fisher.logits.detach().log_softmax(1)).exp()  # sqrt(p), which A' maps to zero
            warm = (self.last - root * (root * self.last).sum(1, keepdim=True))[:, None]
            perfect = Exact().solve(fisher).left_singular_vector[:, None]
            searches |= {"warm": (warm, Lanczos()), "warm, 1 step": (warm, one_step), "perfect": (perfect, Lanczos())}
        return searches


if __name__ == "__main__":
    main()
