"""What TensorBoard shows of a training in addition to curves: the configuration, and a row of the page HPARAMS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger

from recipes.models.resuming import Stopped


def begin(loggers: Iterable[Logger], settings: Mapping[str, Any], config: str, stopped: Stopped) -> None:
    """Write the resolved configuration as a text card, once per training.

    Args:
        loggers: The loggers of the trainer; only those of TensorBoard are used.
        settings: The hyperparameters of the run.
        config: The configuration as YAML.
        stopped: The point from which the training continues.
    """
    for logger in _boards(loggers):
        logger.log_hyperparams(dict(settings))  # written to hparams.yaml; without final numbers HPARAMS has no row
        if not stopped.step:
            logger.experiment.add_text("configuration", f"```yaml\n{config}```", 0)


def end(loggers: Iterable[Logger], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Write the row of HPARAMS, with the numbers on the test images in its columns ``summary/…``.

    Args:
        loggers: As in :func:`begin`.
        settings: The hyperparameters of the run.
        summary: Contains ``test_accuracy``, ``lambda_max_mean`` and ``log10_bound``.
    """
    mean = float(summary["lambda_max_mean"])
    numbers = {
        "summary/accuracy": summary["test_accuracy"],
        "summary/log10_lambda": math.log10(mean) if mean > 0 else -math.inf,
        "summary/log10_bound": summary["log10_bound"],
    }
    for logger in _boards(loggers):
        logger.log_hyperparams(dict(settings), numbers)
        logger.save()


def _boards(loggers: Iterable[Logger]) -> list[TensorBoardLogger]:
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]
