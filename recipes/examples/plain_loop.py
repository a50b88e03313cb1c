"""The penalty and the measurement in a plain PyTorch loop: ``python -m recipes.examples.plain_loop``."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

from fisher_reg import FisherSpectralNorm, KLPenalty
from recipes.examples.tasks import digits, network

EVERY_N_STEPS = 5


def main(weight: float = 0.1, num_epochs: int = 3) -> list[float]:
    """Train, and print the mean λ_max of the validation images after each epoch.

    Args:
        weight: Weight of the penalty; 0 for none.
        num_epochs: Number of passes over the training images.

    Returns:
        The values, one per epoch.
    """
    torch.manual_seed(0)
    train, val = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    penalty, metric = KLPenalty(), FisherSpectralNorm()
    lambdas, step = [], 0
    for epoch in range(num_epochs):
        model.train()
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            loss = nn.functional.cross_entropy(model(images), labels)
            if weight > 0 and step % EVERY_N_STEPS == 0:  # each 5th step, with 5 times the weight
                loss = loss + EVERY_N_STEPS * weight * penalty(model, images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1

        metric.reset()
        for images, _ in DataLoader(val, batch_size=180):
            metric.update(model, images)  # evaluates the model in evaluation mode, in any mode of the model
        lambdas.append(metric.compute().item())
        print(f"epoch {epoch}: mean λ {lambdas[-1]:.3g}")
    return lambdas


if __name__ == "__main__":
    main()
