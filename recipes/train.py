r"""Train a network with the Fisher callbacks: ``python -m recipes.train model=vit penalty=none``.

Writes to Hydra's run folder: TensorBoard events, ``curves/metrics.csv``, ``bound_versus_empirical.png``
with its numbers in a CSV file of the same name, the checkpoints, ``config.yaml`` (resolved) and ``summary.json`` (the
numbers of the final table, the settings and the provenance).

``tensorboard --logdir outputs`` shows all runs; the runs of sweeps have short names such as ``vgg_kl_seed0``. The page
HPARAMS has a row per finished run. By default only the main curves are logged; ``callbacks.monitor.detailed=true
penalty.detailed=true`` logs all of them.

``python -m recipes.train resume=FOLDER`` resumes a training that was stopped for any reason, with the same numbers as
without the stop. ``python -m recipes.evaluate run=FOLDER`` audits the network.

Sweeps use Hydra and its plugins (``pip install fisher-reg[sweeps]``). They also write into a folder of
``outputs/train``::

    python -m recipes.train -m seed=0,1,2 penalty=none,kl hydra/launcher=joblib hydra.launcher.n_jobs=2
    python -m recipes.train -m hydra/sweeper=optuna 'penalty.weight=tag(log, interval(0.01, 1))'
    python -m recipes.train -m seed=range(10) hydra/launcher=submitit_slurm hydra.launcher.partition=gpu \
        hydra.launcher.gpus_per_node=1 hydra.launcher.timeout_min=240 trainer=gpu

A sweeper minimises ``objective`` (:mod:`recipes.models.objectives`). A job that Slurm has requeued resumes from its
last checkpoint. For one training on several devices use Lightning: ``trainer.devices=4 trainer.strategy=ddp``.

Takes about a minute on two CPU cores, and 15 seconds with ``experiment=smoke``; ``trainer=gpu`` was not measured.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
from hydra.utils import instantiate
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

from fisher_reg import (
    FisherMonitor,
    FisherRegularizer,
    FisherSpectralNorm,
    bound_versus_empirical,
    fisher_bound,
    summarize,
)
from recipes.data.base import ImageData
from recipes.data.chosen import prepared_data
from recipes.models import board
from recipes.models.classifier import Classifier
from recipes.models.objectives import Objective
from recipes.models.progress import ProgressLines
from recipes.models.resuming import ResumePoint, Stopped, restore_log, stopped_at
from recipes.models.runs import check_unused, run_config
from recipes.reporting.files import DOTS_PER_INCH
from recipes.runtime.command import command, command_line, in_folder, overrides
from recipes.runtime.provenance import provenance

FINISHED = "finished"


@dataclass(frozen=True)
class Training:
    """The objects of one training."""

    data: ImageData
    module: Classifier
    trainer: pl.Trainer
    point: ResumePoint
    monitor: FisherMonitor | None
    regularizer: FisherRegularizer | None
    objective: Objective


@command("train", prepare=in_folder("resume"))
def main(config: DictConfig) -> float | None:
    """Hydra's entry point.

    Returns:
        The objective, for a sweeper; ``None`` in all processes of a training except the first.
    """
    return train(config).get("objective")


def train(config: DictConfig) -> dict[str, Any]:
    """Train, test and write the files, or resume a stopped training.

    Returns:
        The content of ``summary.json``.

    Raises:
        FileNotFoundError: If there is no training in the folder to resume.
        ValueError: If a training is resumed with other settings, or the folder already has another training.
    """
    if config.resume is None:
        folder = Path(config.output_dir)
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and (folder / "config.yaml").is_file():
            return _train(config, folder, stopped_at(folder / "checkpoints"))
        if getattr(rank_zero_only, "rank", 0) == 0:
            check_unused(folder)
        return _train(config, folder, Stopped())
    folder = Path(config.resume).absolute()  # so that the command printed at the end works from any folder
    config = resumed_config(folder)
    summary = folder / "summary.json"
    if summary.is_file() and (result := json.loads(summary.read_text()))["status"] == FINISHED:
        Console().print(f"This training is already finished: {folder}", soft_wrap=True)
        report(result, folder)
        return dict(result)
    return _train(config, folder, stopped_at(folder / "checkpoints"))


def resumed_config(folder: Path) -> DictConfig:
    """Return the configuration of a training that was stopped.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the command line has other settings.
    """
    config = run_config(folder)
    others = [text for text in overrides() if not text.startswith("resume=")]
    if others:
        raise ValueError(
            f"A training is resumed with its original settings ({folder / 'config.yaml'}), so that it gives the same "
            f"numbers; leave out {' '.join(others)}, or start another training."
        )
    return config


def _train(config: DictConfig, folder: Path, stopped: Stopped) -> dict[str, Any]:
    training = assembled(config, folder, stopped)
    module, data, trainer = training.module, training.data, training.trainer
    if trainer.is_global_zero:
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        board.begin(trainer.loggers, _hyperparameters(config, training), (folder / "config.yaml").read_text(), stopped)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=stopped.checkpoint)
        # a training that is resumed after its last epoch must draw the same random numbers as others
        pl.seed_everything(config.seed, workers=True, verbose=False)
        tested = trainer.test(module, datamodule=data, verbose=False)[0]
    except SystemExit:  # raised by Lightning after Ctrl-C
        if trainer.interrupted:
            interrupted(config, training, folder)
        raise
    if not trainer.is_global_zero:
        return {}
    return finished(config, training, folder, tested)


def assembled(config: DictConfig, folder: Path, stopped: Stopped) -> Training:
    """Read the data and build the network, the callbacks, the loggers, the trainer and the objective."""
    folder.mkdir(parents=True, exist_ok=True)
    data = prepared_data(config)
    module = Classifier(instantiate(config.model, spec=data.spec), data.spec.num_classes, instantiate(config.optimizer))
    callbacks = [instantiate(item) for item in config.callbacks.values()]
    monitor = next((callback for callback in callbacks if isinstance(callback, FisherMonitor)), None)
    regularizer: FisherRegularizer | None = instantiate(config.penalty) if config.penalty else None
    point = ResumePoint(folder / "checkpoints")
    callbacks += [point] if regularizer is None else [regularizer, point]
    loggers = [_logger(item, stopped) for item in config.logger.values()]
    shown: dict[str, bool] = {}
    if not Console().is_terminal and "enable_progress_bar" not in config.trainer:
        callbacks.append(ProgressLines())
        shown = {"enable_progress_bar": False}
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers or False, **shown)
    if trainer.is_global_zero:
        for logger in loggers:
            if isinstance(logger, CSVLogger):
                restore_log(logger, stopped.epoch)
    return Training(data, module, trainer, point, monitor, regularizer, instantiate(config.objective))


def _logger(config: DictConfig, stopped: Stopped) -> Any:
    """Build the logger; that of TensorBoard drops entries after the last checkpoint."""
    if stopped.step and config._target_.endswith("TensorBoardLogger"):
        return instantiate(config, purge_step=stopped.step)
    return instantiate(config)


def finished(config: DictConfig, training: Training, folder: Path, tested: Mapping[str, float]) -> dict[str, Any]:
    """Measure the network, write the files and print the table."""
    summary = _settings(config, training) | {"test_accuracy": tested["test/accuracy"]} | measure(training)
    monitor = training.monitor
    if monitor is not None and monitor.history:
        pd.DataFrame(monitor.history).to_csv(folder / "bound_versus_empirical.csv", index=False, float_format="%.6g")
        bound_versus_empirical(monitor.history).savefig(folder / "bound_versus_empirical.png", dpi=DOTS_PER_INCH)
        summary["monitor_seconds"] = sum(entry["fisher/seconds"] for entry in monitor.history)
    summary["total_seconds"] = training.point.seconds()
    summary["objective"] = training.objective(summary, training.module.network, training.data)
    summary |= {"status": FINISHED, "provenance": provenance(config)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    board.end(training.trainer.loggers, _hyperparameters(config, training), summary)
    report(summary, folder)
    return summary


def interrupted(config: DictConfig, training: Training, folder: Path) -> None:
    """Write the results so far and print the command to resume.

    Raises:
        SystemExit: With the status of a command ended by Ctrl-C.
    """
    if training.trainer.is_global_zero:
        num_epochs = stopped_at(folder / "checkpoints").epoch + 1
        status = {"status": f"interrupted after epoch {num_epochs}", "total_seconds": training.point.seconds()}
        summary = _settings(config, training) | status | {"provenance": provenance(config)}
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"Stopped after epoch {num_epochs}. Resume with: {command_line('train', resume=folder)}", file=sys.stderr)
    raise SystemExit(130)


def _settings(config: DictConfig, training: Training) -> dict[str, Any]:
    regularizer = training.regularizer
    return {
        "model": config.model._target_.rsplit(".", 1)[-1],
        "data": type(training.data).__name__,
        "penalty": "none" if regularizer is None else type(regularizer.penalty).__name__,
        "penalty_weight": 0.0 if regularizer is None else regularizer.weight,
        "seed": int(config.seed),
    }


def _hyperparameters(config: DictConfig, training: Training) -> dict[str, Any]:
    settings = _settings(config, training)
    return {"weight": settings.pop("penalty_weight")} | settings


def measure(training: Training) -> dict[str, float]:
    """Return the Fisher spectral norm over the test images, and its bound."""
    metric = FisherSpectralNorm(summarize, sync_on_compute=False)  # this process measures all images
    network = training.module.network
    for inputs, _ in training.data.test_dataloader():
        metric.update(network, inputs)
    values = {f"lambda_max_{name}": float(value) for name, value in metric.compute().items()}
    bound = fisher_bound(network, training.data.splits["test"][0][0][None]).log10_value
    return values | {"log10_bound": bound, "log10_gap": bound - math.log10(values["lambda_max_max"])}


def report(summary: dict[str, Any], folder: Path) -> None:
    """Print the final table, and the command that audits the network."""
    penalised = f"{summary['penalty']}, weight {summary['penalty_weight']:g}"
    table = Table(title=f"{summary['model']} on {summary['data']}, penalty: {penalised}")
    table.add_column("on the test images")
    table.add_column("value", justify="right")
    table.add_row("accuracy", f"{summary['test_accuracy']:.4f}")
    for name in ("mean", "median", "p95", "max"):
        table.add_row(f"largest Fisher eigenvalue, {name}", f"{summary[f'lambda_max_{name}']:.4g}")
    table.add_row("global upper bound", f"10^{summary['log10_bound']:.2f}")
    table.add_row("ratio of the bound to the max", f"10^{summary['log10_gap']:.2f}")
    if "monitor_seconds" in summary:
        table.add_row("seconds spent on the monitor", f"{summary['monitor_seconds']:.1f}")
    table.add_row("seconds in total", f"{summary['total_seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"Files: {folder}", soft_wrap=True)
    console.print(f"Audit: {command_line('evaluate', run=folder)}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
