"""Accuracy of converged results, on networks and on models constructed to mislead a solver."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
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
    Likelihood,
    PowerIteration,
    fisher_spectral_norm,
)
from recipes.data.base import ImageData
from recipes.data.sources import Digits
from recipes.models import zoo as models


@dataclass(frozen=True)
class Examples:
    """Inputs of one function, and the largest eigenvalues at these inputs.

    Attributes:
        function: From inputs and side inputs to logits.
        inputs: ``(B, *S)``.
        exact: ``(B,)``, in double precision.
        options: Options of the estimate.
    """

    function: Callable[..., Tensor]
    inputs: Tensor
    exact: Tensor
    options: dict[str, Any]


SOLVERS = {"default": None, "PowerIteration": PowerIteration(), "exact derivatives": Lanczos(is_exact=True)}
_WRONG = 0.05
_NUM_STEPS = 200


def network_rows(num_images: int, seed: int) -> list[dict[str, Any]]:
    """Measure 24 networks: four families, each untrained, trained, and trained with logits eight times as large.

    Args:
        num_images: Number of test images of the digits.
        seed: Seed of the weights; each network is built with this seed and the next one.

    Returns:
        A row per solver.
    """
    data = Digits()
    data.setup()
    images = torch.stack([data.splits["test"][index][0] for index in range(num_images)])
    examples = []
    for network in (network for first in (seed, seed + 1) for network in _networks(data, first)):
        exact = fisher_spectral_norm(network.double(), images.double(), solver=Exact()).eigenvalue
        examples.append(Examples(network.float(), images, exact, {}))
    return [_row(f"{len(examples)} networks", name, examples) for name in SOLVERS]


def model_rows(num_models: int, seed: int) -> list[dict[str, Any]]:
    """Measure random linear models of each likelihood, decoupled classes, and multi-label heads.

    Args:
        num_models: Number of linear models per likelihood.
        seed: Seed of the weights.

    Returns:
        A row per kind and solver.
    """
    kinds = {
        f"linear, {type(likelihood).__name__}": list(_linear(num_models, seed, likelihood))
        for likelihood in (Categorical(), Bernoulli(), Gaussian())
    }
    kinds["decoupled classes"] = list(_decoupled())
    kinds["multi-label heads"] = list(_multi_label(num_models // 10, seed))
    return [_row(kind, name, examples) for kind, examples in kinds.items() for name in ("default", "PowerIteration")]


def _row(kind: str, solver: str, examples: list[Examples]) -> dict[str, Any]:
    errors, converged, steps = [], [], []
    for some in examples:
        result = fisher_spectral_norm(some.function, some.inputs, solver=SOLVERS[solver], **some.options)
        value = result.eigenvalue.double()
        # a saturated network may have an eigenvalue of zero
        errors.append(torch.where(value == some.exact, 0.0, 1 - value / some.exact))
        converged.append(result.converged)
        steps.append(_passes(result))
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
    """Scaled logits, for more confident predictions."""

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


def _linear(count: int, seed: int, likelihood: Likelihood) -> Iterator[Examples]:
    """Linear models with rows of different norms, logits of different size, more and fewer inputs than classes."""
    generator = torch.Generator().manual_seed(seed)
    settings = list(product((7, 10, 20, 50, 100, 200), (5, 20, 100, 300), (0.0, 1.0, 2.0), (0.1, 1.0, 5.0)))
    for number, (num_classes, num_inputs, spread, scale) in enumerate(settings):
        size = len(range(number, count, len(settings)))
        if size:
            lengths = (spread * torch.randn(size, num_classes, 1, generator=generator)).exp()
            weight = torch.randn(size, num_classes, num_inputs, generator=generator) * lengths
            yield _affine(weight, scale * torch.randn(size, num_classes, generator=generator), likelihood)


def _decoupled() -> Iterator[Examples]:
    """One input per class; the class of the larger weight has any rank among the probabilities."""
    for num_classes, slope in product((10, 30, 100, 300, 1000), (1e-3, 1e-2, 0.1, 1.0)):
        ranks = sorted({1, 2, 3, 5, num_classes // 4, num_classes // 2, num_classes - 1})
        pairs = list(product((2.0, 6.0, 20.0), ranks))
        weight = torch.ones(len(pairs), num_classes)
        for row, (larger, rank) in zip(weight, pairs, strict=True):
            row[rank] = larger
        bias = -slope * torch.arange(num_classes).expand(len(pairs), -1)
        exact = [_largest(torch.diag(row), z, Categorical()) for row, z in zip(weight, bias, strict=True)]
        yield Examples(_times, torch.zeros_like(weight), torch.stack(exact), {"side_inputs": (weight, bias)})


def _multi_label(count: int, seed: int) -> Iterator[Examples]:
    """Many rare labels, a few common ones, and groups of correlated labels."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, count // 3)
    for num_labels in (20, 80, 300):
        groups = torch.randn(size, 1 + num_labels // 10, 64, generator=generator)
        member = torch.randint(groups.shape[1], (num_labels,), generator=generator)
        weight = groups[:, member] + 0.3 * torch.randn(size, num_labels, 64, generator=generator)
        yield _affine(weight, -4 + 3 * torch.randn(size, num_labels, generator=generator), Bernoulli())


def _affine(weight: Tensor, bias: Tensor, likelihood: Likelihood) -> Examples:
    """A separate linear model for each input; the inputs are zero."""
    exact = torch.stack([_largest(w, z, likelihood) for w, z in zip(weight, bias, strict=True)])
    options = {"side_inputs": (weight, bias), "likelihood": likelihood}
    return Examples(_matrix_times, torch.zeros(len(weight), weight.shape[2]), exact, options)


def _largest(jacobian: Tensor, logits: Tensor, likelihood: Likelihood) -> Tensor:
    """Largest eigenvalue of ``L J Jᵀ Lᵀ``, from the dense matrix."""
    columns = jacobian.double().T
    whitened = likelihood.whiten(logits.double().expand(len(columns), -1), columns)
    result: Tensor = torch.linalg.matrix_norm(whitened, 2).square()
    return result


def _matrix_times(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (weight @ x[:, :, None]).squeeze(2) + bias


def _times(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight * x + bias
