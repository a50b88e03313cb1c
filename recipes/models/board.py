"""What TensorBoard shows of a training besides its curves: the configuration, and a row of the page HPARAMS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger

from recipes.models.resuming import Stopped


def begin(loggers: Iterable[Logger], settings: Mapping[str, Any], config: str, stopped: Stopped) -> None:
    """Write the resolved configuration as a text card, once per training.

    Args:
        loggers: Of the trainer; others than TensorBoard's are left alone.
        settings: The hyperparameters of the run.
        config: The configuration as YAML.
        stopped: Where the training goes on.
    """
    for logger in _boards(loggers):
        logger.log_hyperparams(dict(settings))  # into hparams.yaml; without final numbers HPARAMS has no row
        if not stopped.step:
            logger.experiment.add_text("configuration", f"```yaml\n{config}```", 0)


def end(loggers: Iterable[Logger], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Write the row of HPARAMS, with the numbers on the test images in its columns ``summary/…``.

    Args:
        loggers: As in :func:`begin`.
        settings: The hyperparameters of the run.
        summary: With ``test_accuracy``, ``lambda_max_mean`` and ``log10_bound``.
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
