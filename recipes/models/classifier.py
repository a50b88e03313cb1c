"""A plain LightningModule without any code for Fisher matrices, like a user's module."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from recipes.attacks import Attack

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Classifier(pl.LightningModule):
    """Cross-entropy training of a network.

    Args:
        network: Maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, num_classes)``.
        num_classes: Number of labels.
        optimizer: From parameters to optimizer.
        attack: Adversarial training as in arXiv 2606.04767: each batch is extended by its images after this attack on
            the current network.
        annealed: Whether the learning rate decreases to zero along a cosine over the training.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        optimizer: OptimizerFactory,
        attack: Attack | None = None,
        annealed: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.attack = attack
        self.annealed = annealed
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        result: Tensor = self.network(images)
        return result

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        images, labels = batch
        if self.attack is not None:
            images = torch.cat([images, self.attack(self.network, images, labels)])
            labels = labels.repeat(2)
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", nn.functional.cross_entropy(logits, labels), sync_dist=True)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test/accuracy", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Anneal the learning rate per step, or keep it constant."""
        optimizer = self.optimizer(self.parameters())
        if not self.annealed:
            return {"optimizer": optimizer}
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
