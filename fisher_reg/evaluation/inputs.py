"""The arguments of a model: a batch of examples, and side inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LogitsFunction = Callable[..., Tensor]
"""Maps inputs ``(B, *S)``, and perhaps side inputs, to logits ``(B, K)``."""

SideInputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | None
"""More arguments of a model: one tensor, positional ones, or keywords."""

Index = Tensor | slice


def check_inputs(inputs: Tensor) -> None:
    """Check that inputs are a non-empty floating-point batch.

    Raises:
        ValueError: If they are not.
    """
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"inputs must be a floating-point tensor (B, *S); got {type(inputs).__name__}. Pass the tensor in it, in a "
            "callback by inputs_fn=lambda batch: batch[0]; more arguments of the model are side inputs."
        )
    if not inputs.is_floating_point():
        raise ValueError(
            "inputs must be a floating-point tensor, since they are differentiated; got "
            f"{inputs.dtype} {tuple(inputs.shape)}. {remedy_for_integers('inputs')}"
        )
    if inputs.ndim < 2 or inputs.numel() == 0:
        remedy = " One number per example is inputs[:, None]." if inputs.ndim == 1 and inputs.numel() else ""
        raise ValueError(f"inputs must be a non-empty batch (B, *S); got shape {tuple(inputs.shape)}.{remedy}")


def remedy_for_integers(inputs: str) -> str:
    """Return advice for integer inputs, given the expression of the inputs in the user's code."""
    return (
        f"For images pass {inputs}.float(), and divide as in training only if the model does not do that itself. Token "
        "ids have no derivative: pass their embeddings, with LogitsOf(model, logits_fn) or logits_fn from there on."
    )


@dataclass(frozen=True)
class WithSideInputs:
    """A model with its side inputs for a batch: a function of the inputs alone.

    Attributes:
        model: Called as ``model(inputs, *side_inputs)``, or with keywords where they are a mapping.
        side_inputs: One tensor, a tuple or a mapping. A tensor in them whose first axis has the length of the batch
            belongs to the examples; everything else is passed on as it is.
        batch_size: Length of the batch.
    """

    model: Callable[..., Any]
    side_inputs: SideInputs
    batch_size: int

    def __call__(self, inputs: Tensor) -> Any:
        """Return the logits ``(B, K)``."""
        if isinstance(self.side_inputs, Mapping):
            return self.model(inputs, **self.side_inputs)
        side_inputs = (self.side_inputs,) if isinstance(self.side_inputs, Tensor) else self.side_inputs or ()
        return self.model(inputs, *side_inputs)

    def part(self, index: Index) -> WithSideInputs:
        """Return the function of some of the examples."""
        chosen = select(self.side_inputs, index, self.batch_size)
        if isinstance(index, slice):
            count = len(range(*index.indices(self.batch_size)))
        else:
            count = int(index.sum()) if index.dtype == torch.bool else len(index)
        return WithSideInputs(self.model, chosen, count)


def select(side_inputs: Any, index: Index, batch_size: int) -> Any:
    """Return the side inputs of some of the examples.

    Example:
        >>> import torch
        >>> select((torch.tensor([5, 6, 7]), "mean"), slice(1, 3), 3)
        (tensor([6, 7]), 'mean')
    """
    if isinstance(side_inputs, Tensor):
        return side_inputs[index] if side_inputs.shape[:1] == (batch_size,) else side_inputs
    if isinstance(side_inputs, Mapping):
        return {name: select(value, index, batch_size) for name, value in side_inputs.items()}
    if isinstance(side_inputs, list | tuple):
        return type(side_inputs)(select(value, index, batch_size) for value in side_inputs)
    return side_inputs
