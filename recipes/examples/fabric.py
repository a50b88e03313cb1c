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
        weight: Weight of the penalty; 0 for none.
        num_epochs: Number of passes over the training images.
        precision: Precision of the training; the penalty and the measurement are computed in float32.

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
            if weight > 0 and step % EVERY_N_STEPS == 0:  # each 5th step, with 5 times the weight
                loss = loss + EVERY_N_STEPS * weight * penalty(model, images)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            step += 1

        metric.reset()
        for images, _ in val_loader:
            metric.update(model, images)  # evaluates the model in evaluation mode, in any mode of the model
        lambdas.append(metric.compute().item())  # over all processes
        fabric.print(f"epoch {epoch}: mean λ {lambdas[-1]:.3g}")
    return lambdas


if __name__ == "__main__":
    main()
