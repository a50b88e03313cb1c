"""The environment of a result: versions, processor, device."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

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
    """Return the versions, processor and device that the numbers depend on."""
    versions = {name: installed(name) for name in PACKAGES}
    return {
        **versions,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
