"""The specification of the data for a network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSpec:
    """The specification of the data for a model.

    Attributes:
        num_classes: Number of labels.
        num_channels: Number of channels, usually 1 or 3.
        image_size: Height and width.
        mean: Per channel, in pixel units.
        std: Per channel, in pixel units.
    """

    num_classes: int
    num_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
