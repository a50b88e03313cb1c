"""The first call of a model, with an error that describes the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisher_reg.errors import ForwardError, NoBoundError, NonFiniteError
from fisher_reg.evaluation.batch_norm import UnrecordedError

_PASSED_ON = (ForwardError, NonFiniteError, NoBoundError, UnrecordedError, torch.OutOfMemoryError)


def called(function: Callable[[Tensor], Any], inputs: Tensor) -> Any:
    """Return ``function(inputs)``.

    Raises:
        ForwardError: For any error of the model, which is its cause. Errors of this package and out-of-memory errors
            are passed on.
    """
    try:
        return function(inputs)
    except _PASSED_ON:
        raise
    except Exception as error:
        if _is_own(error):
            raise
        raise ForwardError(f"{name_of_call(function, inputs)} failed. {_remedy(error)} {_short(error)}") from error


def _is_own(error: Exception) -> bool:
    """Return whether this package raised the error: torch functions that a rule calls raise no ``ValueError``."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = "" if frame is None else str(frame.tb_frame.f_globals.get("__name__"))
    return isinstance(error, ValueError) and module.startswith("fisher_reg.")


def name_of_call(function: object, inputs: Tensor) -> str:
    """Describe a call, such as ``Net.forward, called with inputs (4, 3, 8, 8) torch.float32,``."""
    shape = f"{tuple(inputs.shape)} {inputs.dtype}"
    return f"{_name(function)}, called with inputs {shape}{_beside(function)},"


def _name(function: object) -> str:
    has_logits_fn = False
    while (inner := _inner(function)) is not None:
        has_logits_fn |= "logits_fn" in vars(function)
        function = inner
    plain = getattr(function, "__qualname__", None)
    name = plain if isinstance(plain, str) else f"{type(function).__name__}.forward"
    return name if not has_logits_fn else f"The logits_fn of {name.removesuffix('.forward')}"


def _inner(function: object) -> object:
    """Return the function that one of our own wrappers, or a method of one, calls; None for a user's function."""
    owner = getattr(function, "__self__", function)
    if not type(owner).__module__.startswith("fisher_reg.evaluation."):
        return None
    own = vars(owner) | vars(owner).get("_modules", {})
    return next((own[name] for name in ("function", "model", "module") if own.get(name) is not None), None)


def _beside(function: object) -> str:
    for _ in range(3):
        side_inputs = getattr(function, "side_inputs", None)
        if side_inputs is not None:
            names = list(side_inputs) if isinstance(side_inputs, Mapping) else type(side_inputs).__name__
            return f" and side inputs {names}"
        function = getattr(function, "function", None)
    return ""


def _short(error: Exception) -> str:
    return f"It raised {type(error).__name__}: {error}"


def _remedy(error: Exception) -> str:
    if isinstance(error, NotImplementedError) and "forward" in str(error):
        return (
            "The module has no forward. Write forward(self, inputs) that returns the logits, or say how to get them: "
            "logits_fn=lambda module, x: module.network(x) in a callback, LogitsOf(module, logits_fn) elsewhere."
        )
    if "allow_tf32" in str(error):
        return (
            "It opens torch.backends.cudnn.flags(), which torch refuses while TensorFloat-32 is off for float32. Set "
            "torch.backends.cudnn.allow_tf32, to True or False, once at the beginning of the program, or leave "
            "flags() out: recurrent layers run without cuDNN here where that is needed."
        )
    return (
        "It gets the inputs alone, as they are in the batch. Where forward takes the whole batch or another shape, say "
        "how to get logits, such as logits_fn=lambda module, x: module((x, None)) or logits_fn=lambda module, x: "
        "module(x.flatten(1)), in a callback, or LogitsOf(module, logits_fn) elsewhere; where the inputs are another "
        "part of the batch, inputs_fn=lambda batch: batch[1]."
    )
