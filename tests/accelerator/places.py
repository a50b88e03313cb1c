"""Where a case runs: on the CPU, or on the simulated device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Place:
    """A device, and the way there.

    Attributes:
        device: Where the tensors and modules of a case live.
    """

    device: torch.device

    def put(self, value):
        """Return a tensor, or tensors in lists, tuples and dictionaries, on this device; a module moves itself."""
        if isinstance(value, torch.nn.Module):
            return value.to(self.device)
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), value)

    def generator(self, seed=0):
        """Return a generator that lives here."""
        return torch.Generator(self.device).manual_seed(seed)
