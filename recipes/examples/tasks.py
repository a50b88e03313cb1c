"""The data of the examples, without a download, and the network for the images."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, random_split


def digits() -> tuple[Dataset[tuple[Tensor, ...]], Dataset[tuple[Tensor, ...]]]:
    """Return scikit-learn's digits for training and for validation: pixels in [0, 1] ``(1, 8, 8)`` and the class."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float().unflatten(1, (1, 8, 8)), torch.tensor(labels))
    train, val = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return train, val


def network() -> nn.Module:
    """Return a small convolutional network from ``(B, 1, 8, 8)`` to 10 logits."""
    conv = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(16 * 36, 64), nn.ReLU(), nn.Linear(64, 10))


def sentences(num: int, seed: int) -> list[dict[str, Tensor]]:
    """Return random sentences of 6 to 12 words of 31 and padding, for Hugging Face's Trainer.

    The class says whether most of the words are below 16; a tenth of the labels is wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 32, (num, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(6, 13, (num, 1), generator=generator)).long()
    votes = ((2 * (words >= 16) - 1) * mask).sum(1)
    labels = ((votes > 0) ^ (torch.rand(num, generator=generator) < 0.1)).long()
    names = ("input_ids", "attention_mask", "labels")
    return [dict(zip(names, row, strict=True)) for row in zip(words * mask, mask, labels, strict=True)]
