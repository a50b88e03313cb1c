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
    """Return the named device, by default the GPU if there is one.

    Raises:
        ValueError: If torch knows no such device, or there is no GPU.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(
            f"device={name} is not known to torch: choose cpu, cuda, or null for the GPU if there is one."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch sees no GPU here. Choose device=cpu.")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, processor and device, on which the numbers depend."""
    versions = {name: installed(name) for name in PACKAGES}
    return {
        **versions,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
