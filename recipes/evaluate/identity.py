"""The identity of an audit: which network, on which images, by whom and by which command."""

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
"""Name and version of the layout of ``audit.json``; see ``audit.schema.json``."""
_PEOPLE = ("author", "reviewer")


@dataclass(frozen=True)
class Identity:
    """What a reviewer checks before the numbers.

    Attributes:
        date: The date of the measurement, ISO 8601, UTC.
        author: The person who is responsible for the audit; ``None`` if there is none yet.
        reviewer: The person who has checked the audit; ``None`` if there is none yet.
        weights_sha256: The digest of the audited weights, see :func:`digest_of_tensors`.
        checkpoint_sha256: The digest of the file of the weights, if there was a file.
        images_sha256: The digest of the images and labels as measured, with noise.
        image_indices: The indices of the images in the test split.
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
    """Check the names of author and reviewer.

    Raises:
        ValueError: If a name is given that is not a text, or is empty.
    """
    for role in _PEOPLE:
        name = config[role]
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise ValueError(f"{role} must be a name, or null for a blank line to sign on; got {name!r}.")


def digest_of_tensors(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 of named tensors. It does not depend on device, order, strides or file format.

    For each name in sorted order the digest takes: the name, the dtype (``torch.float32``) and the shape
    (``(10, 64)``) as UTF-8 with a zero byte after each, then the values as bytes in row-major order. A value that is
    not a tensor is replaced by its ``repr``.

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
