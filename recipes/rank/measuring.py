"""One network of ``recipes.rank``: trained, and measured with its three bounds."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fisher_reg import blockwise_fisher_bound, fisher_bound, fisher_spectral_norm, summarize
from recipes.competitors.measures import product_bound
from recipes.data.chosen import fixed_images, prepared_data
from recipes.models.training import share_correct, trained_network
from recipes.runtime.cache import Result, Settings
from recipes.runtime.environment import chosen_device

_ROUND_OFF = 1e-6  # rounding tolerance of a bound below the eigenvalue, in log10


def measure(settings: Settings, cache: Path) -> Result:
    """Train one network and measure it; the network is not stored."""
    config = OmegaConf.create(settings)
    begin = time.perf_counter()
    device = chosen_device(config.device)
    data = prepared_data(config)
    network = trained_network(config, data).to(device)
    accuracy = share_correct(network, data, device)
    trained = time.perf_counter()
    network = network.double()
    images = fixed_images(data, config.num_images, config.noise).to(device)
    few = images[: config.num_blockwise_images]
    values = fisher_spectral_norm(network, images, solver=instantiate(config.solver)).eigenvalue
    overall = fisher_bound(network, images).log10_value
    local = product_bound(network, images).log10_value
    blockwise = blockwise_fisher_bound(network, few).log10_value
    exceeded = [values.log10() - bound > _ROUND_OFF for bound in (overall, local)]
    exceeded.append(values[: len(few)].log10() - blockwise > _ROUND_OFF)
    return {
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "accuracy": accuracy,
        **{f"lambda_{name}": float(value) for name, value in summarize(values).items()},
        "lambda_median_few": float(values[: len(few)].quantile(0.5)),
        "lambda_max_few": float(values[: len(few)].max()),
        "log10_global": overall,
        "log10_local_mean": float(local.mean()),
        "log10_local_max": float(local.max()),
        "log10_blockwise_mean": float(blockwise.mean()),
        "log10_blockwise_max": float(blockwise.max()),
        "num_violations": int(torch.cat(exceeded).sum()),
        "seconds_training": trained - begin,
        "seconds_measuring": time.perf_counter() - trained,
    }
