"""A plain PyTorch loop: ``python -m recipes.examples.plain_loop``."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from fisher_reg import FisherSpectralNorm, KLPenalty

EVERY_N_STEPS = 5


def digits() -> list[TensorDataset]:
    """Return scikit-learn's digits, pixels in [0, 1] ``(B, 1, 8, 8)`` and classes, for training and for validation."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float().unflatten(1, (1, 8, 8)), torch.tensor(labels))
    return random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))


def build_model() -> nn.Module:
    """Return a small convolutional network from ``(B, 1, 8, 8)`` to 10 logits."""
    conv = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(16 * 36, 64), nn.ReLU(), nn.Linear(64, 10))


def main(weight: float = 0.1, num_epochs: int = 3, seed: int = 0) -> list[float]:
    """Train, and return the mean λ_max of the validation images after each epoch.

    Args:
        weight: Of the penalty; 0 for none.
        num_epochs: Passes over the training images.
        seed: Of the weights and the order.
    """
    torch.manual_seed(seed)
    train, val = digits()
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    penalty, metric = KLPenalty(), FisherSpectralNorm()
    lambdas, step = [], 0
    for epoch in range(num_epochs):
        model.train()
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            loss = nn.functional.cross_entropy(model(images), labels)
            if weight and step % EVERY_N_STEPS == 0:  # each n-th step, n times as strongly
                loss = loss + EVERY_N_STEPS * weight * penalty(model, images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1

        for images, _ in DataLoader(val, batch_size=180):
            metric.update(model, images)  # measures the deployed function; model.eval() is not needed
        lambdas.append(float(metric.compute()["mean"]))
        metric.reset()
        print(f"epoch {epoch}: mean λ {lambdas[-1]:.3g}")
    return lambdas


if __name__ == "__main__":
    main()
