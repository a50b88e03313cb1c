"""Convert results to JSON without paths of a machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

_PATHS = {"checkpoint", "data_dir", "output_dir", "path", "root"}


def plain(value: Any) -> Any:
    """Return a value that JSON can represent: tensors become lists, NaN ``None``, and infinity a string."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def without_folders(value: Any, key: str = "") -> Any:
    """Return settings with file names instead of paths, because folders differ between machines."""
    if isinstance(value, dict):
        return {name: without_folders(part, str(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part, key) for part in value]
    if isinstance(value, str) and (key in _PATHS or Path(value).is_absolute()):
        return Path(value).name
    return value
