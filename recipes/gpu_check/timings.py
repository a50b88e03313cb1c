"""Run times on a device, as ratios of times measured alternately: a part of ``recipes.gpu_check``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from fisher_reg import (
    Categorical,
    InputFisher,
    Lanczos,
    fisher_linf_norm,
    fisher_spectral_norm,
    fisher_spectral_norm_and_trace,
)
from fisher_reg.evaluation import WithSideInputs, deployed, differentiable, in_fast_layout, strictly
from fisher_reg.measurement import measure
from recipes.competitors.estimators import paper_white_box
from recipes.penalty_cost import fit, mean_of_medians, step_seconds
from recipes.runtime.timing import peak_memory, timed

Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """A call and its number of images."""

    name: str
    call: Call
    num_images: int


def forward(network: nn.Module, images: Tensor) -> None:
    """Run the network without a graph."""
    with torch.no_grad():
        network(images)


def strict_forward(network: nn.Module, images: Tensor) -> None:
    """Run the network in strict float32, as in an estimate, to measure its cost."""
    with strictly(images.device):
        forward(network, images)


def by_dual_numbers(network: nn.Module, images: Tensor) -> Tensor:
    """Return eigenvalues without difference quotients, in the precision set in torch (TensorFloat-32)."""
    with differentiable(images) as inputs:
        function = in_fast_layout(WithSideInputs(deployed(network, inputs), None, len(inputs)), inputs)
        fisher = InputFisher(function, inputs, Categorical(), quotients=False)
        return Lanczos().solve(fisher, None).eigenvalue


def of_estimates(network: nn.Module, images: Tensor) -> list[Timed]:
    """Return the estimates of a batch."""
    estimate = partial(fisher_spectral_norm, network, images, solver=Lanczos())
    calls: dict[str, Call] = {
        "forward (strict float32)": partial(strict_forward, network, images),
        "estimate (strict float32)": estimate,
        "estimate by dual numbers, as torch is set": partial(by_dual_numbers, network, images),
        "estimate and trace": partial(fisher_spectral_norm_and_trace, network, images),
        "measurement of the monitor": partial(measure, network, images),
        "linf": partial(fisher_linf_norm, network, images),
    }
    return [Timed(name, call, len(images)) for name, call in calls.items()]


def of_the_paper(network: nn.Module, images: Tensor, num_images: int) -> list[Timed]:
    """Return the algorithm of the paper on few images, one at a time, and the estimate of the batch."""
    few = images[:num_images]
    return [
        Timed("paper, white box", partial(paper_white_box, network, few), len(few)),
        Timed("estimate (strict float32)", partial(fisher_spectral_norm, network, images), len(images)),
    ]


def alternately(
    some: list[Timed], network: nn.Module, images: Tensor, device: torch.device, num_rounds: int, max_seconds: float
) -> list[dict[str, Any]]:
    """Time each call directly after a forward of the whole batch, round after round; the first round is a warm-up.

    Returns:
        A row per call: ``forwards`` is the median over the rounds of the time per image in forwards per image. On a
        GPU, of calls that take no longer than ``_QUICK``, also the peak of memory and the synchronisations.
    """
    times: dict[str, list[tuple[float, float]]] = {one.name: [] for one in some}
    begin = time.perf_counter()
    for number in range(num_rounds + 1):
        for one in some:
            if number > 1 and time.perf_counter() - begin > max_seconds:
                continue
            _, of_forward = timed(partial(forward, network, images), device)
            _, of_call = timed(one.call, device)
            if number > 0:
                times[one.name].append((of_forward, of_call))
    return [_row(one, times[one.name], len(images), device) for one in some]


_QUICK = 3.0  # seconds


def _row(one: Timed, times: list[tuple[float, float]], num_images: int, device: torch.device) -> dict[str, Any]:
    seconds = median(of_call for _, of_call in times)
    ratio = median(of_call / one.num_images / (of_forward / num_images) for of_forward, of_call in times)
    row: dict[str, Any] = {
        "what": one.name,
        "forwards": ratio,
        "images_per_second": one.num_images / seconds,
        "seconds": seconds,
        "num_rounds": len(times),
    }
    if device.type == "cuda" and seconds < _QUICK:
        row |= {"peak_memory_mb": peak_memory(one.call, device) / 2**20, "synchronisations": synchronisations(one.call)}
    return row


def synchronisations(call: Call) -> int:
    """Return the number of synchronisations with the GPU in a call, as counted by torch."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)


def of_steps(config: DictConfig, network: nn.Module, batch: list[Tensor], max_seconds: float) -> list[dict[str, Any]]:
    """Time training steps with each method of ``config``, which is as in ``recipes.penalty_cost``.

    Returns:
        A row per method: ``steps`` is its time in steps of the first method.
    """
    seconds = step_seconds(config, _NUM_CLASSES, network, batch, config.num_step_rounds, max_seconds=max_seconds)
    times = {name: mean_of_medians(rounds, config.methods[name].cycle) for name, rounds in seconds.items()}
    plain = times[next(iter(config.methods))]
    return [
        {
            "what": name,
            "steps": times[name] / plain,
            "images_per_second": len(batch[0]) / times[name],
            "seconds": times[name],
            "num_rounds": len(seconds[name]),
            **_memory_of_a_step(config, network, name, batch),
        }
        for name in config.methods
    ]


_NUM_CLASSES = 10


def _memory_of_a_step(config: DictConfig, network: nn.Module, name: str, batch: list[Tensor]) -> dict[str, float]:
    device = batch[0].device
    if device.type != "cuda" or hasattr(network, "_orig_mod"):  # otherwise it would be compiled again
        return {}
    step = partial(fit, config, _NUM_CLASSES, network, config.methods[name].callback, batch, 1, [])
    return {"peak_memory_mb": peak_memory(step, device) / 2**20}


def built(network: DictConfig, **options: Any) -> nn.Module:
    """Build a network of the configuration with random weights."""
    torch.manual_seed(0)
    model: nn.Module = instantiate(network, **options)
    return model
