"""Demonstration modules of Lightning."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel, DemoModel
from pytorch_lightning.demos.transformer import LightningTransformer
from torch import Tensor, nn

from recipes.public_modules import Public


def boring() -> Public:
    """Return the model that Lightning's tests and bug reports use: a batch is a tensor."""
    x = torch.randn(6, 32)
    module = BoringModel()
    return Public(module, x, module.layer, lambda: x)


def demo() -> Public:
    """Return the model of the LightningCLI examples."""
    x = torch.randn(6, 32)
    module = DemoModel(out_dim=5)
    return Public(module, x, lambda inputs: torch.relu(module.l1(inputs)), lambda: x)


def transformer() -> Public:
    """Return the language model: token ids ``(B, T)`` for inputs and for targets, log-probabilities ``(B * T, K)``."""
    module = LightningTransformer(vocab_size=20).eval()
    module.prepare_data = lambda: None  # type: ignore[method-assign]  # it would download
    ids, targets = torch.randint(20, (6, 7)), torch.randint(20, (6, 7))

    def moved(parts: Any, x: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        scale = math.sqrt(parts.ninp)
        source = parts.pos_encoder((parts.embedding(ids) + x) * scale)
        target = parts.pos_encoder(parts.embedding(targets) * scale)
        result: Tensor = parts.decoder(parts.transformer(source, target, tgt_mask=mask))
        return result

    def network(x: Tensor) -> Tensor:
        return moved(module.model, x, ids, targets)[:, -1].log_softmax(-1)

    return Public(module.train(), (ids, targets), network, lambda: torch.zeros(6, 7, 200), {"moved": moved})


class LitAutoEncoder(pl.LightningModule):
    """The autoencoder of Lightning's quick start, which has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 28 * 28))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Reconstruct the images."""
        x, _ = batch
        x = x.view(x.size(0), -1)
        return nn.functional.mse_loss(self.decoder(self.encoder(x)), x)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the same."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def autoencoder() -> Public:
    """Return the quick start's autoencoder; its code is a regression to ``K = 3`` numbers."""
    module = LitAutoEncoder()
    batch = (torch.rand(6, 1, 28, 28), torch.randint(10, (6,)))
    return Public(module, batch, lambda x: module.encoder(x.flatten(1)), lambda: batch[0])
