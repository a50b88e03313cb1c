"""Results of long computations, kept under a digest of what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.runtime.environment import installed


def cached(settings: dict[str, Any], folder: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``compute`` gives, from its file in ``folder`` if it is there; a file is whole or not there.

    The file is named by a digest of the settings and of the versions of torch and fisher-reg.
    """
    path = cache_path(settings, folder)
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_content(settings) | {"result": compute()}, indent=2) + "\n")
        os.replace(partial, path)
    return json.loads(path.read_text())["result"]


def cache_path(settings: dict[str, Any], folder: Path) -> Path:
    """Return the file that keeps the result of ``settings``."""
    digest = hashlib.sha256(json.dumps(_content(settings), sort_keys=True).encode()).hexdigest()[:20]
    return folder / f"{digest}.json"


def _content(settings: dict[str, Any]) -> dict[str, Any]:
    return {"settings": settings, **{name: installed(name) for name in ("torch", "fisher-reg")}}
