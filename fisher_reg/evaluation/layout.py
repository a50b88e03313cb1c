"""The memory layout in which convolutions on a CPU are fastest, if it does not change the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fisher_reg.evaluation.inputs import WithSideInputs


def in_fast_layout(function: WithSideInputs, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``function`` with images ``(B, C, H, W)`` in channels-last layout, if that gives the same logits.

    The layout is not part of a tensor's value, but a forward that reads raw memory depends on it. So it is tested on
    the first two examples, and used if their logits agree with those in the given layout.
    """
    has_convolutions = isinstance(function.model, nn.Module) and any(
        isinstance(module, nn.Conv2d) for module in function.model.modules()
    )
    if not has_convolutions or inputs.ndim != 4 or inputs.device.type != "cpu" or _is_last(inputs):
        return function
    faster = ChannelsLast(function)
    few = slice(0, 2)
    try:
        with torch.no_grad():
            expected, got = function.part(few)(inputs[few]), faster.part(few)(inputs[few])
        agrees = isinstance(got, Tensor) and torch.allclose(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    except Exception:  # any error of the user's forward: it does not accept this layout, or not two examples
        return function
    return faster if agrees else function


class ChannelsLast:
    """A function of images that are laid out channels last.

    Args:
        function: The function.
    """

    def __init__(self, function: WithSideInputs) -> None:
        self.function = function

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the logits ``(B, K)``."""
        logits: Tensor = self.function(inputs if _is_last(inputs) else inputs.clone(**_LAST))
        return logits

    def part(self, index: Tensor | slice) -> ChannelsLast:
        """Return the function of some of the examples."""
        return ChannelsLast(self.function.part(index))


def _is_last(images: Tensor) -> bool:
    # with one channel both layouts are contiguous, and torch distinguishes them only by the strides
    return images.is_contiguous(**_LAST) and images.stride(1) == 1


_LAST = {"memory_format": torch.channels_last}
