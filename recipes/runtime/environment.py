"""What a result depends on besides its settings: command, commit, versions, processor, device, data."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

PACKAGES = ("torch", "torchvision", "fisher-reg", "curvlinops-for-pytorch", "plenoptic", "scipy")


def installed(distribution: str) -> str | None:
    """Return the version of an installed distribution, or ``None``."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def chosen_device(name: str | None) -> torch.device:
    """Return the named device, or the GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on: versions, processor, device."""
    versions = {name: installed(name) for name in PACKAGES}
    return {
        **versions,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def provenance(config: DictConfig | Mapping[str, Any], data: object = None) -> dict[str, Any]:
    """Return what it takes to make a result again, without folders of this machine.

    Args:
        config: Of the recipe; its ``seed`` and ``device`` are used, if it has them.
        data: The data; their ``digest()``, if they have that method.

    Returns:
        ``command``, ``commit``, ``seed``, ``data`` and ``environment``.
    """
    digest = getattr(data, "digest", None)
    seed = config.get("seed", config.get("seeds"))
    return {
        "command": _command(),
        "commit": commit(),
        "seed": OmegaConf.to_container(seed) if OmegaConf.is_config(seed) else seed,
        "data": digest() if callable(digest) else None,
        "environment": environment(chosen_device(config.get("device"))),
    }


def commit() -> str:
    """Return the commit of the clone, with ``-dirty`` after it if files were changed; otherwise the version."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(describe, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return f"fisher-reg {installed('fisher-reg')}"


def _command() -> str:
    """Return the command as it was given, with the last part alone of absolute paths."""
    words = [re.sub(r"(?<![\w.~-])~?/(?:[^/\s'\",=]+/)+", "", word) for word in sys.orig_argv[1:]]
    return shlex.join(["python", *words])
