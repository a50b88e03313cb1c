"""Reliability of the estimate by queries: five trained networks, and services with a fault.

:func:`rows` compares :func:`fisher_reg.blackbox_spectral_norm` with the exact eigenvalue at images of handwritten
digits, whose backgrounds are flat. A network predicts in float32; its exact eigenvalue is computed in float64. For a
service with a fault the estimate should be the eigenvalue of its network, or NaN.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn

from fisher_reg import BlackBoxResult, Exact, blackbox_spectral_norm, fisher_spectral_norm

Answer = Callable[[Tensor], Tensor]
_NUM_TRAINING = 1200
_NUM_STEPS = 300
_SIDE = 16
_NUM_CLASSES = 10


class Attention(nn.Module):
    """A small vision transformer: patches of 4 x 4 pixels, one block of self-attention, GELU."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.place = nn.Parameter(0.02 * torch.randn((_SIDE // 4) ** 2, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(width, _NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, 10)`` of images ``(B, 1, 16, 16)``."""
        tokens = self.patches(images).flatten(2).mT + self.place
        result: Tensor = self.head(self.block(tokens).mean(1))
        return result


def _perceptron(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(_SIDE**2, 64), activation(), nn.Linear(64, _NUM_CLASSES))


def _convolutional(activation: type[nn.Module], pooling: type[nn.Module]) -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), activation(), pooling(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), activation(), pooling(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * (_SIDE // 4) ** 2, _NUM_CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "CNN, ReLU, max pooling": lambda: _convolutional(nn.ReLU, nn.MaxPool2d),
    "MLP, ReLU": lambda: _perceptron(nn.ReLU),
    "CNN, GELU, average pooling": lambda: _convolutional(nn.GELU, nn.AvgPool2d),
    "attention": Attention,
    "MLP, tanh": lambda: _perceptron(nn.Tanh),
}


@dataclass(frozen=True)
class Service:
    """A service that wraps a network.

    Attributes:
        before: Function applied to the inputs.
        after: Function applied to the probabilities.
        bounds: The bounds of the inputs that the user passes.
    """

    before: Answer = lambda images: images
    after: Answer = lambda probabilities: probabilities
    bounds: tuple[float, float] | None = None


def _rounded(digits: int) -> Answer:
    return lambda p: (p * 10**digits).round() / 10**digits


SERVICES = {
    "bounds are kept": Service(bounds=(0, 1)),
    "clips the inputs": Service(before=lambda x: x.clamp(0, 1)),
    "clips the inputs, with bounds": Service(before=lambda x: x.clamp(0, 1), bounds=(0, 1)),
    "8-bit inputs": Service(before=lambda x: (x * 255).round().clamp(0, 255) / 255),
    "8-bit inputs, with bounds": Service(before=lambda x: (x * 255).round().clamp(0, 255) / 255, bounds=(0, 1)),
    **{f"{digits} digits": Service(after=_rounded(digits)) for digits in (3, 4, 5, 6)},
    "float16 answers": Service(after=lambda p: p.half().to(p)),
    "bfloat16 answers": Service(after=lambda p: p.bfloat16().to(p)),
    "labels": Service(after=lambda p: nn.functional.one_hot(p.argmax(1), _NUM_CLASSES).to(p)),
    "constant": Service(after=lambda p: torch.full_like(p, 1 / _NUM_CLASSES)),
}


def rows(seed: int = 0, num_images: int = 100) -> list[dict[str, Any]]:
    """Train the networks and return a row for each, and for each service in front of the first and the last of them.

    Args:
        seed: Seed of the networks and of the directions.
        num_images: Number of images per network.

    Returns:
        Rows with ``network``, ``service``, ``num_images``, ``median_ratio`` to the exact eigenvalue, ``coverage`` of
        two standard errors among the numbers, and ``nan_share``. The forest has no exact value, since it is a step
        function, and every number is wrong.
    """
    images, labels = _digits()
    shown = images[_NUM_TRAINING : _NUM_TRAINING + num_images]
    found = []
    for name, build in NETWORKS.items():
        network = _trained(build, images[:_NUM_TRAINING], labels[:_NUM_TRAINING], seed)
        exact = fisher_spectral_norm(copy.deepcopy(network).double(), shown.double(), solver=Exact()).eigenvalue
        services = {"none": Service()}
        if name in (next(iter(NETWORKS)), next(reversed(NETWORKS))):
            services |= SERVICES
        for fault, service in services.items():
            result = _asked(_through(service, network), shown, service.bounds, seed)
            found.append({"network": name, "service": fault} | _summary(result, exact))
    forest = RandomForestClassifier(50, random_state=seed).fit(
        images[:_NUM_TRAINING].flatten(1), labels[:_NUM_TRAINING]
    )
    result = _asked(lambda x: torch.from_numpy(forest.predict_proba(x.flatten(1).numpy())), shown, None, seed)
    return [*found, {"network": "forest", "service": "none"} | _summary(result, torch.full((num_images,), torch.nan))]


def _digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return nn.functional.interpolate(images, scale_factor=_SIDE // 8), torch.tensor(data.target)


def _trained(build: Callable[[], nn.Module], images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
        optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
        for _ in range(_NUM_STEPS):
            batch = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network.eval()


def _through(service: Service, network: nn.Module) -> Answer:
    return lambda x: service.after(network(service.before(x)).softmax(1))


def _asked(predict: Answer, images: Tensor, bounds: tuple[float, float] | None, seed: int) -> BlackBoxResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rows count what the warning counts
        return blackbox_spectral_norm(predict, images, bounds=bounds, generator=torch.Generator().manual_seed(seed))


def _summary(result: BlackBoxResult, exact: Tensor) -> dict[str, Any]:
    stands = ~result.eigenvalue.isnan()
    error = (result.eigenvalue - exact)[stands].abs()
    covered = (error <= 2 * result.standard_error[stands]).double()
    return {
        "num_images": len(exact),
        "median_ratio": float((result.eigenvalue / exact)[stands].nanmedian()),
        "coverage": float(covered.mean()),
        "nan_share": float((~stands).double().mean()),
    }
