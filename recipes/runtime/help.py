"""What ``--help`` prints: the docstring of the recipe, then Hydra's groups and the configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore

_FLAGS = {"-h", "--help"}
_TEMPLATE = """\
${hydra.help.header}

== Configuration groups (group=choice) ==

$APP_CONFIG_GROUPS

== Configuration (key=value) ==

$CONFIG
${hydra.help.footer}
"""
_FOOTER = "--cfg job prints the configuration and starts nothing; --hydra-help explains the other flags."


def with_help(task: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command line; if they ask for help, it is that of the task's module."""
    if not _FLAGS & set(arguments):
        return list(arguments)
    header = plain(inspect.getdoc(inspect.getmodule(task)) or "").replace("$", "$$")  # it becomes part of a template
    node = {"app_name": "recipes", "header": header, "footer": _FOOTER, "template": _TEMPLATE}
    ConfigStore.instance().store(group="hydra/help", name="recipe", node=node)
    return [*arguments, "hydra/help=recipe"]


def plain(docstring: str) -> str:
    """Return a docstring without the marks of reStructuredText.

    Example:
        >>> print(plain("See :mod:`recipes.train` and ``seed=1``::"))
        See recipes.train and seed=1:
    """
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", docstring)
    return re.sub(r"::$", ":", text.replace("``", ""), flags=re.MULTILINE)
