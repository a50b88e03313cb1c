"""Conversion between configurations and plain values, with narrower types than OmegaConf's own functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


def resolved(config: DictConfig, **changes: Any) -> dict[str, Any]:
    """Return a configuration as plain values, with each interpolation resolved.

    Args:
        config: A mapping.
        changes: Set before the interpolations are resolved.
    """
    plain = OmegaConf.to_container(OmegaConf.merge(config, changes) if changes else config, resolve=True)
    return cast("dict[str, Any]", plain)


def merged(*parts: DictConfig | Mapping[str, Any]) -> DictConfig:
    """Merge configurations or plain values into one configuration; later parts override earlier ones."""
    return cast("DictConfig", OmegaConf.merge(*parts))
