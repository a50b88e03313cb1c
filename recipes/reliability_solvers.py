"""Whether a result that counts as converged is right: on networks, and on models made to mislead a solver."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisher_reg import (
    Bernoulli,
    Categorical,
    EigenResult,
    Exact,
    Gaussian,
    Lanczos,
    PowerIteration,
    fisher_spectral_norm,
)
from recipes import models
from recipes.array_sources import Digits
from recipes.data import ImageData

Example = tuple[Callable[[Tensor], Tensor], Tensor, dict[str, Any]]
SOLVERS = {"default": None, "PowerIteration": PowerIteration(), "exact derivatives": Lanczos(is_exact=True)}
_WRONG = 0.05
_NUM_STEPS = 200


def network_rows(num_images: int, seed: int) -> list[dict[str, Any]]:
    """Measure 24 networks: four families, each untrained, trained, and trained with logits eight times as large.

    Args:
        num_images: Test images of the digits.
        seed: Of the weights; each network comes with it and with the next one.

    Returns:
        A row per solver.
    """
    data = Digits()
    data.setup()
    images = data.splits["test"].tensors[0][:num_images]
    networks = [network for first in (seed, seed + 1) for network in _networks(data, first)]
    examples: list[Example] = [(network, images, {}) for network in networks]
    return [_row(f"{len(networks)} networks", name, examples) for name in SOLVERS]


def model_rows(num_models: int, seed: int) -> list[dict[str, Any]]:
    """Measure random linear models of each likelihood, decoupled classes, and multi-label heads.

    Args:
        num_models: Linear models per likelihood.
        seed: Of the weights.

    Returns:
        A row per kind and solver.
    """
    kinds: dict[str, list[Example]] = {
        f"linear, {type(likelihood).__name__}": list(_linear(num_models, seed, likelihood))
        for likelihood in (Categorical(), Bernoulli(), Gaussian())
    }
    kinds["decoupled classes"] = list(_decoupled())
    kinds["multi-label heads"] = list(_multi_label(num_models // 10, seed))
    return [_row(kind, name, examples) for kind, examples in kinds.items() for name in ("default", "PowerIteration")]


def _row(kind: str, solver: str, examples: list[Example]) -> dict[str, Any]:
    """Compare with the exact eigenvalue in double precision."""
    errors, converged, steps, matvecs = [], [], [], []
    for function, x, options in examples:
        result = fisher_spectral_norm(function, x, solver=SOLVERS[solver], **options)
        precise = function.double() if isinstance(function, nn.Module) else function
        exact = fisher_spectral_norm(precise, x.double(), solver=Exact(), **options).eigenvalue
        if isinstance(function, nn.Module):
            function.float()
        errors.append(1 - result.eigenvalue.double() / exact)
        converged.append(result.converged)
        steps.append(_passes(result))
        matvecs.append(result.num_matvecs)
    error, is_converged = torch.cat(errors), torch.cat(converged)
    return {
        "models": kind,
        "solver": solver,
        "examples": len(error),
        "converged": float(is_converged.double().mean()),
        "more than 5 % off": int((error > _WRONG).sum()),
        "of these converged": int((is_converged & (error > _WRONG)).sum()),
        "error, median": float(error.quantile(0.5)),
        "error, 95 %": float(error.quantile(0.95)),
        "error, largest converged": float(error[is_converged].amax()),
        "backward passes": float(torch.cat(steps).mean()),
        "all passes of a batch": sum(matvecs) / len(matvecs),
    }


def _passes(result: EigenResult) -> Tensor:
    """Backward passes of each example: one for the start and one per step."""
    return 1 + result.num_steps.double()


def _networks(data: ImageData, seed: int) -> Iterator[nn.Module]:
    torch.manual_seed(seed)
    families = (
        models.vgg(data.spec, [12, "M", 24, "M"]),
        models.resnet(data.spec, [1, 1, 0, 0], stem_stride=2),
        models.densenet(data.spec, 8, (2, 2), 12, stem_stride=2),
        models.vit(data.spec, 4, 2, 2, 32, 64),
    )
    for network in families:
        yield _copied(network)
        _train(network, data)
        yield _copied(network)
        yield nn.Sequential(network.eval(), _Scaled(8.0))


class _Scaled(nn.Module):
    """Logits that are larger: more confident predictions."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return self.factor * logits


def _copied(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval()


def _train(network: nn.Module, data: ImageData) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    network.train()
    step = 0
    while step < _NUM_STEPS:
        for images, labels in data.train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            step += 1


def _linear(count: int, seed: int, likelihood: Any) -> Iterator[Example]:
    """Rows of different lengths, logits of different size, more and fewer inputs than classes."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        num_classes = (7, 10, 20, 50, 100, 200)[number % 6]
        num_inputs = (5, 20, 100, 300)[number // 6 % 4]
        spread, scale = (0.0, 1.0, 2.0)[number // 24 % 3], (0.1, 1.0, 5.0)[number // 72 % 3]
        lengths = (spread * torch.randn(num_classes, 1, generator=generator)).exp()
        weight = torch.randn(num_classes, num_inputs, generator=generator) * lengths
        bias = scale * torch.randn(num_classes, generator=generator)
        yield _affine(weight, bias), torch.zeros(1, num_inputs), {"likelihood": likelihood}


def _decoupled() -> Iterator[Example]:
    """One input per class, one of them with a larger weight, at any rank of the probabilities."""
    for num_classes in (10, 30, 100, 300, 1000):
        for slope in (1e-3, 1e-2, 0.1, 1.0):
            for weight in (2.0, 6.0, 20.0):
                for rank in sorted({1, 2, 3, 5, num_classes // 4, num_classes // 2, num_classes - 1}):
                    diagonal = torch.ones(num_classes)
                    diagonal[rank] = weight
                    bias = -slope * torch.arange(num_classes)
                    yield _diagonal(diagonal, bias), torch.zeros(1, num_classes), {}


def _multi_label(count: int, seed: int) -> Iterator[Example]:
    """Many rare labels, a few common ones, and groups that go together."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        num_labels = (20, 80, 300)[number % 3]
        groups = torch.randn(1 + num_labels // 10, 64, generator=generator)
        member = torch.randint(len(groups), (num_labels,), generator=generator)
        weight = groups[member] + 0.3 * torch.randn(num_labels, 64, generator=generator)
        bias = -4 + 3 * torch.randn(num_labels, generator=generator)
        yield _affine(weight, bias), torch.randn(1, 64, generator=generator) / 8, {"likelihood": Bernoulli()}


def _affine(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ weight.to(x).T + bias.to(x)


def _diagonal(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * weight.to(x) + bias.to(x)
