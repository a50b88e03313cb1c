"""What both callbacks take from a batch and a LightningModule."""

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

# These say Any where they mean a tensor: jsonargparse takes a callable that returns a class for a factory of that
# class, and refuses a user's function without annotations, or an instance that is callable.
InputsFn = Callable[[Any], Any]
"""From a batch to the inputs ``(B, *S)``."""
LabelsFn = Callable[[Any], Any]
"""From a batch to class indices ``(B,)``."""
LogitsFn = Callable[..., Any]
"""From a module, inputs and perhaps side inputs to logits ``(B, K)``."""
SideInputsFn = Callable[[Any], Any]
"""From a batch to :data:`fisher_reg.evaluation.SideInputs`."""
PenaltyFn = Callable[..., Any]
"""As :class:`fisher_reg.penalty.Penalty`."""
BoundFn = Callable[..., Any]
"""As :class:`fisher_reg.callbacks.monitor.Bound`."""


def no_side_inputs(batch: Any) -> SideInputs:
    """Return that the model takes the inputs alone."""
    return None


def logits_model(module: nn.Module, logits_fn: LogitsFn | None) -> nn.Module:
    """Return the module whose forward gives the logits."""
    return module if logits_fn is None else LogitsOf(module, logits_fn)


def report_check(
    owner: object, model: nn.Module, inputs: Tensor, side_inputs: SideInputs, likelihood: Likelihood, is_training: bool
) -> None:
    """Verify that a model is the function that is meant; warn of what is not so, with the remedy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says it all
        check = check_model(model, inputs, likelihood=likelihood, side_inputs=side_inputs, is_training=is_training)
    has_logits = check.findings[0].passed
    if has_logits and not check.passed:  # without logits the measurement itself fails, and says how
        rank_zero_warn(f"{type(owner).__name__} cannot vouch for its numbers. check_model found:\n{check}")


def differences(monitor: Any, penalty: Any) -> dict[str, str]:
    """Say in what a penalty is of another matrix than the one that is measured: by name, in words."""
    found = {}
    for name in ("likelihood", "input_std"):
        own, other = getattr(monitor, name), getattr(penalty, name, _ABSENT)
        if other is not _ABSENT and not _is_same(own, other):
            found[name] = (
                f"measures with {name}={own}, and FisherRegularizer penalises with {name}={other}: they are "
                f"different matrices. Give both the same {name}."
            )
    return found


_ABSENT = object()


def _is_same(one: Any, other: Any) -> bool:
    """Compare likelihoods, or standard deviations in whatever form they were given."""
    if one is None or other is None or not isinstance(one, Tensor | float | int | Sequence):
        return bool(one == other)
    first, second = (torch.as_tensor(v if isinstance(v, Tensor) else list(_each(v))).double() for v in (one, other))
    first, second = first.cpu().flatten(), second.cpu().flatten()
    is_comparable = 1 in (len(first), len(second)) or len(first) == len(second)
    return is_comparable and bool((first == second).all())


def _each(value: Any) -> Sequence[float]:
    return value if isinstance(value, Sequence) else [value]


def find_inputs(batch: Any) -> Tensor:
    """Return the inputs of a batch where there is no doubt about them.

    Example:
        >>> import torch
        >>> find_inputs((torch.zeros(2, 3), torch.tensor([0, 1]))).shape
        torch.Size([2, 3])

    Raises:
        MisconfigurationException: Where the inputs cannot be told; the message shows ``inputs_fn``.
    """
    if isinstance(batch, Mapping):
        candidates = [value for value in batch.values() if _may_be_inputs(value)]
    else:
        candidates = [batch[0] if isinstance(batch, list | tuple) and batch else batch]
    if len(candidates) != 1 or not _may_be_inputs(candidates[0]) or not candidates[0].is_floating_point():
        raise MisconfigurationException(
            f"The inputs cannot be told from this batch: {_describe(batch)}. They must be a floating-point tensor "
            f"(B, *S): say which with {_inputs_fn_for(batch)}"
        )
    inputs: Tensor = candidates[0]
    return inputs


def find_labels(batch: Any) -> Tensor:
    """Return the class indices of a batch ``(inputs, labels, …)``, or the one integer vector of a mapping.

    Raises:
        MisconfigurationException: Where the labels cannot be told; the message shows ``labels_fn``.
    """
    if isinstance(batch, Mapping):
        candidates = [value for value in batch.values() if _may_be_labels(value)]
    else:
        candidates = [batch[1]] if isinstance(batch, list | tuple) and len(batch) > 1 else []
    if len(candidates) != 1 or not _may_be_labels(candidates[0]):
        raise MisconfigurationException(
            f"The labels cannot be told from this batch: {_describe(batch)}. They must be class indices (B,): say "
            "which with labels_fn=lambda batch: batch['label'], for example."
        )
    labels: Tensor = candidates[0]
    return labels


def _inputs_fn_for(batch: Any) -> str:
    """Return what to write for a batch, with the first of its parts that may be inputs."""
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
    """Return the tensors of an object, also of one with slots, and of a graph that keeps them under keys."""
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
    """Refuse counts below one, naming the owner and the argument.

    Raises:
        ValueError: For the first such value.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{type(owner).__name__} needs {name} >= 1; got {value}.")
