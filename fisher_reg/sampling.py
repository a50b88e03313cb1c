"""Random numbers with the shape, type and device of a tensor, drawn on the device of the generator.

Public: all of ``__all__``, for penalties and solvers that need random numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fixed_generator", "normal", "signs", "uniform"]


def signs(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return independent random signs."""
    return 2 * (uniform(like, generator) < 0.5).to(like) - 1


def uniform(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return numbers in [0, 1)."""
    return _draw(torch.rand, like, generator)


def normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return standard normal numbers."""
    return _draw(torch.randn, like, generator)


def fixed_generator(seed: int = 0) -> torch.Generator:
    """Return a new generator with a fixed seed, the default of all estimates.

    It is on the CPU, so that an estimate has the same random numbers on every device.

    Args:
        seed: Use different seeds for numbers that must be independent.

    Returns:
        The generator.
    """
    return torch.Generator().manual_seed(seed)


def _draw(sample: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return sample(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)
