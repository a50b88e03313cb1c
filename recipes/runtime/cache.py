"""Cache of long computations with ``joblib.Memory``; the key contains everything that a result depends on.

:func:`stamped` adds to the settings of a piece of work the versions of torch and fisher-reg, a digest of the source
that the work uses, and a digest of its data. :func:`kept` does the work, or reads the cached result if all of these
are the same.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import joblib
from hydra.utils import instantiate

from recipes.runtime.environment import installed

Settings = dict[str, Any]
Result = dict[str, Any]
Work = Callable[[Settings, Path], Result]
"""From settings and the cache folder to a result; a module-level function, so that other processes can import it."""

_ROOTS = {name: Path(__file__).parents[2] / name for name in ("fisher_reg", "recipes")}


def stamped(settings: Settings, work: Work) -> Settings:
    """Return the settings with everything else that the result of the work depends on.

    Args:
        settings: Plain values. Their ``data``, if there is one, has a method ``digest``.
        work: The function that will be called with them.
    """
    stamp: Settings = {
        "work": f"{work.__module__}.{work.__qualname__}",
        "source": source_digest(work.__module__, settings),
    }
    stamp |= {name: installed(name) for name in ("torch", "fisher-reg")}
    if "data" in settings:
        stamp["data"] = data_digest(json.dumps(settings["data"], sort_keys=True))
    return settings | {"stamp": stamp}


def kept(settings: Settings, work: Work, folder: Path) -> Result:
    """Return the result of the work, from ``folder`` if it is cached. Results are written atomically."""
    result: Result = _memory(folder)(_key(settings), settings, work, folder)
    return result


def is_kept(settings: Settings, work: Work, folder: Path) -> bool:
    """Whether the result is in ``folder``."""
    return bool(_memory(folder).check_call_in_cache(_key(settings), settings, work, folder))


def kept_file(settings: Settings, folder: Path, suffix: str) -> Path:
    """Return the path of a file that a work may store next to its result."""
    return folder / f"{joblib.hash(_key(settings))}{suffix}"


def source_digest(module: str, settings: Settings) -> str:
    """Return a digest of the modules of this project that a module imports, directly or not.

    Targets in the settings (each ``_target_``) count as imported. Other packages are represented by their versions.
    """
    return _digest(tuple(sorted({module, *_targets(settings)})))


@lru_cache
def _digest(names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(_closure(names)):
        digest.update(path.as_posix().encode() + b"\0" + (_ROOTS["recipes"].parent / path).read_bytes())
    return digest.hexdigest()


def _closure(names: tuple[str, ...]) -> set[Path]:
    """Return the files of the imported modules, relative to the folder of the packages."""
    todo, found = list(names), set()
    while todo:
        parts = todo.pop().split(".")
        for count in range(1, len(parts) + 1):  # importing a.b.c imports a and a.b first
            path = _file(tuple(parts[:count]))
            if path is not None and path not in found:
                found.add(path)
                todo += _imported(path)
    return {path.relative_to(_ROOTS["recipes"].parent) for path in found}


def _file(parts: tuple[str, ...]) -> Path | None:
    """Return the file of a module, or ``None`` for a name inside a module and for other packages."""
    if parts[0] not in _ROOTS:
        return None
    path = _ROOTS[parts[0]].joinpath(*parts[1:])
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@cache
def _imported(path: Path) -> list[str]:
    """Return all modules that a file imports; this project has no relative imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _targets(settings: Any) -> Iterator[str]:
    if isinstance(settings, dict):
        yield from (value for key, value in settings.items() if key == "_target_")
    if isinstance(settings, dict | list):
        for part in settings.values() if isinstance(settings, dict) else settings:
            yield from _targets(part)


@cache
def data_digest(data: str) -> str | None:
    """Return the digest of a data set from its settings as JSON."""
    digest: str | None = instantiate(json.loads(data)).digest()
    return digest


def _key(settings: Settings) -> str:
    """Return the settings as text, since joblib distinguishes a repeated object from two equal objects."""
    return json.dumps(settings, sort_keys=True)


def _memory(folder: Path) -> Any:
    return joblib.Memory(folder, verbose=0).cache(_done, ignore=["settings", "work", "folder"])


# joblib deletes the results of a function when its source changes: do not change this function.
def _done(key: str, settings: Settings, work: Work, folder: Path) -> Result:
    return work(settings, folder)
