"""Image data as LightningDataModules with float images in [0, 1] and a specification of their shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import pytorch_lightning as pl
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from recipes.data.spec import ImageSpec


class Split(Protocol):
    """Images ``(C, H, W)`` with their labels: a :class:`TensorDataset`, or a data set with an attribute ``labels``."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> Any:
        """Return an image and its label."""


SPLIT_SEED = 0
"""Seed of every split: the same test data for each training seed."""


class ImageData(pl.LightningDataModule):
    """Three splits of labelled images.

    Args:
        batch_size: Number of images per training and evaluation batch.
        num_workers: Number of worker processes per loader.
        train_transform: Augmentation of one image ``(C, H, W)`` of a training batch, from :mod:`torchvision.transforms`
            for example; ``splits["train"]`` itself is not changed.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """

    spec: ImageSpec
    splits: dict[str, Split]
    class_names: Sequence[str] = ()

    def __init__(
        self, batch_size: int = 64, num_workers: int = 0, train_transform: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1; got {batch_size}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_transform = train_transform

    @abstractmethod
    def load(self) -> tuple[dict[str, Split], ImageSpec]:
        """Read the data: the splits ``train``, ``val`` and ``test``, and their specification."""

    def digest(self) -> str | None:
        """Return a digest that distinguishes data with the same settings; None for data that never change."""
        return None

    def setup(self, stage: str | None = None) -> None:
        """Read the data once; raise an error if a class has no training image or no test image."""
        if not hasattr(self, "splits"):
            splits, spec = self.load()
            for split in ("train", "test"):
                _check_classes(split, labels_of(splits[split]), spec.num_classes, self.class_names)
            self.splits, self.spec = splits, spec

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Shuffled and augmented; an incomplete last batch is dropped, since small batches are bad for batch norm.

        Returns:
            The loader.

        Raises:
            ValueError: If there is no complete batch.
        """
        data = self.splits["train"]
        if len(data) < self.batch_size:
            raise ValueError(f"{len(data)} training images make no batch of {self.batch_size}; lower data.batch_size.")
        if self.train_transform is not None:
            data = _Transformed(data, self.train_transform)
        return self._loader(data, is_training=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """In order."""
        return self._loader(self.splits["val"])

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """In order."""
        return self._loader(self.splits["test"])

    def _loader(self, data: Split, *, is_training: bool = False) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            cast("Dataset[tuple[Tensor, int]]", data),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            shuffle=is_training,
            drop_last=is_training,
        )


def labels_of(split: Any) -> Tensor:
    """Return the labels of a :class:`TensorDataset`, or of another data set with ``labels``, without reading images."""
    result: Tensor = split.tensors[1] if isinstance(split, TensorDataset) else split.labels
    return result


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a share of the images of every class, equal for all seeds of the training.

    Args:
        labels: Class of each image.
        fraction: Share to hold out.

    Returns:
        Indices of the images kept and of those held out.

    Raises:
        ValueError: If both parts cannot have every class.
    """
    try:
        kept, held_out = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise ValueError(
            f"A share of {fraction} of {len(labels)} images cannot be held out with every class on both sides: {error} "
            "Use more images, or change val_fraction or test_fraction."
        ) from error
    return kept, held_out


class _Transformed(Dataset[tuple[Tensor, int]]):
    """Images of another data set after a transform."""

    def __init__(self, data: Split, transform: Callable[[Tensor], Tensor]) -> None:
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        return self.transform(image), label


def _check_classes(split: str, labels: Tensor, num_classes: int, names: Sequence[str]) -> None:
    """Raise an error for a split without some classes; it names up to ten of them."""
    present = set(labels.unique().tolist())
    missing = list(islice((label for label in range(num_classes) if label not in present), 10))
    if missing:
        named = [f"{label} ({names[label]})" if names else str(label) for label in missing]
        raise ValueError(
            f"The {split} images have {len(present)} of the {num_classes} classes; there is none of {', '.join(named)}"
            f"{', …' if len(present) + 10 < num_classes else ''}. Add {split} images of them, or take them out of all "
            "splits and number the labels from 0 without gaps."
        )
