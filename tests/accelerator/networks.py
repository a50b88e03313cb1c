"""Small networks and inputs, always the same ones."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn


def images(count=5):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def sequences(count=4):
    return torch.randn(count, 6, 5, generator=torch.Generator().manual_seed(0))


def convolutional(num_classes=12):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*first, nn.Flatten(), nn.Linear(128, num_classes))
    nn.init.normal_(network[1].running_mean, std=0.1)
    return network.eval()


class Attention(nn.Module):
    """Patches, an encoder layer of a transformer, and the mean over the patches."""

    def __init__(self, num_classes=12):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, num_classes)
        self.eval()

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        return self.head(self.encoder(tokens).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer and its last output."""

    def __init__(self, num_classes=12, kind=nn.LSTM):
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(5, 7, batch_first=True)
        self.head = nn.Linear(7, num_classes)
        self.eval()

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def smooth(num_classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.Tanh(), nn.Linear(9, num_classes)).eval()


NETWORKS = {
    "convolutional": (convolutional, images),
    "attention": (Attention, images),
    "smooth": (smooth, images),
    "lstm": (Recurrent, sequences),
    "gru": (partial(Recurrent, kind=nn.GRU), sequences),
}
