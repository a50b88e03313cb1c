"""Functions of both callbacks: inputs, labels and logits from a batch and a LightningModule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from fisher_reg.check import check_model
from fisher_reg.evaluation import LogitsOf, SideInputs, remedy_for_integers
from fisher_reg.likelihood import Likelihood

# The annotations are Any instead of Tensor: jsonargparse treats a callable that returns a class as a factory of that
# class, and rejects functions without annotations and callable instances.
InputsFn = Callable[[Any], Any]
"""From a batch to the inputs ``(B, *S)``."""
LabelsFn = Callable[[Any], Any]
"""From a batch to class indices ``(B,)``."""
LogitsFn = Callable[..., Any]
"""From a module, inputs and optional side inputs to logits ``(B, K)``."""
SideInputsFn = Callable[[Any], Any]
"""From a batch to :data:`fisher_reg.evaluation.SideInputs`."""
PenaltyFn = Callable[..., Any]
"""As :class:`fisher_reg.penalty.Penalty`."""
BoundFn = Callable[..., Any]
"""As :class:`fisher_reg.callbacks.monitor.Bound`."""


def no_side_inputs(batch: Any) -> SideInputs:
    """Return None: the model has no side inputs."""
    return None


def logits_model(module: nn.Module, logits_fn: LogitsFn | None) -> nn.Module:
    """Return a module whose forward returns the logits."""
    return module if logits_fn is None else LogitsOf(module, logits_fn)


def report_check(
    owner: object, model: nn.Module, inputs: Tensor, side_inputs: SideInputs, likelihood: Likelihood, is_training: bool
) -> None:
    """Run :func:`fisher_reg.check_model` and warn of failed checks, with the remedy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table contains all findings
        check = check_model(model, inputs, likelihood=likelihood, side_inputs=side_inputs, is_training=is_training)
    has_logits = check.findings[0].passed
    if has_logits and not check.passed:  # without logits the measurement raises its own error
        rank_zero_warn(f"The numbers of {type(owner).__name__} may be wrong. check_model found:\n{check}")


def differences(monitor: Any, penalty: Any) -> dict[str, str]:
    """Return the settings in which the penalty and the monitor differ: a message for each name."""
    found = {}
    for name in ("likelihood", "input_std"):
        own, other = getattr(monitor, name), getattr(penalty, name, _ABSENT)
        if other is not _ABSENT and not _is_same(own, other):
            found[name] = (
                f"measures with {name}={own}, and FisherRegularizer penalises with {name}={other}: these are "
                f"different matrices. Pass the same {name} to both."
            )
    return found


_ABSENT = object()


def _is_same(one: Any, other: Any) -> bool:
    """Compare likelihoods, or standard deviations given as numbers, lists or tensors."""
    if one is None or other is None or not isinstance(one, Tensor | float | int | Sequence):
        return bool(one == other)
    first, second = (torch.as_tensor(v if isinstance(v, Tensor) else list(_each(v))).double() for v in (one, other))
    first, second = first.cpu().flatten(), second.cpu().flatten()
    is_comparable = 1 in (len(first), len(second)) or len(first) == len(second)
    return is_comparable and bool((first == second).all())


def _each(value: Any) -> Sequence[float]:
    return value if isinstance(value, Sequence) else [value]


def find_inputs(batch: Any) -> Tensor:
    """Return the inputs of a batch if they are unambiguous.

    Example:
        >>> import torch
        >>> find_inputs((torch.zeros(2, 3), torch.tensor([0, 1]))).shape
        torch.Size([2, 3])

    Raises:
        MisconfigurationException: If the inputs are ambiguous; the message shows how to write ``inputs_fn``.
    """
    if isinstance(batch, Mapping):
        candidates = [value for value in batch.values() if _may_be_inputs(value)]
    else:
        candidates = [batch[0] if isinstance(batch, list | tuple) and batch else batch]
    if len(candidates) != 1 or not _may_be_inputs(candidates[0]) or not candidates[0].is_floating_point():
        raise MisconfigurationException(
            f"The inputs cannot be found in this batch: {_describe(batch)}. They must be a floating-point tensor "
            f"(B, *S): specify them with {_inputs_fn_for(batch)}"
        )
    inputs: Tensor = candidates[0]
    return inputs


def find_labels(batch: Any) -> Tensor:
    """Return the class indices of a batch ``(inputs, labels, …)``, or the one integer vector of a mapping.

    Raises:
        MisconfigurationException: If the labels are ambiguous; the message shows how to write ``labels_fn``.
    """
    if isinstance(batch, Mapping):
        candidates = [value for value in batch.values() if _may_be_labels(value)]
    else:
        candidates = [batch[1]] if isinstance(batch, list | tuple) and len(batch) > 1 else []
    if len(candidates) != 1 or not _may_be_labels(candidates[0]):
        raise MisconfigurationException(
            f"The labels cannot be found in this batch: {_describe(batch)}. They must be class indices (B,): specify "
            "them with labels_fn=lambda batch: batch['label'], for example."
        )
    labels: Tensor = candidates[0]
    return labels


def _inputs_fn_for(batch: Any) -> str:
    """Return an example of ``inputs_fn`` for a batch, with the first of its parts that may be inputs."""
    parts = list(_parts(batch, "batch"))
    for path, part in parts:
        if _may_be_inputs(part) and part.is_floating_point():
            return f"inputs_fn=lambda batch: {path}, for example."
    for path, part in parts:
        if part.ndim >= 2:
            return f"inputs_fn=lambda batch: {path}.float(), for example. {remedy_for_integers(path)}"
    return "inputs_fn=lambda batch: batch['image'], for example."


def _parts(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _parts(part, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _parts(part, f"{path}[{place}]")
    else:
        for name, part in _attributes(value).items():
            yield f"{path}.{name}", part


def _attributes(value: Any) -> dict[str, Tensor]:
    """Return the tensors of an object, also of one with slots, and of a graph that stores them under keys."""
    names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
    keys = getattr(value, "keys", None)
    names += keys() if callable(keys) else ()
    found = {name: getattr(value, name, None) for name in names if isinstance(name, str) and name.isidentifier()}
    return {name: part for name, part in found.items() if isinstance(part, Tensor)}


def _may_be_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point()


def _may_be_inputs(value: Any) -> bool:
    # an integer tensor (B, H, W) may be images before their conversion
    return isinstance(value, Tensor) and value.ndim >= (2 if value.is_floating_point() else 3)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of [" + ", ".join(_describe(item) for item in value) + "]"
    tensors = ", ".join(f"{name}: {_describe(part)}" for name, part in _attributes(value).items())
    return f"{type(value).__name__} with {tensors}" if tensors else type(value).__name__


def check_at_least_one(owner: object, **values: int) -> None:
    """Raise an error for counts below one, with the names of the owner and the argument.

    Raises:
        ValueError: For the first such value.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{type(owner).__name__} needs {name} >= 1; got {value}.")
