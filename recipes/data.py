"""Image data as LightningDataModules that hand out float images in [0, 1] and know their own shape."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchvision import datasets, transforms

from recipes.models import ImageSpec

SPLIT_SEED = 0
"""Seed of every split: the same test data for each training seed."""


class ImageData(pl.LightningDataModule):
    """Three splits of labelled images.

    Args:
        batch_size: Images per training and evaluation batch.
        num_workers: Worker processes per loader.
    """

    spec: ImageSpec
    splits: dict[str, Dataset[tuple[Tensor, int]]]

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers

    @abstractmethod
    def load(self) -> tuple[dict[str, Dataset[tuple[Tensor, int]]], ImageSpec]:
        """Read the data: the splits ``train``, ``val`` and ``test``, and what they look like."""

    def setup(self, stage: str | None = None) -> None:
        """Read the data once."""
        if not hasattr(self, "splits"):
            self.splits, self.spec = self.load()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Shuffled; an incomplete last batch is dropped, since batch norm dislikes it."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """In order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """In order."""
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False, drop_last: bool = False) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            self.splits[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class ArrayData(ImageData):
    """Images that fit in memory, from arrays.

    Args:
        val_fraction: Share of the training images that is held out, stratified by label, where there is no ``val``.
        batch_size: Images per training and evaluation batch.
        num_workers: Worker processes per loader.
    """

    def __init__(self, val_fraction: float = 0.1, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        self.val_fraction = val_fraction

    @abstractmethod
    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return images (uint8, or float in [0, 1]; ``(N, H, W)`` or ``(N, H, W, C)``) and labels per split."""

    def load(self) -> tuple[dict[str, Dataset[tuple[Tensor, int]]], ImageSpec]:
        """Convert the arrays to tensors ``(N, C, H, W)``; mean and std are those of the training images."""
        arrays = self.arrays()
        if "val" not in arrays:
            images, labels = arrays["train"]
            kept, held_out = train_test_split(
                np.arange(len(labels)), test_size=self.val_fraction, stratify=labels, random_state=SPLIT_SEED
            )
            arrays |= {"train": (images[kept], labels[kept]), "val": (images[held_out], labels[held_out])}
        tensors = {
            split: (_pixels(images), torch.from_numpy(labels).long()) for split, (images, labels) in arrays.items()
        }
        images, labels = tensors["train"]
        std, mean = torch.std_mean(images, dim=(0, 2, 3))
        spec = ImageSpec(
            num_classes=int(max(labels.max() for _, labels in tensors.values())) + 1,
            num_channels=images.shape[1],
            image_size=images.shape[2],
            mean=tuple(mean.tolist()),
            std=tuple(std.clamp_min(1e-3).tolist()),
        )
        return {split: TensorDataset(*pair) for split, pair in tensors.items()}, spec


class Digits(ArrayData):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, enlarged; part of scikit-learn, no download.

    Args:
        image_size: Height and width after bilinear enlargement.
        test_fraction: Share of all images for testing, stratified by label.
        kwargs: For :class:`ArrayData`.
    """

    def __init__(self, image_size: int = 16, test_fraction: float = 0.2, **kwargs: float) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.test_fraction = test_fraction

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Enlarge and split the images."""
        digits = load_digits()
        small = torch.from_numpy(digits.images).float()[:, None] / 16
        size = (self.image_size, self.image_size)
        images = torch.nn.functional.interpolate(small, size, mode="bilinear")[:, 0].numpy()
        train, test = train_test_split(
            np.arange(len(images)), test_size=self.test_fraction, stratify=digits.target, random_state=SPLIT_SEED
        )
        return {"train": (images[train], digits.target[train]), "test": (images[test], digits.target[test])}


class Numbers(ArrayData):
    """Numbers of one to three of scikit-learn's digits side by side: 10, 100 or 1000 classes, no download.

    The digits have the same size whatever their number, and a random height each. Test and validation numbers are made
    of other handwriting than training numbers. A little noise keeps the background off the kinks of max pooling, where
    a network has no derivative.

    Args:
        num_digits: Digits of each number; ``10 ** num_digits`` classes, all of which occur equally often.
        image_size: Height and width; a digit takes a third of it.
        num_train: Training images.
        num_test: Test images, and as many validation images.
        noise: Share of uniform noise in each pixel.
        batch_size: Images per training and evaluation batch.
        num_workers: Worker processes per loader.

    Raises:
        ValueError: If there are fewer training or test images than classes, or more than three digits.
    """

    def __init__(
        self,
        num_digits: int = 1,
        image_size: int = 32,
        num_train: int = 4000,
        num_test: int = 1000,
        noise: float = 0.1,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if not 1 <= num_digits <= 3:
            raise ValueError(f"num_digits must be 1, 2 or 3: a digit takes a third of the image; got {num_digits}.")
        if min(num_train, num_test) < 10**num_digits:
            raise ValueError(
                f"{num_train} training and {num_test} test images do not cover the {10**num_digits} classes of numbers "
                f"of {num_digits} digits; give at least as many of each."
            )
        self.num_digits = num_digits
        self.image_size = image_size
        self.num_train = num_train
        self.num_test = num_test
        self.noise = noise

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Put the numbers together."""
        digits = Digits(image_size=self.image_size // 3).arrays()
        rng = np.random.default_rng(SPLIT_SEED)
        images, labels = digits["test"]
        test, val = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=SPLIT_SEED)
        parts = {
            "train": (*digits["train"], self.num_train),
            "val": (images[val], labels[val], self.num_test),
            "test": (images[test], labels[test], self.num_test),
        }
        return {split: self._numbers(*part, rng) for split, part in parts.items()}

    def _numbers(
        self, digits: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        size = digits.shape[1]
        numbers = np.arange(count) % 10**self.num_digits
        images = np.zeros((count, self.image_size, self.image_size), dtype=digits.dtype)
        first = (self.image_size - self.num_digits * size) // 2
        written = [np.flatnonzero(labels == digit) for digit in range(10)]
        for image, number in zip(images, numbers, strict=True):
            for place, digit in enumerate(f"{number:0{self.num_digits}d}"):
                row = rng.integers(self.image_size - size + 1)
                left = first + place * size
                image[row : row + size, left : left + size] = digits[rng.choice(written[int(digit)])]
        grain = rng.random(images.shape, dtype=images.dtype)
        return (1 - self.noise) * images + self.noise * grain, numbers


class TorchvisionArrays(ArrayData):
    """A torchvision data set that keeps all its images in memory: MNIST, CIFAR10, CIFAR100.

    Args:
        name: Name of the class in :mod:`torchvision.datasets`.
        root: Folder to download to and read from.
        kwargs: For :class:`ArrayData`.
    """

    def __init__(self, name: str, root: str, **kwargs: float) -> None:
        super().__init__(**kwargs)
        self.name = name
        self.root = root

    def prepare_data(self) -> None:
        """Download what is missing.

        Raises:
            RuntimeError: Without a connection; the message says where the files belong.
        """
        try:
            getattr(datasets, self.name)(self.root, download=True)
        except (URLError, OSError, RuntimeError) as error:
            raise RuntimeError(
                f"{self.name} is not in {Path(self.root).resolve()} and could not be downloaded ({error}). Connect to "
                "the internet once, copy the files there, or use data=digits, which needs no download."
            ) from error

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Read torchvision's training and test images."""
        self.prepare_data()
        pairs = {split: getattr(datasets, self.name)(self.root, train=split == "train") for split in ("train", "test")}
        return {split: (np.asarray(data.data), np.asarray(data.targets)) for split, data in pairs.items()}


class Npz(ArrayData):
    """Arrays ``x_train, y_train, x_test, y_test`` and, if there, ``x_val, y_val`` in one ``.npz`` file.

    Args:
        path: The file.
        kwargs: For :class:`ArrayData`.

    Raises:
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, path: str, **kwargs: float) -> None:
        super().__init__(**kwargs)
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file {self.path.resolve()}; say where it is with data.path=…")

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Read the file.

        Returns:
            Images and labels per split.

        Raises:
            ValueError: If an array is missing; the message names those found.
        """
        with np.load(self.path) as file:
            missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in file.files]
            if missing:
                raise ValueError(f"{self.path} lacks {missing}; it has {file.files}.")
            splits = [split for split in ("train", "val", "test") if f"x_{split}" in file.files]
            return {split: (file[f"x_{split}"], file[f"y_{split}"].reshape(-1)) for split in splits}


class ImageFolder(ImageData):
    """Folders ``root/train/<class>/*``, ``root/test/<class>/*`` and, if there, ``root/val/<class>/*`` of RGB images.

    Args:
        root: The folder.
        image_size: Height and width after resizing and centre cropping.
        mean: Per channel, in pixel units.
        std: Per channel, in pixel units.
        val_fraction: Share of the training images that is held out where there is no ``val``.
        batch_size: Images per training and evaluation batch.
        num_workers: Worker processes per loader.

    Raises:
        FileNotFoundError: If ``root/train`` or ``root/test`` is missing.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        val_fraction: float = 0.1,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root = Path(root)
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.val_fraction = val_fraction
        for split in ("train", "test"):
            if not (self.root / split).is_dir():
                raise FileNotFoundError(
                    f"There is no folder {(self.root / split).resolve()}; expected {split}/<class>/<image> below "
                    "data.root=…"
                )

    def load(self) -> tuple[dict[str, Dataset[tuple[Tensor, int]]], ImageSpec]:
        """Index the folders.

        Returns:
            The splits and what they look like.

        Raises:
            ValueError: If the splits do not have the same classes.
        """
        transform = transforms.Compose(
            [transforms.Resize(self.image_size), transforms.CenterCrop(self.image_size), transforms.ToTensor()]
        )
        names = [split for split in ("train", "val", "test") if (self.root / split).is_dir()]
        splits = {name: datasets.ImageFolder(self.root / name, transform) for name in names}
        classes = splits["train"].classes
        for name, split in splits.items():
            if split.classes != classes:
                raise ValueError(f"{self.root / name} has the classes {split.classes}, but train has {classes}.")
        spec = ImageSpec(len(classes), 3, self.image_size, self.mean, self.std)
        if "val" not in splits:
            generator = torch.Generator().manual_seed(SPLIT_SEED)
            lengths = [1 - self.val_fraction, self.val_fraction]
            splits["train"], splits["val"] = random_split(splits["train"], lengths, generator)
        return splits, spec


def _pixels(images: np.ndarray) -> Tensor:
    """Convert ``(N, H, W[, C])`` to float ``(N, C, H, W)`` in [0, 1]."""
    tensor = torch.from_numpy(images)
    tensor = tensor[:, None] if tensor.ndim == 3 else tensor.movedim(3, 1)
    return tensor.float().div(255) if tensor.dtype == torch.uint8 else tensor.float()
