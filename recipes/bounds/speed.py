"""Run time of the bounds of large networks, and of norms of single convolutions, compared with other packages.

All weights are random: the times are typical, but the values differ from those of trained networks.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from rich.console import Console
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from fisher_reg import fisher_bound
from fisher_reg.bounds.operator_norms import Geometry, conv_norm
from recipes.competitors.measures import product_bound
from recipes.runtime.cache import Settings
from recipes.runtime.environment import chosen_device, installed
from recipes.runtime.settings import merged
from recipes.runtime.timing import timed

LEVELS: dict[str, Callable[..., Any]] = {"global": fisher_bound, "local": product_bound}
PEER = "orthogonium"


@dataclass(frozen=True)
class Norm:
    """A method for the operator norm of a convolution.

    Attributes:
        name: Name in tables.
        source: Its package.
        compute: Maps the layer, the image size and the number of Gram iterations to the value.
    """

    name: str
    source: str
    compute: Callable[[nn.Conv2d, int, int], float]


def _ours(conv: nn.Conv2d, size: int, num_iterations: int, dense: bool) -> float:
    return float(conv_norm(conv.weight.detach(), Geometry.of(conv, (size, size)), dense=dense))


def _flattened(conv: nn.Conv2d, size: int, num_iterations: int) -> float:
    """The norm of the flattened kernel, to which torch's ``spectral_norm`` converges; it is not a bound."""
    return float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2))


@torch.no_grad()
def _orthogonium(conv: nn.Conv2d, size: int, num_iterations: int) -> float:
    """The Gram iteration of Delattre et al. (arXiv 2402.00240) for zero padding, which ignores the stride."""
    from orthogonium.layers.conv.singular_values import get_conv_sv

    # the package multiplies the values of groups; the norm is the largest of them
    return max(map(float, get_conv_sv(conv, num_iterations, agg_groups=False, return_stab_rank=False)))


NORMS = (
    Norm("conv_norm", "fisher-reg", partial(_ours, dense=True)),
    Norm("conv_norm, dense=False", "fisher-reg", partial(_ours, dense=False)),
    Norm("flattened kernel (no bound)", "torch", _flattened),
    Norm(PEER, PEER, _orthogonium),
)


def available_norms() -> list[Norm]:
    """Return the methods whose package is installed, and print the missing ones."""
    missing = sorted({norm.source for norm in NORMS if installed(norm.source) is None})
    if missing:
        Console().print(f"Not installed, left out: {', '.join(missing)}")
    return [norm for norm in NORMS if norm.source not in missing]


def time_convolution(settings: Settings, _: Path) -> dict[str, pd.DataFrame]:
    """Measure the norm of ``settings["piece"]``, one of ``convolutions``, with every method, after a warm-up call.

    Returns:
        Rows of ``convolutions``, one per method; ``excess`` is relative to :func:`reference_norm`.
    """
    config, case = merged(settings["config"]), merged(settings["piece"])
    device = chosen_device(config.device)
    torch.manual_seed(config.seed)
    conv = instantiate(case.conv).to(device)
    reference, kind = reference_norm(conv, case.size, config.max_dense_side)
    num_iterations = case.get("gram_iterations", config.gram_iterations)
    rows = []
    for norm in (norm for norm in NORMS if installed(norm.source)):
        call = partial(norm.compute, conv, case.size, num_iterations)
        call()
        value, seconds = timed(call, device, config.num_rounds)
        rows.append(
            {
                "convolution": case.name,
                "size": case.size,
                "method": norm.name,
                "source": norm.source,
                "gram_iterations": num_iterations if norm.source == PEER else None,
                "value": value,
                "reference": reference,
                "reference_kind": kind,
                "excess": value / reference - 1,
                "milliseconds": 1000 * seconds,
            }
        )
    return {"convolutions": pd.DataFrame(rows)}


def reference_norm(conv: nn.Conv2d, size: int, max_dense_side: int) -> tuple[float, str]:
    """Return the operator norm of a convolution without bias on square images, and its method.

    Returns:
        The norm of the dense matrix if both sides are at most ``max_dense_side`` (``"exact"``), otherwise that of a
        converged Lanczos iteration, a lower bound (``"from below"``).
    """
    conv = deepcopy(conv).cpu().double().requires_grad_(False)
    shape = (conv.in_channels, size, size)
    num_inputs = conv.in_channels * size**2
    if max(num_inputs, conv(torch.zeros(1, *shape, dtype=torch.float64)).numel()) <= max_dense_side:
        basis = torch.eye(num_inputs, dtype=torch.float64).view(-1, *shape)
        rows = torch.cat([conv(part).flatten(1) for part in basis.split(256)])
        return float(torch.linalg.eigvalsh(rows @ rows.T)[-1].sqrt()), "exact"

    def gram(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        pulled: Any = torch.func.vjp(conv, torch.from_numpy(vector).view(1, *shape))
        outputs, pull = pulled  # their types allow for a third part
        gradient: Tensor = pull(outputs)[0]
        return gradient.flatten().numpy()

    operator = LinearOperator((num_inputs, num_inputs), matvec=gram, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(num_inputs)
    (square,) = eigsh(operator, k=1, tol=1e-8, v0=start, return_eigenvectors=False)
    return float(square) ** 0.5, "from below"


def time_network(settings: Settings, _: Path) -> dict[str, pd.DataFrame]:
    """Bound ``settings["piece"]``, one of ``speed_models``, at one random image.

    Returns:
        Rows of ``networks``, one per level; ``layers`` is the table of the shares of the layers.
    """
    config, part = merged(settings["config"]), settings["piece"]
    device = chosen_device(config.device)
    torch.manual_seed(config.seed)
    network = without_zero_layers(instantiate(part)).to(device).eval()
    image = torch.rand(1, 3, config.speed_image_size, config.speed_image_size, device=device)
    rows = []
    for level, bound in LEVELS.items():
        found, seconds = timed(partial(bound, network, image), device, config.num_rounds)
        rows.append(
            {
                "network": part["_target_"].rpartition(".")[2],
                "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
                "level": level,
                "log10_bound": float(torch.as_tensor(found.log10_value)),
                "seconds": seconds,
                "num_rounds": config.num_rounds,
                "layers": str(found),
            }
        )
    return {"networks": pd.DataFrame(rows)}


def without_zero_layers(network: nn.Module) -> nn.Module:
    """Draw linear layers that are initialised with zero, like the head of torchvision's transformers."""
    for module in network.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            module.reset_parameters()
    return network
