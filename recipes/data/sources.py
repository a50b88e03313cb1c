"""Sources of image arrays: scikit-learn's digits, torchvision, NumPy files."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from recipes.data.arrays import ArrayData
from recipes.data.base import SPLIT_SEED, stratified_split

# Shapes of the files of MNIST and similar data sets; torchvision has only the checksums of their archives.
_IDX_NAMES = ("MNIST", "FashionMNIST", "KMNIST")
_IDX_SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


class Digits(ArrayData):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, enlarged; part of scikit-learn, no download.

    Args:
        image_size: Height and width after bilinear enlargement.
        test_fraction: Share of all images for testing, stratified by label.
        kwargs: For :class:`ArrayData`.
    """

    image_size: int

    def __init__(self, image_size: int = 16, test_fraction: float = 0.2, **kwargs: Any) -> None:
        super().__init__(image_size=image_size, **kwargs)
        self.test_fraction = test_fraction

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Enlarge and split the images."""
        digits = load_digits()
        small = torch.from_numpy(digits.images).float()[:, None] / 16
        size = (self.image_size, self.image_size)
        images = torch.nn.functional.interpolate(small, size, mode="bilinear")[:, 0].numpy()
        train, test = stratified_split(digits.target, self.test_fraction)
        return {"train": (images[train], digits.target[train]), "test": (images[test], digits.target[test])}


class Numbers(ArrayData):
    """Numbers of one to three of scikit-learn's digits side by side: 10, 100 or 1000 classes, no download.

    The size of a digit does not depend on their number; its vertical position is random. Test and validation numbers
    use other handwritten digits than training numbers. A little noise avoids the kinks of max pooling on the
    background, where a network has no derivative.

    Args:
        num_digits: Number of digits of each number; there are ``10 ** num_digits`` classes with equal frequency.
        image_size: Height and width; a digit takes a third of it.
        num_train: Number of training images.
        num_test: Number of test images, and of validation images.
        noise: Share of uniform noise in each pixel.
        kwargs: Passed to :class:`ArrayData`.

    Raises:
        ValueError: If there are fewer training or test images than classes, or more than three digits.
    """

    image_size: int
    num_train: int
    num_test: int

    def __init__(
        self,
        num_digits: int = 1,
        image_size: int = 32,
        num_train: int = 4000,
        num_test: int = 1000,
        noise: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, num_train=num_train, num_test=num_test, **kwargs)
        if not 1 <= num_digits <= 3:
            raise ValueError(f"num_digits must be 1, 2 or 3: a digit takes a third of the image; got {num_digits}.")
        if min(num_train, num_test) < 10**num_digits:
            raise ValueError(
                f"{num_train} training and {num_test} test images do not cover the {10**num_digits} classes of numbers "
                f"of {num_digits} digits; use at least one of each per class."
            )
        self.num_digits = num_digits
        self.noise = noise

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Compose the numbers."""
        digits = Digits(image_size=self.image_size // 3).arrays()
        rng = np.random.default_rng(SPLIT_SEED)
        images, labels = digits["test"]
        test, val = stratified_split(labels, 0.5)
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
    """A torchvision data set with all images in memory: MNIST, CIFAR10, CIFAR100.

    CIFAR's files are verified by their checksums, MNIST's by their headers and lengths.

    Args:
        name: Name of the class in :mod:`torchvision.datasets`.
        root: Folder to download to and read from.
        kwargs: For :class:`ArrayData`.
    """

    name: str

    def __init__(self, name: str, root: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = name
        self.root = root

    def prepare_data(self) -> None:
        """Download missing files, and read the data once to check that it is complete."""
        self.arrays()

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Read torchvision's training and test images.

        Returns:
            Images and labels per split.

        Raises:
            ValueError: If a file is damaged; the message names it.
            FileNotFoundError: Without the files and a connection; the message says where they belong.
        """
        failure = None
        try:
            pairs = {
                split: getattr(datasets, self.name)(self.root, train=split == "train", download=True)
                for split in ("train", "test")
            }
        except (OSError, RuntimeError, AssertionError, ValueError, TypeError, KeyError) as error:
            failure = error
        wrong = _wrong_files(self.name, Path(self.root).resolve())
        damaged = [file for file in wrong if file.is_file()]
        if damaged:
            raise ValueError(
                f"{self.name} cannot be used, these files are damaged: {', '.join(map(str, damaged))}. Delete them and "
                "run again with an internet connection to download them, or copy them again."
            ) from failure
        if failure is not None:
            raise FileNotFoundError(
                f"{self.name} is not in {Path(self.root).resolve()}, which lacks {wrong[0] if wrong else 'files'}, and "
                f"could not be downloaded ({failure}). Connect to the internet once, copy the files there, or use "
                "data=digits, which needs no download."
            ) from failure
        return {split: (np.asarray(data.data), np.asarray(data.targets)) for split, data in pairs.items()}


class Npz(ArrayData):
    """Arrays ``x_train, y_train, x_test, y_test`` and, if there, ``x_val, y_val`` in one ``.npz`` file.

    Args:
        path: The file.
        sha256: Required digest of the file, in hexadecimal; without it there is no check.
        kwargs: For :class:`ArrayData`.

    Raises:
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, path: str, sha256: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path)
        self.sha256 = sha256
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file {self.path.resolve()}; set its path with data.path=…")

    def digest(self) -> str:
        """Return the SHA-256 of the file."""
        with self.path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Read the file.

        Returns:
            Images and labels per split.

        Raises:
            ValueError: If the file is damaged or has another digest, or an array is missing; the message names those
                found.
        """
        if self.sha256 is not None:
            digest = self.digest()
            if digest != self.sha256.lower():
                raise ValueError(f"{self.path} has the SHA-256 {digest} instead of {self.sha256}; copy it again.")
        reading = "its index"
        try:
            with zipfile.ZipFile(self.path) as archive:
                found = [name.removesuffix(".npy") for name in archive.namelist()]
            splits = ["train", "test"] + ["val"] * ("x_val" in found)
            names = [f"{part}_{split}" for split in splits for part in "xy"]
            missing = [name for name in names if name not in found]
            arrays = {}
            if not missing:
                with np.load(self.path) as file:
                    for reading in names:
                        arrays[reading] = np.asarray(file[reading])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.path} is damaged or not written by numpy.savez from arrays of numbers: {reading} cannot be "
                f"read ({error}). Copy or write it again."
            ) from error
        if missing:
            raise ValueError(f"{self.path} lacks {missing}; it has {found}.")
        return {split: (arrays[f"x_{split}"], arrays[f"y_{split}"].reshape(-1)) for split in splits}


def _wrong_files(name: str, root: Path) -> list[Path]:
    """Return the files of a torchvision data set that are known to be missing or wrong."""
    kind = getattr(datasets, name)
    if issubclass(kind, datasets.CIFAR10):
        sums = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        files = [(root / kind.base_folder / file, md5) for file, md5 in sums]
        return [file for file, md5 in files if not check_integrity(file, md5)]
    if name in _IDX_NAMES:
        files = [(root / name / "raw" / file, shape) for file, shape in _IDX_SHAPES.items()]
        return [file for file, shape in files if not file.is_file() or not _is_idx(file, shape)]
    return []


def _is_idx(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file has the length and header of MNIST's format: rank and sizes, big-endian, then bytes."""
    header = b"".join(number.to_bytes(4, "big") for number in (0x0800 + len(shape), *shape))
    with file.open("rb") as stream:
        return stream.read(len(header)) == header and file.stat().st_size == len(header) + prod(shape)
