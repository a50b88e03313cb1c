"""Data sets whose images are files: ImageFolder, ImageNet, Tiny ImageNet and the COVID-19 Radiography Database.

The presence of every file is checked before training; images are decoded on access.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset, pil_loader

from recipes.data.base import ImageData, Split, stratified_split
from recipes.data.spec import ImageSpec

Files = list[tuple[Path, int]]
"""Path and label of each image."""

RADIOGRAPHS = {"COVID": 3616, "Lung_Opacity": 6012, "Normal": 10192, "Viral Pneumonia": 1345}
"""Images per class of the COVID-19 Radiography Database (version of 2021, the last one)."""


class ImageFiles(ImageData):
    """RGB images in files.

    Args:
        root: The folder.
        image_size: Height and width after resizing and centre cropping.
        mean: Per channel, in pixel units.
        std: Per channel, in pixel units.
        val_fraction: Share of the training images that is held out, stratified by label, if there is no ``val``.
        kwargs: Passed to :class:`ImageData`.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        val_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.val_fraction = val_fraction

    @abstractmethod
    def files(self) -> tuple[list[str], dict[str, Files]]:
        """Return the names of the classes, and the files of ``train``, ``test`` and, if there, ``val``."""

    def load(self) -> tuple[dict[str, Split], ImageSpec]:
        """Index the files.

        Returns:
            The splits and their specification.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is empty.
        """
        self.class_names, files = self.files()
        for path, _ in (pair for pairs in files.values() for pair in pairs):
            try:
                size = path.stat().st_size
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path} is missing; copy the data set again.") from error
            if size == 0:
                raise ValueError(f"{path} is empty; copy it again.")
        if "val" not in files:
            files["train"], files["val"] = _held_out(files["train"], self.val_fraction)
        transform = transforms.Compose(
            [transforms.Resize(self.image_size), transforms.CenterCrop(self.image_size), transforms.ToTensor()]
        )
        spec = ImageSpec(len(self.class_names), 3, self.image_size, self.mean, self.std)
        return {split: _Images(pairs, transform) for split, pairs in files.items()}, spec

    def digest(self) -> str:
        """Return a digest of the names, sizes and times of all files, since reading all images would take minutes."""
        digest = hashlib.sha256()
        for path in sorted(self.root.rglob("*")):
            if path.is_file():
                status = path.stat()
                digest.update(f"{path.relative_to(self.root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _need(self, *names: str, layout: str) -> None:
        for path in (self.root / name for name in names):
            if not path.exists():
                kind = "file" if path.suffix else "folder"
                raise FileNotFoundError(f"There is no {kind} {path.resolve()}; expected {layout} below data.root=…")


class ImageFolder(ImageFiles):
    """Folders ``root/train/<class>/*``, ``root/test/<class>/*`` and, if there, ``root/val/<class>/*``.

    Args:
        root: The folder.
        kwargs: For :class:`ImageFiles`.

    Raises:
        FileNotFoundError: If ``root/train`` or ``root/test`` is missing.
    """

    folders: Mapping[str, str] = {"train": "train", "val": "val", "test": "test"}

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        for folder in (self.folders["train"], self.folders["test"]):
            self._need(folder, layout=f"{folder}/<class>/<image>")

    def files(self) -> tuple[list[str], dict[str, Files]]:
        """List the folders.

        Returns:
            The names of the classes in alphabetical order, and the files of each split.

        Raises:
            ValueError: If there are no classes, or the splits do not have the same ones.
        """
        folders = {split: self.root / name for split, name in self.folders.items() if (self.root / name).is_dir()}
        classes = _subfolders(folders["train"])
        if not classes:
            raise ValueError(f"{folders['train']} has no folders; sort the images into {folders['train']}/<class>/.")
        for folder in folders.values():
            if _subfolders(folder) != classes:
                raise ValueError(f"{folder} has the classes {_subfolders(folder)}, but train has {classes}.")
        numbers = {name: label for label, name in enumerate(classes)}
        found = {
            split: make_dataset(folder, numbers, IMG_EXTENSIONS, allow_empty=True) for split, folder in folders.items()
        }
        return classes, {split: [(Path(path), label) for path, label in pairs] for split, pairs in found.items()}


class ImageNet(ImageFolder):
    """ILSVRC 2012: ``root/train/<wnid>/*`` and ``root/val/<wnid>/*``; its validation images are our test images.

    Args:
        root: The folder.
        num_classes: Required number of classes; None for any.
        num_train: Required number of images in ``train``; None for any.
        num_val: Required number of images in ``val``; None for any.
        kwargs: For :class:`ImageFiles`.
    """

    folders = {"train": "train", "test": "val"}

    def __init__(
        self,
        root: str,
        num_classes: int | None = 1000,
        num_train: int | None = 1_281_167,
        num_val: int | None = 50_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.num_classes = num_classes
        self.num_images = {"train": num_train, "test": num_val}

    def files(self) -> tuple[list[str], dict[str, Files]]:
        """List the folders and count.

        Returns:
            The names of the classes in alphabetical order, and the files of each split.

        Raises:
            ValueError: If the number of classes or images is wrong.
        """
        classes, files = super().files()
        if self.num_classes not in (None, len(classes)):
            raise ValueError(
                f"{self.root / 'train'} has {len(classes)} class folders instead of {self.num_classes}; copy the data "
                f"set again, or say data.num_classes={len(classes)} for a part."
            )
        for split, expected in self.num_images.items():
            if expected not in (None, len(files[split])):
                folder = self.folders[split]
                fewest = min(classes, key=Counter(classes[label] for _, label in files[split]).__getitem__)
                raise ValueError(
                    f"{self.root / folder} has {len(files[split])} images instead of {expected}, the fewest in "
                    f"{fewest}; copy the data set again, or say data.num_{folder}={len(files[split])} for a part."
                )
        return classes, files


class TinyImageNet(ImageFiles):
    """The unpacked folder ``tiny-imagenet-200``; its validation images are our test images.

    The files are ``wnids.txt``, ``train/<wnid>/images/<wnid>_<number>.JPEG``, ``val/images/*`` and
    ``val/val_annotations.txt``. The unlabelled ``test`` is not used.

    Args:
        root: The folder.
        num_classes: Number of lines of ``wnids.txt``.
        num_per_class: Training images of each class.
        num_val: Number of annotated validation images.
        kwargs: For :class:`ImageFiles`.

    Raises:
        FileNotFoundError: If one of the two lists is missing.
    """

    def __init__(
        self, root: str, num_classes: int = 200, num_per_class: int = 500, num_val: int = 10_000, **kwargs: Any
    ) -> None:
        super().__init__(root, **kwargs)
        self.num_classes = num_classes
        self.num_per_class = num_per_class
        self.num_val = num_val
        self._need("wnids.txt", "val/val_annotations.txt", layout="tiny-imagenet-200 as it is unpacked")

    def files(self) -> tuple[list[str], dict[str, Files]]:
        """Read the two lists.

        Returns:
            The wnids in alphabetical order, and the files of each split.

        Raises:
            ValueError: If a list has the wrong number of entries.
        """
        classes = sorted(set((self.root / "wnids.txt").read_text().split()))
        if len(classes) != self.num_classes:
            raise ValueError(
                f"{self.root / 'wnids.txt'} names {len(classes)} classes instead of {self.num_classes}; copy the data "
                "set again, or say data.num_classes=…"
            )
        train = []
        for label, wnid in enumerate(classes):
            names = [f"{wnid}_{number}.JPEG" for number in range(self.num_per_class)]
            train += [(path, label) for path in _exactly(self.root / "train" / wnid / "images", names, ".JPEG")]
        annotations = self._annotations({wnid: label for label, wnid in enumerate(classes)})
        if len(annotations) != self.num_val:
            raise ValueError(
                f"{self.root / 'val' / 'val_annotations.txt'} annotates {len(annotations)} images instead of "
                f"{self.num_val}; copy the data set again, or say data.num_val=…"
            )
        test = zip(
            _exactly(self.root / "val" / "images", list(annotations), ".JPEG"), annotations.values(), strict=True
        )
        return classes, {"train": train, "test": list(test)}

    def _annotations(self, labels: dict[str, int]) -> dict[str, int]:
        path = self.root / "val" / "val_annotations.txt"
        annotations = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            fields = line.split("\t")
            if len(fields) != 6 or fields[1] not in labels:
                raise ValueError(
                    f"Line {number} of {path} is {line!r}; expected a file, a wnid of wnids.txt and four numbers, "
                    "separated by tabs. Copy the data set again."
                )
            annotations[fields[0]] = labels[fields[1]]
        return annotations


class CovidRadiography(ImageFiles):
    """The unpacked COVID-19 Radiography Database: ``root/<class>/images/<class>-<number>.png``.

    Args:
        root: The folder.
        counts: Images of each class.
        test_fraction: Share of all images for testing, stratified by label, as in
            `arXiv 2606.04767 <https://arxiv.org/abs/2606.04767>`_.
        kwargs: For :class:`ImageFiles`.

    Raises:
        FileNotFoundError: If the folder of a class is missing.
    """

    def __init__(
        self, root: str, counts: Mapping[str, int] = RADIOGRAPHS, test_fraction: float = 0.3, **kwargs: Any
    ) -> None:
        super().__init__(root, **kwargs)
        self.counts = dict(counts)
        self.test_fraction = test_fraction
        self._need(*(f"{name}/images" for name in self.counts), layout="<class>/images/<class>-<number>.png")

    def files(self) -> tuple[list[str], dict[str, Files]]:
        """Number the files of each class, and split them."""
        files = []
        for label, (name, count) in enumerate(self.counts.items()):
            names = [f"{name}-{number}.png" for number in range(1, count + 1)]
            files += [(path, label) for path in _exactly(self.root / name / "images", names, ".png")]
        train, test = _held_out(files, self.test_fraction)
        return list(self.counts), {"train": train, "test": test}


class _Images(Dataset[tuple[Tensor, int]]):
    """Images that are decoded on access."""

    def __init__(self, files: Files, transform: transforms.Compose) -> None:
        self.paths = [str(path) for path, _ in files]
        self.labels = torch.tensor([label for _, label in files], dtype=torch.long)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            pixels = pil_loader(self.paths[index])
        except Exception as error:  # a damaged file may raise any error: each decoder of PIL has its own
            raise ValueError(f"{self.paths[index]} cannot be decoded as an image ({error}); copy it again.") from error
        return self.transform(pixels), int(self.labels[index])


def _held_out(files: Files, fraction: float) -> tuple[Files, Files]:
    """Split the files with :func:`stratified_split`."""
    kept, held_out = stratified_split(np.array([label for _, label in files]), fraction)
    return [files[index] for index in kept], [files[index] for index in held_out]


def _subfolders(folder: Path) -> list[str]:
    """Return the names of the classes."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _exactly(folder: Path, names: list[str], suffix: str) -> list[Path]:
    """Return the paths of the files with these names; raise an error for additional files.

    Args:
        folder: Their folder.
        names: Their names; :meth:`ImageFiles.load` checks that each exists.
        suffix: Suffix of the files; files with another suffix are ignored.

    Returns:
        The paths in the order of the names.

    Raises:
        ValueError: If there are additional files.
    """
    others = {path.name for path in folder.glob(f"*{suffix}")} - set(names)
    if others:
        raise ValueError(
            f"{folder} has {len(others)} images beyond the {len(names)} expected, {min(others)} for one; copy the data "
            "set again, or say how many there are."
        )
    return [folder / name for name in names]
