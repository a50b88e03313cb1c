"""Small named networks and data, shared by the tests."""

from __future__ import annotations

import lightning.pytorch
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.data.sources import Digits
from recipes.models import zoo as models

FAMILIES = ("vgg", "resnet", "densenet", "vit")


def digits():
    data = Digits()
    data.setup()
    return data


def network(family, data, seed=0):
    torch.manual_seed(seed)
    build = {
        "vgg": lambda: models.vgg(data.spec, [12, "M", 24, "M"]),
        "resnet": lambda: models.resnet(data.spec, [1, 1, 0, 0], stem_stride=2),
        "densenet": lambda: models.densenet(data.spec, 8, (2, 2), 12, stem_stride=2),
        "vit": lambda: models.vit(data.spec, 4, 2, 2, 32, 64),
    }
    return build[family]()


def train(model, data, steps=250):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    batches = iter(())
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None:
            batches = iter(data.train_dataloader())
            batch = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model.eval()


def test_images(data, count):
    return data.splits["test"].tensors[0][:count]


def tiny_network(batch_norm=False, dropout=False):
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5) if batch_norm else nn.Identity(), nn.Tanh()]
    layers += [nn.Dropout(0.5) if dropout else nn.Identity(), nn.Linear(5, 4)]
    return nn.Sequential(*layers)


class Plain(pl.LightningModule):
    """A user's module."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OtherPlain(lightning.pytorch.LightningModule):
    """The same module by the other name of Lightning."""

    forward = Plain.forward
    training_step = Plain.training_step
    validation_step = Plain.validation_step
    configure_optimizers = Plain.configure_optimizers

    def __init__(self, network):
        super().__init__()
        self.network = network


def tiny_batches(count=8, batch_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    y = torch.randint(0, 4, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(folder, trainer_type=pl.Trainer, **kwargs):
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return trainer_type(**(options | kwargs))
