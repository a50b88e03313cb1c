"""A wrapper that returns logits, for a module that returns something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fisher_reg.arguments import CHOSEN_LOGITS_FN, MODEL


class LogitsOf(nn.Module):
    """A module whose forward returns the logits of another module, which returns something else.

    Args:
        module: The network; its parameters, modes and batch norms stay visible to the Fisher pass.
        logits_fn: ``logits_fn(module, inputs)`` returns logits ``(B, K)``. Side inputs follow ``inputs``. Use the
            argument ``module``: a Fisher pass gives a copy of it.

    Example:
        >>> import torch
        >>> wrapped = LogitsOf(nn.Linear(2, 3), lambda module, inputs: {"logits": module(inputs)}["logits"])
        >>> wrapped(torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(self, module: nn.Module, logits_fn: Callable[..., Tensor]) -> None:
        MODEL.check(module, self)
        CHOSEN_LOGITS_FN.check(logits_fn, self)
        super().__init__()
        self.module = module
        self.logits_fn = logits_fn
        self.training = getattr(module, "training", False)  # a frozen TorchScript module has no modes

    def forward(self, inputs: Tensor, *side_inputs: Any, **named_side_inputs: Any) -> Tensor:
        """Return the logits ``(B, K)`` of ``inputs`` ``(B, *S)``."""
        return self.logits_fn(self.module, inputs, *side_inputs, **named_side_inputs)
