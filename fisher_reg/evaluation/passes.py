"""Open a pass that can be differentiated, whatever surrounds it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from fisher_reg.evaluation.precision import at_least_float32


@contextmanager
def differentiable(inputs: Tensor) -> Generator[Tensor, None, None]:
    """Open a pass that can be differentiated twice, and yield the inputs to use in it.

    Autograd is on even under ``no_grad`` and ``inference_mode``; autocast is off, and half-precision inputs are
    promoted to float32; compiled functions run eagerly, since compiled code has no double backward.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(inputs.device.type, enabled=False))
        stack.enter_context(eagerly())
        yield inputs.detach().clone().to(at_least_float32(inputs.dtype))


class _Eagerly:
    """Compiled functions run eagerly while at least one block is open, in whatever thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_open = 0
        self.stack = ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.num_open == 0 and "torch._dynamo" in sys.modules:  # else nothing has been compiled
                self.stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.num_open += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.num_open -= 1
            if self.num_open == 0:
                self.stack.close()


_EAGERLY = _Eagerly()


def eagerly() -> _Eagerly:
    """Let compiled functions run eagerly during the block. The setting is torch's, for the whole process."""
    return _EAGERLY
