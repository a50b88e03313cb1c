"""Which network was audited, on which images, by whom and by which command: what makes an audit one of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from recipes.runtime.provenance import provenance

SCHEMA = "fisher-reg/audit/1"
"""Name and version of the layout of ``audit.json``, which ``audit.schema.json`` describes."""
_PEOPLE = ("author", "reviewer")


@dataclass(frozen=True)
class Identity:
    """What a reviewer compares before the numbers.

    Attributes:
        date: Of the measurement, ISO 8601, UTC.
        author: Who answers for the audit; nobody yet if there is none.
        reviewer: Who has checked it.
        weights_sha256: Of the network as it was audited, see :func:`digest_of_tensors`.
        checkpoint_sha256: Of the file of the weights, if there was one.
        images_sha256: Of the images and labels as they were measured, noise included.
        image_indices: Where in the test split the images are.
        provenance: See :func:`recipes.runtime.provenance.provenance`.
    """

    date: str
    author: str | None
    reviewer: str | None
    weights_sha256: str
    checkpoint_sha256: str | None
    images_sha256: str
    image_indices: tuple[int, ...]
    provenance: Mapping[str, Any]


def identity(
    config: DictConfig, network: nn.Module, images: Tensor, labels: Tensor, indices: Sequence[int]
) -> Identity:
    """Identify an audit of a network on images ``(B, C, H, W)`` with labels ``(B,)``."""
    return Identity(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        author=config.author,
        reviewer=config.reviewer,
        weights_sha256=digest_of_tensors(network.state_dict()),
        checkpoint_sha256=None if config.checkpoint is None else digest_of_file(Path(config.checkpoint)),
        images_sha256=digest_of_tensors({"images": images, "labels": labels}),
        image_indices=tuple(indices),
        provenance=provenance(config),
    )


def check_people(config: DictConfig) -> None:
    """Refuse an author or a reviewer who is no name.

    Raises:
        ValueError: If one is given that is not text, or is empty.
    """
    for role in _PEOPLE:
        name = config[role]
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise ValueError(f"{role} must be a name, or null for a blank line to sign on; got {name!r}.")


def digest_of_tensors(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 of named tensors, which does not depend on device, order, strides or the format of a file.

    For each name in sorted order the digest takes: the name, the dtype (``torch.float32``) and the shape
    (``(10, 64)``) as UTF-8 with a zero byte after each, then the values as bytes in row-major order. What is no tensor
    counts by its ``repr``.

    Example:
        >>> one = digest_of_tensors({"a": torch.ones(2), "b": torch.zeros(1)})
        >>> one == digest_of_tensors({"b": torch.zeros(1), "a": torch.ones(2)})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        if not isinstance(value, Tensor):
            digest.update(f"{name}\0{value!r}\0".encode())
            continue
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
