"""Send figures and histograms to the loggers that take them, by the calls of their own clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def takes_pictures(logger: Any) -> bool:
    """Whether a logger is one of those that are known to take figures."""
    return _kind(logger) is not None


def send_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Send a figure under ``name`` at an optimiser step."""
    kind = _kind(logger)
    if kind == "TensorBoardLogger":
        logger.experiment.add_figure(name, figure, step)
    elif kind == "WandbLogger":
        logger.log_image(name, [figure])
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

        logger.log_metrics({name: wandb.Histogram(values.tolist())})
    elif kind == "CometLogger":
        logger.experiment.log_histogram_3d(values.tolist(), name=name, step=step)


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
