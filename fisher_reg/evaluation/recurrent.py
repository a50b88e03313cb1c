"""Recurrent layers on a GPU that can be differentiated in evaluation mode, and twice; those of cuDNN cannot."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fisher_reg.evaluation.process_wide import ProcessWide

IsOfCudnn = Callable[[Tensor], bool]


@contextmanager
def _without_cudnn() -> Generator[None, None, None]:
    found = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = found


_WITHOUT_CUDNN = ProcessWide(_without_cudnn)


def is_on_cuda(tensor: Tensor) -> bool:
    """Whether torch would give a recurrent layer over ``tensor`` to cuDNN."""
    return tensor.device.type == "cuda"


def recurrent_rules(
    differentiates_twice: bool = False, is_of_cudnn: IsOfCudnn = is_on_cuda
) -> dict[Any, Callable[..., Any]]:
    """Rules that compute recurrent layers without cuDNN, from operations of torch, where cuDNN has no derivative.

    cuDNN has a first derivative only in training mode, and no second one. A layer that needs no gradient stays with
    cuDNN. The setting is torch's and holds for the whole process during one call of a layer; a backward pass does not
    read it.

    Args:
        differentiates_twice: Whether the rules also apply in training mode.
        is_of_cudnn: Whether a layer over this tensor would run in cuDNN.

    Returns:
        From torch functions to their replacements.
    """

    def rule(function: Callable[..., Any]) -> Callable[..., Any]:
        def answer(values: Tensor, *args: Any, **kwargs: Any) -> Any:
            lacks_derivative = differentiates_twice or not _is_training(args)
            if not (lacks_derivative and is_of_cudnn(values) and torch.is_grad_enabled()):
                return function(values, *args, **kwargs)
            with _WITHOUT_CUDNN:
                return function(values, *args, **kwargs)

        return answer

    return {function: rule(function) for function in _FUNCTIONS}


_FUNCTIONS: tuple[Any, ...] = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu) + tuple(
    getattr(getattr(torch.ops.aten, name), overload)  # as a program of torch.export calls them
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for overload in ("input", "data")
)


def _is_training(args: tuple[Any, ...]) -> bool:
    # (state, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first) of a padded batch, and
    # (lengths, state, weights, has_biases, num_layers, dropout, train, bidirectional) of a packed one
    return next((argument for argument in args[5:7] if isinstance(argument, bool)), False)
