"""The command line of a recipe: Hydra, with the configurations of this project from wherever it was started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra

_PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (_PACKAGE.parent / "conf", _PACKAGE / "conf") if path.is_dir())
"""The folder of configurations: beside the package in a clone, inside it where it was installed from a wheel."""


def command(config_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return ``hydra.main`` for one of the configurations in :data:`CONF`."""
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = hydra.main(
        version_base="1.3", config_path=str(CONF), config_name=config_name
    )
    return decorator
