"""The specification of image data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSpec:
    """The specification of image data, from which a network is built.

    Attributes:
        num_classes: Number of labels.
        num_channels: 1 or 3, or any other number.
        image_size: Height and width.
        mean: Per channel, in pixel units.
        std: Per channel, in pixel units.
    """

    num_classes: int
    num_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
