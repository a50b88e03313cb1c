"""Images that fit in memory, resized on access."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from recipes.data.base import ImageData, Split, stratified_split
from recipes.data.spec import ImageSpec


class ArrayData(ImageData):
    """Images that fit in memory, from arrays.

    Args:
        val_fraction: Share of the training images that is held out, stratified by label, if there is no ``val``.
        image_size: Height and width to which an image is resized on access; in memory it keeps its size.
        num_channels: 3 to repeat the channel of grey images on access.
        num_train: Use only the first training images, including those held out, equally many of each class.
        num_test: Use only the first test images, equally many of each class.
        kwargs: Passed to :class:`ImageData`.
    """

    def __init__(
        self,
        val_fraction: float = 0.1,
        *,
        image_size: int | None = None,
        num_channels: int | None = None,
        num_train: int | None = None,
        num_test: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.val_fraction = val_fraction
        self.image_size = image_size
        self.num_channels = num_channels
        self.num_train = num_train
        self.num_test = num_test

    @abstractmethod
    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return images (uint8, or float in [0, 1]; ``(N, H, W)`` or ``(N, H, W, C)``) and labels per split."""

    def digest(self) -> str:
        """Return a digest of the complete arrays."""
        digest = hashlib.sha256()
        for split, pair in sorted(self.arrays().items()):
            digest.update(split.encode())
            for array in pair:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def load(self) -> tuple[dict[str, Split], ImageSpec]:
        """Convert the arrays to tensors ``(N, C, H, W)``.

        Returns:
            The splits and their specification; mean and std are those of the training images before resizing.

        Raises:
            ValueError: If an array is invalid, or there are fewer images or channels than requested.
        """
        arrays = self.arrays()
        for split, (images, labels) in arrays.items():
            _check_arrays(split, images, labels, arrays["train"][0].shape[1:])
        num_classes = int(max(labels.max() for _, labels in arrays.values())) + 1
        for split, count in (("train", self.num_train), ("test", self.num_test)):
            if count is not None:
                images, labels = arrays[split]
                if not num_classes <= count <= len(labels):
                    raise ValueError(
                        f"num_{split}={count} must lie between {num_classes}, one image per class, and {len(labels)}, "
                        "as many as there are."
                    )
                first = _balanced_prefix(labels, count)
                arrays[split] = images[first], labels[first]
        if "val" not in arrays:
            images, labels = arrays["train"]
            kept, held_out = stratified_split(labels, self.val_fraction)
            arrays |= {"train": (images[kept], labels[kept]), "val": (images[held_out], labels[held_out])}
        tensors = {
            split: (_channels_first(images), torch.from_numpy(labels.astype(np.int64)))
            for split, (images, labels) in arrays.items()
        }
        return self._described(tensors, num_classes)

    def _described(
        self, tensors: dict[str, tuple[Tensor, Tensor]], num_classes: int
    ) -> tuple[dict[str, Split], ImageSpec]:
        own_channels, own_size = tensors["train"][0].shape[1:3]
        size = own_size if self.image_size is None else self.image_size
        channels = own_channels if self.num_channels is None else self.num_channels
        if channels != own_channels and (own_channels, channels) != (1, 3):
            raise ValueError(
                f"num_channels={channels}, but the images have {own_channels}; only a single channel can be repeated "
                "to three."
            )
        splits: dict[str, Split]
        if (size, channels) == (own_size, own_channels):
            splits = {split: TensorDataset(_pixels(images), labels) for split, (images, labels) in tensors.items()}
        else:
            splits = {split: _Resized(*pair, size, channels // own_channels) for split, pair in tensors.items()}
        std, mean = torch.std_mean(_pixels(tensors["train"][0]), dim=(0, 2, 3))
        mean, std = (part.repeat(channels // own_channels) for part in (mean, std.clamp_min(1e-3)))
        return splits, ImageSpec(num_classes, channels, size, tuple(mean.tolist()), tuple(std.tolist()))


class _Resized(Dataset[tuple[Tensor, Tensor]]):
    """Images that are resized on access, one by one, since CIFAR-10 at 224 x 224 takes 36 GB."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, repeats: int) -> None:
        self.images = images
        self.labels = labels
        self.size = (size, size)
        self.repeats = repeats

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = _pixels(self.images[index])[None]
        image = torch.nn.functional.interpolate(image, self.size, mode="bilinear", antialias=True).clamp(0, 1)
        return image[0].repeat(self.repeats, 1, 1), self.labels[index]


def _check_arrays(split: str, images: np.ndarray, labels: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise an error, with a remedy, unless the arrays are images ``(N, *shape)`` in [0, 1] with a class each."""
    if images.ndim not in (3, 4) or 0 in images.shape or images.shape[1] != images.shape[2]:
        raise ValueError(
            f"The {split} images must be square, (N, H, H) or (N, H, H, C) with the channels last; got {images.shape}."
        )
    if images.shape[1:] != shape:
        raise ValueError(f"The {split} images have the shape {images.shape[1:]}, but those of train {shape}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"There are {len(images)} {split} images, but {labels.size} labels; pass one label per image.")
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"The {split} labels must be integers from 0; got {labels.dtype} from {labels.min()} to {labels.max()}."
        )
    if images.dtype != np.uint8 and not (images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"The {split} images must be uint8, or floats in [0, 1]; got {images.dtype} from {images.min()} to "
            f"{images.max()}. Store them as uint8, or divide by 255."
        )


def _balanced_prefix(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the first indices, in order, with equally many of each class, or all of a class with fewer."""
    by_class = np.argsort(labels, kind="stable")
    rank_in_class = np.empty_like(by_class)
    rank_in_class[by_class] = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    return np.sort(np.argsort(rank_in_class, kind="stable")[:count])


def _channels_first(images: np.ndarray) -> Tensor:
    """Convert ``(N, H, W[, C])`` to uint8 or float ``(N, C, H, W)``."""
    tensor = torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.float32))
    return tensor[:, None] if tensor.ndim == 3 else tensor.movedim(3, 1)


def _pixels(images: Tensor) -> Tensor:
    """Convert uint8 to float in [0, 1]."""
    return images.float().div(255) if images.dtype == torch.uint8 else images
