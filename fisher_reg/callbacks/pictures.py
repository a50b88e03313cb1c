"""Send figures and histograms to the loggers that take them, by the calls of their own clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from torch import Tensor

from fisher_reg.callbacks.measuring import NUM_PICTURES, Values
from fisher_reg.figures import bound_versus_empirical, sensitive_examples

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def takes_pictures(logger: Any) -> bool:
    """Whether a logger is one of those that are known to take figures."""
    return _kind(logger) is not None


def send_numbers(trainer: pl.Trainer, logged: Mapping[str, float]) -> None:
    """Send numbers to all loggers now, at the step at which Lightning would log them."""
    step = trainer.global_step // max(1, len(trainer.optimizers)) - 1  # Lightning's counts from 0, once per batch
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": trainer.current_epoch, **logged}, step=max(step, 0))


def draw(logger: Any, values: Values, history: Sequence[Mapping[str, Any]], prefix: str, step: int) -> None:
    """Send what a measurement shows to a logger; figures only where matplotlib is installed.

    Args:
        logger: One that :func:`takes_pictures`.
        values: Of the measurement.
        history: Of all measurements.
        prefix: First part of all keys.
        step: Of the loggers, at which Lightning sends the scalars of the measurement.
    """
    decades = values.column("eigenvalue").log10()
    decades = decades[decades.isfinite()]
    if decades.numel():
        send_histogram(logger, f"{prefix}/log10_lambda_max", decades, step)
    keys = dict.fromkeys(key for entry in history for key in entry)  # bounds are not in each
    curves = [key for key in keys if "log10_bound" in key or "log10_lambda_max_max" in key]
    charts = {"bound versus empirical (log10)": curves, "gap (log10)": [key for key in keys if "log10_gap" in key]}
    send_charts(logger, prefix, {title: chosen for title, chosen in charts.items() if chosen})
    if find_spec("matplotlib") is None:
        return
    if values.seconds:  # where bounds were measured
        send_figure(logger, f"{prefix}/bound_versus_empirical", bound_versus_empirical(history, prefix=prefix), step)
    if pictures := values.pictures[:NUM_PICTURES]:
        eigenvalues, _, images, vectors = zip(*pictures, strict=True)
        send_figure(logger, f"{prefix}/sensitive_examples", sensitive_examples(images, vectors, eigenvalues), step)


def send_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Send a figure under ``name`` at a step of the logger."""
    kind = _kind(logger)
    if kind == "TensorBoardLogger":
        logger.experiment.add_figure(name, figure, step)
    elif kind == "WandbLogger":
        logger.log_image(name, [figure], step=step)  # without it W&B draws it at the step before
    elif kind == "MLFlowLogger":
        logger.experiment.log_figure(logger.run_id, figure, f"{name}/step_{step:08d}.png")
    elif kind == "CometLogger":
        logger.experiment.log_figure(figure_name=name, figure=figure, step=step)


def send_histogram(logger: Any, name: str, values: Tensor, step: int) -> None:
    """Send a histogram of values ``(N,)`` where the logger draws them."""
    kind = _kind(logger)
    if kind == "TensorBoardLogger":
        logger.experiment.add_histogram(name, values, step)
    elif kind == "WandbLogger":
        import wandb

        logger.log_metrics({name: wandb.Histogram(values.cpu().tolist())}, step=step)
    elif kind == "CometLogger":
        logger.experiment.log_histogram_3d(values.cpu().tolist(), name=name, step=step)


def send_charts(logger: Any, category: str, charts: Mapping[str, Sequence[str]]) -> None:
    """Arrange curves in charts: titles to keys of logged scalars (TensorBoard; others do it in their page)."""
    if _kind(logger) == "TensorBoardLogger":
        layout = {title: ["Multiline", list(keys)] for title, keys in charts.items()}
        logger.experiment.add_custom_scalars({category: layout})


def _kind(logger: Any) -> str | None:
    """Return the name of the logger class, in whichever namespace of Lightning it lives."""
    names = [base.__name__ for base in type(logger).__mro__]
    return next((name for name in _KINDS if name in names), None)


_KINDS = ("TensorBoardLogger", "WandbLogger", "MLFlowLogger", "CometLogger")
