"""The penalty and the measurement with Lightning Fabric: ``python -m recipes.examples.fabric``."""

from __future__ import annotations

from typing import Literal

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from fisher_reg import FisherSpectralNorm, KLPenalty
from recipes.examples.tasks import digits, network

EVERY_N_STEPS = 5


def main(
    weight: float = 0.1, num_epochs: int = 3, precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
) -> list[float]:
    """Train, and print the mean λ_max of the validation images after each epoch.

    Args:
        weight: Of the penalty; 0 for none.
        num_epochs: Passes over the training images.
        precision: Of the training; the penalty and the measurement compute in float32 all the same.

    Returns:
        The values, one per epoch.
    """
    fabric = Fabric(accelerator="auto", devices=1, precision=precision)
    fabric.seed_everything(0, verbose=False)
    train, val = digits()
    model = network()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    train_loader = fabric.setup_dataloaders(DataLoader(train, batch_size=64, shuffle=True))
    val_loader = fabric.setup_dataloaders(DataLoader(val, batch_size=180))
    penalty, metric = KLPenalty(), FisherSpectralNorm().to(fabric.device)
    lambdas, step = [], 0
    for epoch in range(num_epochs):
        model.train()
        for images, labels in train_loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            if weight > 0 and step % EVERY_N_STEPS == 0:  # each 5th step, 5 times as strongly
                loss = loss + EVERY_N_STEPS * weight * penalty(model, images)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            step += 1

        metric.reset()
        for images, _ in val_loader:
            metric.update(model, images)  # in evaluation behaviour, whatever the mode of the model
        lambdas.append(metric.compute().item())  # of all processes
        fabric.print(f"epoch {epoch}: mean λ {lambdas[-1]:.3g}")
    return lambdas


if __name__ == "__main__":
    main()
