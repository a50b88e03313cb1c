"""Errors caused by the user end a command with one line and no traceback."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from lightning_fabric.utilities.exceptions import MisconfigurationException

_OURS = ("recipes", "fisher_reg")
_TOLD = (ValueError, FileNotFoundError, ModuleNotFoundError, MisconfigurationException)


def message(error: BaseException) -> str | None:
    """Return the message for the user if the error is a mistake of the user: raised by this project or by Hydra.

    The same types of errors from other code are unexpected, and the result is None.
    """
    owner = _module(error).split(".")[0]
    if isinstance(error, InstantiationException):
        return _line(str(error)) if error.__cause__ is None else _of_construction(str(error), error.__cause__)
    if isinstance(error, _TOLD) and owner in _OURS:
        return _line(str(error))
    return None


def _of_construction(text: str, cause: BaseException) -> str | None:
    """Return the message for an object that could not be built, also for unknown arguments."""
    owner = _module(cause).split(".")[0]
    is_argument = isinstance(cause, TypeError) and owner in (*_OURS, "hydra")  # raised by a call from these packages
    if not (is_argument or isinstance(cause, MisconfigurationException)):
        return message(cause)
    place = re.search(r"full_key: (\S+)", text)
    return _line(f"{place[1]}: {cause}" if place else str(cause))


def told(task: Callable[..., Any]) -> Callable[..., Any]:
    """End a task with only the message after a mistake of the user; ``HYDRA_FULL_ERROR=1`` shows the traceback."""

    @functools.wraps(task)
    def run(config: Any) -> Any:
        try:
            return task(config)
        except Exception as error:
            text = message(error)
            if text is None or os.environ.get("HYDRA_FULL_ERROR"):
                raise
            if HydraConfig.get().mode is RunMode.MULTIRUN:  # a sweeper may continue with the other jobs
                raise CompactHydraException(text) from None
            end(text)

    return run


def end(text: str, status: int = 1) -> None:
    """Print a line and exit.

    Raises:
        SystemExit: With the status.
    """
    print(text, file=sys.stderr)
    raise SystemExit(status)


def end_unless_swept(text: str, status: int) -> None:
    """Print a line and end with a status that tells of a result; in a sweep print alone, so that other jobs go on."""
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        print(text, file=sys.stderr)
    else:
        end(text, status)


def _module(error: BaseException) -> str:
    """Return the module whose code raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    spec = frames[-1].f_globals.get("__spec__") if frames else None  # a recipe's __name__ is "__main__"
    return "" if spec is None else str(spec.name)


def _line(text: str) -> str:
    return " ".join(text.split())
