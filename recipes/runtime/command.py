"""The command line of a recipe: Hydra with the configurations of this project, from any working directory."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from recipes.runtime import arguments
from recipes.runtime.help import with_help
from recipes.runtime.mistakes import end, told

_PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (_PACKAGE.parent / "conf", _PACKAGE / "conf") if path.is_dir())
"""The folder of configurations: next to the package in a clone, inside it if installed from a wheel."""

_INTERRUPTED = 130  # conventional exit status after SIGINT: 128 + 2

Prepare = Callable[[Sequence[str]], list[str]]


def command(config_name: str, prepare: Prepare = list) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return ``hydra.main`` for one of the configurations in :data:`CONF`.

    Options are written without ``+``, and unknown names are errors (:mod:`recipes.runtime.arguments`). A mistake of the
    user ends the command with one line (:mod:`recipes.runtime.mistakes`). ``--help`` shows the docstring of the recipe
    (:mod:`recipes.runtime.help`).

    Args:
        config_name: Name of the YAML and of the module.
        prepare: Changes the arguments before anything else.
    """

    def decorate(task: Callable[..., Any]) -> Callable[..., Any]:
        start: Callable[..., Any] = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(
            told(task)
        )

        @functools.wraps(task)
        def main() -> None:
            try:
                sys.argv[1:] = arguments.completed(CONF, config_name, prepare(with_help(task, sys.argv[1:])))
            except (ValueError, FileNotFoundError) as error:
                if os.environ.get("HYDRA_FULL_ERROR"):
                    raise
                end(str(error))
            try:
                start()
            except KeyboardInterrupt as error:
                print(f"Interrupted. {error}".rstrip(), file=sys.stderr)
                raise SystemExit(_INTERRUPTED) from None

        return main

    return decorate


def composed(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose a configuration like the command line."""
    return arguments.composed(CONF, config_name, overrides)


def overrides() -> list[str]:
    """Return the overrides of this run's command line; none if a recipe is called from Python."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def in_folder(key: str) -> Prepare:
    """Return a change of arguments that makes the folder in ``key=FOLDER`` Hydra's run folder."""

    def prepare(texts: Sequence[str]) -> list[str]:
        given = [text for text in texts if text.startswith(f"{key}=") and text != f"{key}=null"]
        if not given:
            return list(texts)
        value = OverridesParser.create().parse_override(given[-1]).value()
        if not (Path(str(value)) / "config.yaml").is_file():
            raise FileNotFoundError(
                f"{key}={value}: there is no run, since there is no config.yaml in that folder. Pass the folder that "
                "the command printed last."
            )
        # Hydra's record of the first command is kept
        return [*texts, f"hydra.run.dir={given[-1].partition('=')[2]}", "hydra.output_subdir=null"]

    return prepare


def command_line(recipe: str, **settings: object) -> str:
    """Return a command that can be copied into a shell: quoted for Hydra and for the shell.

    Example:
        >>> print(command_line("evaluate", run="runs/model=vgg,seed=1"))
        python -m recipes.evaluate 'run="runs/model=vgg,seed=1"'
    """
    words = [f"{key}={_quoted(str(value))}" for key, value in settings.items()]
    return shlex.join(["python", "-m", f"recipes.{recipe}", *words])


def _quoted(value: str) -> str:
    """Return a value, quoted for Hydra's grammar if necessary."""
    if re.fullmatch(r"[\w./-]+", value):
        return value
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
    return f'"{escaped}"'
