"""Conversion of configurations to plain values and back; OmegaConf's functions may also return lists and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


def resolved(config: DictConfig, **changes: Any) -> dict[str, Any]:
    """Return a configuration as plain values, with each interpolation resolved.

    Args:
        config: A mapping.
        changes: Set before resolving, so that interpolations use them.
    """
    plain = OmegaConf.to_container(OmegaConf.merge(config, changes) if changes else config, resolve=True)
    return cast("dict[str, Any]", plain)


def merged(*parts: DictConfig | Mapping[str, Any]) -> DictConfig:
    """Return one configuration in which later parts override earlier ones; parts may be plain values."""
    return cast("DictConfig", OmegaConf.merge(*parts))
