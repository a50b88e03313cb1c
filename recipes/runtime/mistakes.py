"""A user's mistakes end with one line and no traceback."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from pytorch_lightning.utilities.exceptions import MisconfigurationException

_OURS = ("recipes", "fisher_reg")
_TOLD = (ValueError, FileNotFoundError, ModuleNotFoundError, MisconfigurationException)


def message(error: BaseException) -> str | None:
    """Return what to tell a user, if this is for him: what the code of this project refuses, or Hydra cannot build.

    The same types of errors from elsewhere are unexpected.
    """
    if isinstance(error, InstantiationException):
        cause = error.__cause__
        if cause is None:
            return _line(str(error))
        place = str(error).rsplit("full_key: ", 1)[-1] if "full_key: " in str(error) else ""
        if message(cause) is not None:
            return _line(str(cause))
        # An argument that the target does not take fails at Hydra's call, with no frame of the target's.
        return _line(f"{place}: {cause}" if place else str(cause)) if _module(cause).startswith("hydra.") else None
    if isinstance(error, _TOLD) and _module(error).split(".")[0] in _OURS:
        return _line(str(error))
    return None


def told(task: Callable[..., Any]) -> Callable[..., Any]:
    """Let a user's mistake in a task end it with its message alone; ``HYDRA_FULL_ERROR=1`` shows the traceback."""

    @functools.wraps(task)
    def run(config: Any) -> Any:
        try:
            return task(config)
        except Exception as error:
            text = message(error)
            if text is None or os.environ.get("HYDRA_FULL_ERROR"):
                raise
            if HydraConfig.get().mode is RunMode.MULTIRUN:  # a sweeper may go on with the other jobs
                raise CompactHydraException(text) from None
            end(text)

    return run


def end(text: str) -> None:
    """Print a line and end.

    Raises:
        SystemExit: With status 1.
    """
    print(text, file=sys.stderr)
    raise SystemExit(1)


def _module(error: BaseException) -> str:
    """Return the module whose code raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__spec__") and frames[-1].f_globals["__spec__"].name) if frames else ""


def _line(text: str) -> str:
    return " ".join(text.split())
