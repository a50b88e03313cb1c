"""Measure the cost of the copy that an estimate runs instead of the user's module: ``python -m recipes.copy_cost``.

In each round a network of torchvision is copied and its default estimate is taken, one after the other. ``share`` is
the median of the ratio of the two times. ``copied_mb`` is the size of the tensors that the copy does not share with the
network.

Writes ``copy_cost.csv`` and ``copy_cost.json`` (with versions and settings) to Hydra's run folder.

Takes about six minutes on two CPU cores.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from fisher_reg import deployed, fisher_spectral_norm
from recipes.reporting.files import settings_of, show, write
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device, environment
from recipes.runtime.progress import track
from recipes.runtime.timing import timed


@command("copy_cost")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    copy_cost(config)


def copy_cost(config: DictConfig) -> pd.DataFrame:
    """Measure every network, write the files, and return the rows of ``copy_cost.csv``."""
    folder, device = Path(config.output_dir), chosen_device(config.device)
    networks = track([*config.networks], "copies")
    rows = pd.DataFrame([measure(name, config.networks[name], config, device) for name in networks])
    result = {"environment": environment(device), "config": settings_of(config), "rows": rows.to_dict("records")}
    write(folder, "copy_cost", config, rows=rows, record=result)
    show(rows.to_string(index=False), folder)
    return rows


def measure(name: str, network: DictConfig, config: DictConfig, device: torch.device) -> dict[str, str | float]:
    """Return the row of one network, with its initial weights."""
    torch.manual_seed(config.seed)
    model: nn.Module = instantiate(network).to(device).eval()
    images = torch.rand(config.num_images, 3, config.image_size, config.image_size, device=device)
    copies, estimates = [], []
    for number in range(config.num_rounds + 1):
        copied, of_copy = timed(partial(deployed, model, images), device)
        _, of_estimate = timed(partial(fisher_spectral_norm, model, images), device)
        if number > 0:
            copies.append(of_copy)
            estimates.append(of_estimate)
    shares = pd.Series(copies) / pd.Series(estimates)
    return {
        "network": name,
        "num_images": config.num_images,
        "copy_ms": 1e3 * pd.Series(copies).median(),
        "estimate_seconds": pd.Series(estimates).median(),
        "share": shares.median(),
        "copied_mb": _own_bytes(copied, model) / 2**20,
        "model_mb": sum(map(_bytes, _tensors(model))) / 2**20,
    }


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _own_bytes(copied: nn.Module, model: nn.Module) -> int:
    shared = {tensor.data_ptr() for tensor in _tensors(model)}
    return sum(_bytes(tensor) for tensor in _tensors(copied) if tensor.data_ptr() not in shared)


if __name__ == "__main__":
    main()
