"""Contexts for passes that can be differentiated, also inside ``no_grad`` or autocast."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from fisher_reg.evaluation.precision import at_least_float32
from fisher_reg.evaluation.process_wide import ProcessWide
from fisher_reg.evaluation.strict import strictly


@contextmanager
def differentiable(inputs: Tensor) -> Generator[Tensor, None, None]:
    """Open a pass that can be differentiated twice, and yield the inputs to use in it.

    Autograd is on even under ``no_grad`` and ``inference_mode``; autocast is off, and half-precision inputs are
    promoted to float32; compiled functions run eagerly, since compiled code has no double backward.

    Penalties are computed in such a pass. The user's setting of TensorFloat-32 is kept, since a penalty is added to the
    loss of a step with the same setting.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(inputs.device.type, enabled=False))
        stack.enter_context(eagerly())
        yield inputs.detach().clone().to(at_least_float32(inputs.dtype))


@contextmanager
def measured(inputs: Tensor) -> Generator[Tensor, None, None]:
    """Open :func:`differentiable` with strict float32 (:mod:`fisher_reg.evaluation.strict`).

    All measurements use it: estimates, metrics, the monitor, checks, block-wise norms. Certified bounds compute in
    float64 and do not need it.
    """
    with strictly(inputs.device), differentiable(inputs) as safe_inputs:
        yield safe_inputs


def _force_eager() -> AbstractContextManager[object]:
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


_EAGERLY = ProcessWide(_force_eager)


def eagerly() -> ProcessWide:
    """Let compiled functions run eagerly during the block. The setting is torch's, for the whole process."""
    return _EAGERLY
