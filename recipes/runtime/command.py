"""The command line of a recipe: Hydra, with the configurations of this project from wherever it was started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import hydra

_PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (_PACKAGE.parent / "conf", _PACKAGE / "conf") if path.is_dir())
"""The folder of configurations: beside the package in a clone, inside it where it was installed from a wheel."""

_INTERRUPTED = 130  # what shells expect of a command that SIGINT ended: 128 + 2


def command(config_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return ``hydra.main`` for one of the configurations in :data:`CONF`; an interrupt ends it with one line."""
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = hydra.main(
        version_base="1.3", config_path=str(CONF), config_name=config_name
    )

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        run = decorator(function)

        @wraps(function)
        def interruptible(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except KeyboardInterrupt as error:
                print(f"Interrupted. {error}".rstrip(), file=sys.stderr)
                raise SystemExit(_INTERRUPTED) from None

        return interruptible

    return decorated
