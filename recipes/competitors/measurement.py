"""The metrics of a classifier at each image: λ, the baselines, the bounds.

Every function uses only pixels in [0, 1] and the network: no attack and, except for the input gradient, no label.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_reg import (
    BlackBoxMax,
    Exact,
    HutchinsonMax,
    MarginTempered,
    NoBoundError,
    blackbox_spectral_norm,
    blockwise_fisher_bound,
    deployed,
    fisher_bound,
    fisher_spectral_norm,
    fisher_trace,
)
from recipes.competitors.clever import Clever
from recipes.competitors.measures import (
    input_gradient_norm,
    linearised_distance,
    local_lipschitz,
    margin,
    product_bound,
)

SATURATED = 0.999
"""Confidence above which p (1 - p), and therefore λ, is small for every Jacobian."""
_CHUNK = 100
_MAX_PIXELS = 2**22  # of the images whose activations and derivatives are in memory at once
_CONFIDENT = 8.0
_MAX_EXACT = 64  # largest number of classes for an exact trace


@dataclass(frozen=True)
class Metric:
    """A number per image that may predict how easily the network is attacked at this image.

    Attributes:
        title: Title in tables and figures.
        unit: Unit of the number.
        sign: 1 if a larger value should mean easier to attack, -1 if harder.
    """

    title: str
    unit: str
    sign: int


METRICS = {
    "lambda": Metric("λ_max of F", "nats / pixel²", 1),
    "lambda_blackbox": Metric("λ_max, 200 queries", "nats / pixel²", 1),
    "trace": Metric("tr F", "nats / pixel²", 1),
    "lambda_tempered": Metric("λ_max at equal margins", "nats / pixel²", 1),
    "lambda_confident": Metric("λ_max, logits x 8", "nats / pixel²", 1),
    "paper_white_box": Metric("paper, white box", "nats / pixel²", 1),
    "paper_black_box": Metric("paper, black box", "nats / pixel²", 1),
    "local_lipschitz": Metric("local Lipschitz (softmax)", "1 / pixel", 1),
    "input_gradient": Metric("input gradient of the loss", "nats / pixel", 1),
    "margin": Metric("margin of the logits", "nats", -1),
    "linearised_distance": Metric("linearised distance", "pixel", -1),
    "clever": Metric("CLEVER", "pixel", -1),
    "log10_blockwise": Metric("blockwise bound (log₁₀)", "log₁₀ (nats / pixel²)", 1),
    "log10_local": Metric("local bound (log₁₀)", "log₁₀ (nats / pixel²)", 1),
    "log10_global": Metric("global bound (log₁₀)", "log₁₀ (nats / pixel²)", 1),
}
"""In the order of the tables."""


@dataclass(frozen=True)
class Effort:
    """The numbers of images for the slow metrics, from the first image on; the others get NaN.

    Attributes:
        clever: The CLEVER score.
        num_clever: Number of images with a CLEVER score.
        num_blockwise: Number of images with a blockwise bound.

    Raises:
        ValueError: For fewer than one image.
    """

    clever: Clever
    num_clever: int = 32
    num_blockwise: int = 16

    def __post_init__(self) -> None:
        for name in ("num_clever", "num_blockwise"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


@dataclass(frozen=True)
class Measurement:
    """Numbers per image ``(B,)`` by their name in :data:`METRICS`, and their costs.

    Attributes:
        values: In double precision; NaN if an image was not measured.
        extra: Other numbers per image: probabilities, standard errors, the predicted class.
        seconds: Wall-clock time of each metric.
        missing: Why a metric could not be computed for this network.
    """

    values: dict[str, Tensor]
    extra: dict[str, Tensor]
    seconds: dict[str, float]
    missing: dict[str, str]

    def lists(self) -> dict[str, Any]:
        """Return everything as plain values."""
        numbers = {name: value.tolist() for name, value in (self.values | self.extra).items()}
        return numbers | {"seconds": self.seconds, "missing": self.missing}


def measure(network: nn.Module, images: Tensor, labels: Tensor, effort: Effort) -> Measurement:
    """Measure a network at images ``(B, C, H, W)`` in [0, 1] with labels ``(B,)``."""
    logits = predict(network, images)
    probabilities = logits.softmax(1)
    exact = Exact() if logits.shape[1] <= _MAX_EXACT else None
    size = max(1, _MAX_PIXELS // images[0].numel())

    def in_parts(compute: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.cat([compute(part) for part in images.split(size)])

    metrics: dict[str, Callable[[], Tensor]] = {
        "lambda": in_parts(lambda x: fisher_spectral_norm(network, x).eigenvalue),
        "trace": in_parts(lambda x: fisher_trace(network, x, estimator=exact)),
        "lambda_tempered": in_parts(lambda x: fisher_spectral_norm(network, x, likelihood=MarginTempered()).eigenvalue),
        "lambda_confident": in_parts(lambda x: fisher_spectral_norm(_Confident(network), x).eigenvalue),
        "paper_white_box": in_parts(lambda x: fisher_spectral_norm(network, x, solver=HutchinsonMax()).eigenvalue),
        "paper_black_box": lambda: _black_box(network, images, BlackBoxMax()).eigenvalue,
        "local_lipschitz": lambda: local_lipschitz(network, images),
        "input_gradient": lambda: input_gradient_norm(network, images, labels),
        "margin": lambda: margin(logits),
        "linearised_distance": lambda: linearised_distance(network, images),
        "clever": lambda: effort.clever(network, images[: effort.num_clever]),
        "log10_blockwise": lambda: blockwise_fisher_bound(network, images[: effort.num_blockwise]).log10_value,
        "log10_local": in_parts(lambda x: product_bound(network, x).log10_value),
        "log10_global": lambda: torch.tensor(fisher_bound(network, images).log10_value).expand(len(images)),
    }
    begin = time.perf_counter()
    black_box = _black_box(network, images, None)
    values = {"lambda_blackbox": _padded(black_box.eigenvalue, len(images))}
    seconds = {"lambda_blackbox": time.perf_counter() - begin}
    missing = {}
    for name, compute in metrics.items():
        begin = time.perf_counter()
        try:
            values[name] = _padded(compute(), len(images))
        except NoBoundError as error:
            values[name] = _padded(logits.new_empty(0), len(images))
            missing[name] = str(error)
        seconds[name] = time.perf_counter() - begin
    ranked = probabilities.topk(2, dim=1).values.double().cpu()
    extra = {
        "predicted": logits.argmax(1).cpu(),
        "correct": (logits.argmax(1) == labels).cpu(),
        "confidence": ranked[:, 0],
        "blackbox_error": black_box.standard_error.double().cpu(),
    }
    return Measurement({name: values[name] for name in METRICS}, extra, seconds, missing)


@torch.no_grad()
def predict(network: nn.Module, images: Tensor) -> Tensor:
    """Return the logits ``(B, K)`` of the deployed function."""
    function = deployed(network, images)
    return torch.cat([function(part) for part in images.split(_CHUNK)])


class _Confident(nn.Module):
    """A network with larger logits: the same predictions and the same distances to the decision boundaries."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = _CONFIDENT * self.network(images)
        return result


def _black_box(network: nn.Module, images: Tensor, estimator: BlackBoxMax | None) -> Any:
    return blackbox_spectral_norm(lambda x: predict(network, x).softmax(1), images, estimator=estimator)


def _padded(values: Tensor, count: int) -> Tensor:
    """Return ``values`` in double precision, followed by NaN up to ``count``."""
    filled = torch.full((count,), math.nan, dtype=torch.float64)
    filled[: len(values)] = values.double().cpu()
    return filled
