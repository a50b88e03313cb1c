"""Configurations as plain values, and back: OmegaConf's own functions return lists and text, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


def resolved(config: DictConfig, **changes: Any) -> dict[str, Any]:
    """Return a configuration as plain values, with each interpolation resolved.

    Args:
        config: A mapping.
        changes: Set before, so that what refers to them follows.
    """
    plain = OmegaConf.to_container(OmegaConf.merge(config, changes) if changes else config, resolve=True)
    return cast("dict[str, Any]", plain)


def merged(*parts: DictConfig | Mapping[str, Any]) -> DictConfig:
    """Return one configuration, in which later parts change earlier ones; plain values are welcome."""
    return cast("DictConfig", OmegaConf.merge(*parts))
