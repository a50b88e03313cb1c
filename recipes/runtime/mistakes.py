"""Errors caused by the user end a command with one line and no traceback."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    CompactHydraException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import MissingMandatoryValue

from recipes.runtime.noise import quiet

_OURS = ("recipes", "fisher_reg")
_OF_ARGUMENTS = (TypeError, ValueError, MisconfigurationException)
_TOLD = (ValueError, FileNotFoundError, ModuleNotFoundError, MisconfigurationException)


def message(error: BaseException) -> str | None:
    """Return the message for the user if the error is a mistake of the user: raised by this project or by Hydra.

    The same types of errors from other code are unexpected, and the result is None.
    """
    owner = _module(error).split(".")[0]
    if isinstance(error, InstantiationException):
        return _line(str(error)) if error.__cause__ is None else _of_construction(str(error), error.__cause__)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: give {error.full_key}=…"
    if isinstance(error, _TOLD) and owner in _OURS:
        return _line(str(error))
    return None


def _of_construction(text: str, cause: BaseException) -> str | None:
    """Return the message for an object that could not be built, also for unknown arguments."""
    if message(cause) is not None or not isinstance(cause, _OF_ARGUMENTS):
        return message(cause)
    place = re.search(r"full_key: (\S+)", text)
    return _line(f"{place[1]}: {cause}" if place else str(cause))


@contextmanager
def told_in_a_line() -> Generator[None, None, None]:
    """Turn what Hydra refuses into a ``ValueError`` of one line."""
    try:
        yield
    except HydraException as error:
        raise ValueError(_of_hydra(error)) from error


def _of_hydra(error: HydraException) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        choices = (
            f"Choose one of {', '.join(error.options)}." if error.options else "--help lists those that there are."
        )
        return f"There is no {group}={name}. {choices}"
    if isinstance(error, OverrideParseException):
        reason = re.sub(r"See https://\S+ for details|Error parsing override '.*'", "", str(error))
        return _line(f"{error.override} cannot be read: {reason}. Write key=value or group=choice.")
    key = re.search(r"Could not override '(hydra\.[^']+)'", str(error))
    if key:
        return f"{key[1]} cannot be set: Hydra has no such setting. --cfg hydra prints those that there are."
    return _line(str(error) if error.__cause__ is None else f"{error} {error.__cause__}")


def told(task: Callable[..., Any]) -> Callable[..., Any]:
    """End a task with only the message after a mistake of the user; ``HYDRA_FULL_ERROR=1`` shows the traceback.

    Other packages are silenced (:mod:`recipes.runtime.noise`).

    Returns:
        The task, guarded.
    """

    @functools.wraps(task)
    def run(config: Any) -> Any:
        quiet()
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


def end(text: str, status: int = 1) -> NoReturn:
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
