"""Comparison of all numbers of a device with those of the CPU: a part of ``recipes.gpu_check``.

Both sides use the same weights, images and random numbers, which are drawn on the CPU. ``difference`` is the largest
difference over the examples, relative to the value of the CPU (for logarithms of bounds: of the bounds).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_reg import (
    BoundPenalty,
    Exact,
    FisherMonitor,
    FisherRegularizer,
    FisherSpectralNorm,
    GradientNormPenalty,
    KLPenalty,
    LabelContrastPenalty,
    Lanczos,
    LInf,
    NoBoundError,
    NuclearNormPenalty,
    SpectralPenalty,
    TracePenalty,
    fisher_bound,
    fisher_eigenpairs,
    fisher_kl_ratio,
    fisher_linf_norm,
    fisher_spectral_norm,
    fisher_trace,
    local_fisher_bound,
)
from fisher_reg.evaluation import strictly
from fisher_reg.penalty import Penalty
from recipes.data.spec import ImageSpec
from recipes.models.classifier import Classifier
from recipes.models.zoo import Normalize

CPU = torch.device("cpu")
Question = Callable[[nn.Module, Tensor, Tensor], Tensor]

EXACT = 1e-3  # round-off of float32 in a deep network: other kernels, other order of summation
ITERATED = 2e-2  # the tolerance of the default solver is 1 % on each device
FINITE_STEP = 1e-2  # differences of logits over a step, and gradients of gradients


@dataclass(frozen=True)
class Number:
    """One number to compare.

    Attributes:
        name: Name in tables.
        ask: Maps a network, images and labels on one device to the number, of any shape.
        tolerance: Largest relative difference; None if it is only shown.
    """

    name: str
    ask: Question
    tolerance: float | None


class RowsClassifier(nn.Module):
    """An LSTM that reads images row by row."""

    def __init__(self, spec: ImageSpec, hidden_dim: int) -> None:
        super().__init__()
        self.normalize = Normalize(spec.mean, spec.std)
        self.layer = nn.LSTM(spec.num_channels * spec.image_size, hidden_dim, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden_dim, spec.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        rows = self.normalize(images).transpose(1, 2).flatten(2)
        result: Tensor = self.head(self.layer(rows)[0].mean(1))
        return result


def drawn() -> torch.Generator:
    """Return a generator on the CPU, for the same random numbers on every device."""
    return torch.Generator().manual_seed(0)


def _largest(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return fisher_spectral_norm(network, images, solver=Lanczos(), generator=drawn()).eigenvalue


def _pairs(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return fisher_eigenpairs(network, images, 3, solver=Exact()).eigenvalue


def _metric(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    metric = FisherSpectralNorm(solver=Exact()).to(images.device)
    metric.update(network, images)
    result: Tensor = metric.compute()
    return result


def _global_bound(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return torch.as_tensor(fisher_bound(network, images).log10_value)


def _local_bound(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return torch.as_tensor(local_fisher_bound(network, images).log10_value)


def _as_values(ask: Question, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return torch.pow(10.0, ask(network, images, labels).double())


def _penalised(
    penalty: Penalty, is_strict: bool, wants_gradient: bool, network: nn.Module, images: Tensor, labels: Tensor
) -> Tensor:
    options: dict[str, Any] = {"labels": labels} if getattr(penalty, "needs_labels", False) else {}
    network = copy.deepcopy(network).train()
    if is_strict:
        with strictly(images.device):
            return _value_or_slope(penalty(network, images, generator=drawn(), **options), network, wants_gradient)
    return _value_or_slope(penalty(network, images, generator=drawn(), **options), network, wants_gradient)


def _value_or_slope(value: Tensor, network: nn.Module, wants_gradient: bool) -> Tensor:
    if not wants_gradient:
        return value.detach()
    slopes = torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
    return torch.stack([slope.double().square().sum() for slope in slopes if slope is not None]).sum().sqrt()


PENALTIES: tuple[Penalty, ...] = (
    KLPenalty(),
    SpectralPenalty(),
    TracePenalty(),
    LabelContrastPenalty(),
    GradientNormPenalty(),
    NuclearNormPenalty(bounds=None),
    BoundPenalty(),
)


def numbers() -> Iterator[Number]:
    """Yield all numbers that are compared on each network."""
    yield Number("eigenvalue, default solver", _largest, ITERATED)
    yield Number("eigenvalue, Exact", lambda *given: _pairs(*given)[:, 0], EXACT)
    yield Number("three eigenpairs", _pairs, EXACT)
    yield Number("trace", lambda network, images, _: fisher_trace(network, images, estimator=Exact()), EXACT)
    yield Number("kl_ratio", lambda network, images, _: fisher_kl_ratio(network, images, solver=Exact()), FINITE_STEP)
    yield Number("linf", lambda network, images, _: fisher_linf_norm(network, images, generator=drawn()).value, 5e-2)
    yield Number("metric", _metric, EXACT)
    yield Number("global bound", partial(_as_values, _global_bound), EXACT)
    yield Number("local bound", partial(_as_values, _local_bound), EXACT)
    for penalty in PENALTIES:
        name = type(penalty).__name__
        yield Number(name, partial(_penalised, penalty, True, False), FINITE_STEP)
        yield Number(f"{name}, gradient norm", partial(_penalised, penalty, True, True), FINITE_STEP)
        yield Number(f"{name}, gradient norm, as torch is set", partial(_penalised, penalty, False, True), None)


def reference(network: nn.Module, images: Tensor, labels: Tensor, some: list[Number]) -> dict[str, Tensor | str]:
    """Return the numbers of a network by name; where one raises, its error instead."""
    found: dict[str, Tensor | str] = {}
    for number in some:
        try:
            found[number.name] = number.ask(network, images, labels).detach().double().cpu()
        except NoBoundError:
            found[number.name] = "no bound"
        except Exception as error:  # a device may raise any error: continue with the other numbers
            found[number.name] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def difference(found: Tensor | str, expected: Tensor | str) -> float:
    """Return the largest relative difference; infinite where one side raises, or only one of them has a NaN."""
    if isinstance(found, str) or isinstance(expected, str):
        return 0.0 if found == expected == "no bound" else math.inf
    if found.shape != expected.shape or bool((found.isnan() != expected.isnan()).any()):
        return math.inf
    size = expected.abs().nan_to_num()
    smallest = max(1e-3 * float(size.max()), torch.finfo(torch.float32).tiny)  # avoids a division by zero
    return float(((found - expected).abs().nan_to_num() / size.clamp_min(smallest)).max())


def compared(
    some: list[Number], found: dict[str, Tensor | str], expected: dict[str, Tensor | str]
) -> list[dict[str, Any]]:
    """Return a row per number, with whether it passed (None without a tolerance)."""
    rows = []
    for number in some:
        apart = difference(found[number.name], expected[number.name])
        errors = [value for value in (found[number.name], expected[number.name]) if isinstance(value, str)]
        rows.append(
            {
                "number": number.name,
                "difference": apart,
                "tolerance": number.tolerance,
                "passed": None if number.tolerance is None else apart <= number.tolerance,
                "note": "; ".join(dict.fromkeys(errors)),
            }
        )
    return rows


def settled(network: nn.Module, images: Tensor) -> nn.Module:
    """Return the network, in evaluation mode, with running statistics of batch norm that fit the images."""
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(images)
    return network.eval()


def check_trainer(config: DictConfig, network: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> Any:
    """Train for a few steps on the device with regularizer and monitor.

    Returns:
        Rows: the last numbers of the monitor and those of the trained weights on the CPU.
    """
    module = Classifier(copy.deepcopy(network).train(), 10, partial(torch.optim.SGD, lr=1e-3))
    monitor = FisherMonitor(solver=Exact(), geometry=LInf(), detailed=True)
    loader = DataLoader(TensorDataset(images, labels), batch_size=len(images))
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=config.num_epochs,
        callbacks=[monitor, FisherRegularizer(every_n_steps=1)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    trainer.validate(module, loader, verbose=False)
    seen = {key: value.detach().double().cpu() for key, value in trainer.callback_metrics.items()}
    trained = module.network.to(CPU).eval()
    largest = fisher_spectral_norm(trained, images, solver=Exact()).eigenvalue.mean()
    expected = {
        "fisher/lambda_max_mean": largest,
        "fisher/trace_mean": fisher_trace(trained, images, estimator=Exact()).mean(),
        "fisher/log10_bound_global": torch.as_tensor(fisher_bound(trained, images).log10_value),
    }
    some = [Number(name, lambda *_: torch.zeros(()), FINITE_STEP) for name in expected]
    found = {name: seen.get(name, "not logged") for name in expected}
    return compared(some, found, {name: value.double() for name, value in expected.items()})
