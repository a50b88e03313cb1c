"""Train a network with the Fisher callbacks: ``python -m recipes.train model=vit penalty=none``.

Leaves in Hydra's run folder: TensorBoard events, ``metrics.csv`` (the curves), ``bound_versus_empirical.png``, the
checkpoint, ``config.yaml`` (resolved) and ``summary.json`` (the numbers of the final table).
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from fisher_reg import FisherMonitor, FisherRegularizer, FisherSpectralNorm, bound_versus_empirical, fisher_bound
from fisher_reg.metrics import summarize
from recipes.data.base import ImageData
from recipes.models.classifier import Classifier
from recipes.runtime.command import command


@command("train")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    train(config)


def train(config: DictConfig) -> dict[str, Any]:
    """Train, test and write the files; return what ``summary.json`` holds."""
    begin = time.perf_counter()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    pl.seed_everything(config.seed, workers=True, verbose=False)

    data: ImageData = instantiate(config.data)
    data.prepare_data()
    data.setup()
    network = instantiate(config.model, spec=data.spec)
    module = Classifier(network, data.spec.num_classes, instantiate(config.optimizer))
    callbacks = [instantiate(item) for item in config.callbacks.values()]
    regularizer: FisherRegularizer | None = instantiate(config.penalty) if config.penalty else None
    if regularizer is not None:
        callbacks.append(regularizer)
    loggers = [instantiate(item) for item in config.logger.values()]
    trainer: pl.Trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers or False)

    trainer.fit(module, datamodule=data)
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    summary = {
        "model": config.model._target_.rsplit(".", 1)[-1],
        "data": type(data).__name__,
        "penalty": "none" if regularizer is None else type(regularizer.penalty).__name__,
        "penalty_weight": 0.0 if regularizer is None else regularizer.weight,
        "seed": int(config.seed),
        "test_accuracy": tested["test/accuracy"],
        **measure(network, data),
    }
    monitor = next((callback for callback in callbacks if isinstance(callback, FisherMonitor)), None)
    if monitor is not None and monitor.history:
        bound_versus_empirical(monitor.history).savefig(folder / "bound_versus_empirical.png", dpi=120)
        summary["monitor_seconds"] = sum(entry["fisher/seconds"] for entry in monitor.history)
    summary["total_seconds"] = time.perf_counter() - begin
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report(summary, folder)
    return summary


def measure(network: nn.Module, data: ImageData) -> dict[str, float]:
    """Return the Fisher spectral norm over the test images, and the bound above it."""
    metric = FisherSpectralNorm(summarize)
    inputs = None
    for inputs, _ in data.test_dataloader():
        metric.update(network, inputs)
    values = {f"lambda_max_{name}": float(value) for name, value in metric.compute().items()}
    bound = fisher_bound(network, inputs).log10_value
    return values | {"log10_bound": bound, "log10_gap": bound - math.log10(values["lambda_max_max"])}


def report(summary: dict[str, Any], folder: Path) -> None:
    """Print the final table."""
    penalised = f"{summary['penalty']}, weight {summary['penalty_weight']:g}"
    table = Table(title=f"{summary['model']} on {summary['data']}, penalty: {penalised}")
    table.add_column("on the test images")
    table.add_column("value", justify="right")
    table.add_row("accuracy", f"{summary['test_accuracy']:.4f}")
    for name in ("mean", "median", "p95", "max"):
        table.add_row(f"largest Fisher eigenvalue, {name}", f"{summary[f'lambda_max_{name}']:.4g}")
    table.add_row("global upper bound", f"10^{summary['log10_bound']:.2f}")
    table.add_row("gap: bound over the max, in decades", f"{summary['log10_gap']:.2f}")
    if "monitor_seconds" in summary:
        table.add_row("seconds spent on the monitor", f"{summary['monitor_seconds']:.1f}")
    table.add_row("seconds in all", f"{summary['total_seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"Files: {folder}", soft_wrap=True)


if __name__ == "__main__":
    main()
