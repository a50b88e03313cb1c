"""Summary statistics of numbers per example."""

from __future__ import annotations

import torch
from torch import Tensor


def summarize(values: Tensor) -> dict[str, Tensor]:
    """Return mean, median, 95th percentile and maximum of ``(N,)`` values; NaN for no values.

    Usable as the ``reduction`` of :class:`fisher_reg.FisherSpectralNorm`; the monitor logs these statistics.

    Args:
        values: ``(N,)``, floating point.

    Returns:
        Scalars under the keys ``"mean"``, ``"median"``, ``"p95"`` and ``"max"``.

    Example:
        >>> {name: value.item() for name, value in summarize(torch.tensor([0.0, 1.0, 2.0])).items()}
        {'mean': 1.0, 'median': 1.0, 'p95': 1.899999976158142, 'max': 2.0}
    """
    if values.numel() == 0:
        values = values.new_full((1,), torch.nan)
    return {
        "mean": values.mean(),
        "median": values.quantile(0.5),
        "p95": values.quantile(0.95),
        "max": values.max(),
    }
