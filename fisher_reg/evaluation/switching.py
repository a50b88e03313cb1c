"""The exception: models that cannot be copied are switched to evaluation for the time of a call, and back.

These are models whose weights FSDP divides among processes: its hooks gather the weights into that very module. No two
threads can do this with one module at once, so that calls exclude each other. Everything else of this package only
reads a user's module; this file alone changes one.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LOCK = threading.RLock()


class Switched:
    """A module that is run itself, in the modes of an evaluation, with its buffers put back.

    Args:
        module: The module.
        is_deployed: Whether it runs in evaluation mode; otherwise in the modes that it is in.
    """

    is_promoted = False
    draws = False

    def __init__(self, module: nn.Module, is_deployed: bool) -> None:
        self.model = module
        self.is_deployed = is_deployed

    def identity_of(self, tensor: Tensor) -> int:
        """Tell tensors apart."""
        return id(tensor)

    @contextmanager
    def opened(self) -> Generator[None, None, None]:
        """Have the module ready for one call in the block."""
        with _LOCK:
            parts = list(self.model.modules())
            flags = [part.training for part in parts]
            buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
            try:
                for part in parts:
                    part.training = part.training and not self.is_deployed
                yield
            finally:
                for part, flag in zip(parts, flags, strict=True):
                    part.training = flag
                with torch.no_grad():
                    for buffer, kept in buffers:
                        if not torch.equal(buffer, kept):
                            buffer.copy_(kept)

    @contextmanager
    def with_other_noise(self) -> Generator[None, None, None]:
        """Do nothing: generators that the module holds are not looked for."""
        yield
