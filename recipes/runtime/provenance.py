"""The provenance of a result: what is needed to reproduce it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.runtime.cache import data_digest
from recipes.runtime.environment import chosen_device, environment, installed
from recipes.runtime.settings import resolved


def provenance(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the data that are needed to reproduce a result, without folders of this machine.

    Args:
        config: Configuration of the recipe; its ``seed``, ``device``, and ``data`` or ``datasets`` are optional.

    Returns:
        ``command``, ``commit``, ``seed``, ``data`` and ``environment``.
    """
    seed = config.get("seed", config.get("seeds"))
    return {
        "command": _command(),
        "commit": commit(),
        "seed": OmegaConf.to_container(seed) if OmegaConf.is_config(seed) else seed,
        "data": _digests(config),
        "environment": environment(chosen_device(config.get("device"))),
    }


def commit() -> str:
    """Return the commit of the clone, with the suffix ``-dirty`` if files were changed; otherwise the version."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(describe, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return f"fisher-reg {installed('fisher-reg')}"


def _command() -> str:
    """Return the command as given, with absolute paths shortened to their last part."""
    return shlex.join(["python", *map(_without_folder, sys.orig_argv[1:])])


def _without_folder(word: str) -> str:
    """Return an argument, or the value of an override; an absolute path is shortened to its last part."""
    key, separator, value = word.partition("=") if "=" in word else ("", "", word)
    bare = value.strip("'\"")
    if Path(bare).is_absolute():
        return f"{key}{separator}{Path(bare).name}"
    return re.sub(r"(?<![\w.~-])~?/(?:[^/\s'\",=]+/)+", "", word)


def _digests(config: DictConfig | Mapping[str, Any]) -> Any:
    """Return the digest of the data, or of each of the data sets by its name."""
    plain = resolved(config) if isinstance(config, DictConfig) else config
    if plain.get("data"):
        return data_digest(json.dumps(plain["data"], sort_keys=True))
    return {name: data_digest(json.dumps(data, sort_keys=True)) for name, data in plain.get("datasets", {}).items()}
