"""Checks of the output of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisher_reg.errors import LogitsShapeError, NonFiniteLogitsError
from fisher_reg.likelihood import Bernoulli, Likelihood


def check_logits(logits: Any, batch_size: int, likelihood: Likelihood, call: str = "The model") -> None:
    """Raise an error unless the output is ``(B, K)`` logits, finite or minus infinity for excluded classes.

    Args:
        logits: The output of the model.
        batch_size: B.
        likelihood: The output distribution that the logits parametrise.
        call: Function and arguments, for the start of a message.

    Raises:
        LogitsShapeError: If the shape is not ``(B, K)``.
        ValueError: If ``K`` is too small for the likelihood, or the logits are integers.
        NonFiniteLogitsError: If a logit is NaN or plus infinity, or minus infinity without a meaning for the
            likelihood, or if a row has no finite logit; the message counts the examples.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch_size:
        raise LogitsShapeError(
            f"{call} must return logits of shape (B, K) with B = {batch_size}; it returned {_describe(logits)}. "
            f"{_remedy(logits, batch_size)}"
        )
    num_outputs = logits.shape[1]
    if num_outputs < likelihood.min_outputs:
        raise ValueError(
            f"{type(likelihood).__name__} needs at least {likelihood.min_outputs} outputs; {call} returned K = "
            f"{num_outputs}. Pass likelihood=Bernoulli() for a yes/no label, likelihood=Gaussian() for a regression."
        )
    if not logits.is_floating_point():
        raise ValueError(
            f"{call} must return floating-point logits; it returned {logits.dtype}. Return the scores before "
            "argmax or round, or extract them with logits_fn."
        )
    is_broken, sums_to_one, is_between = _seen(logits.detach(), likelihood)
    if is_broken:
        _refuse_non_finite(logits.detach(), likelihood)
    if _are_probabilities(sums_to_one, is_between, likelihood):
        warnings.warn(
            "The model returns probabilities and not logits: its rows are non-negative and sum to one, so that every "
            "number will be far too small. Return the values before softmax (sigmoid for Bernoulli).",
            stacklevel=2,
        )
    elif likelihood.shift_invariant and is_between:
        warnings.warn(
            "All outputs lie between 0 and 1 and their rows do not sum to one, like those of a sigmoid. If they are "
            f"probabilities of {num_outputs} yes/no labels, return the values before the sigmoid and pass "
            "likelihood=Bernoulli(). If they are logits, this warning is wrong.",
            stacklevel=2,
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        parts = (f"{key!r}: {_describe(part)}" for key, part in value.items())
        return f"{type(value).__name__} with {{{', '.join(parts)}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of [{', '.join(_describe(part) for part in value)}]"
    return type(value).__name__


def _remedy(value: Any, batch_size: int) -> str:
    """Return how to extract logits from the output of a model."""
    how, why = "module(x).logits", "If it contains the logits, extract them"
    if isinstance(value, Tensor):
        why, how = _way_out_of_a_tensor(value, batch_size)
    elif not hasattr(value, "logits") and isinstance(value, Mapping):
        how = f"module(x)[{_key_of_logits(value)!r}]"
    elif not hasattr(value, "logits") and isinstance(value, list | tuple):
        places = [place for place, part in enumerate(value) if _may_be_logits(part)]
        how = f"module(x)[{places[0] if places else 0}]"
    return f"{why}: logits_fn=lambda module, x: {how} in a callback, LogitsOf(module, logits_fn) elsewhere."


def _way_out_of_a_tensor(value: Tensor, batch_size: int) -> tuple[str, str]:
    if value.shape[:1] != (batch_size,):
        why = "The first axis must be that of the examples. If forward needs the whole batch or other inputs, pass them"
        return why, "module((x, None))"
    if value.ndim == 1:
        why = (
            "One number per example is K = 1, with likelihood=Gaussian() for a regression and likelihood=Bernoulli() "
            "for a yes/no label. Add the axis"
        )
        return why, "module(x)[:, None]"
    if value.ndim == 3:
        return "There is one prediction per position. Choose one, or take their mean", "module(x)[:, -1]"
    why = "There is one prediction per position. Take their mean, or choose one, as in module(x)[:, :, 0, 0]"
    return why, "module(x).flatten(2).mean(2)"


def _key_of_logits(value: Mapping[Any, Any]) -> Any:
    likely = [key for key, part in value.items() if _may_be_logits(part)]
    named = [key for key in (*likely, *value) if "logit" in str(key)]
    return next(iter((*named, *likely)), "logits")


def _may_be_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


def _seen(logits: Tensor, likelihood: Likelihood) -> tuple[bool, bool, bool]:
    """Return whether a logit is invalid, whether the rows sum to one, and whether all lie between 0 and 1.

    The three are read together, with one synchronisation.
    """
    of_rows = _broken(logits, likelihood).any(), _sum_to_one(logits), _lie_between(logits)
    is_broken, sums_to_one, is_between = torch.stack(of_rows).cpu().tolist()
    return is_broken, sums_to_one, is_between


def _broken(logits: Tensor, likelihood: Likelihood) -> Tensor:
    """Return which examples ``(B,)`` have an invalid logit."""
    is_left_out = logits.isneginf()
    is_refused = ~(logits.isfinite() | is_left_out)
    if getattr(likelihood, "leaves_out", False):
        return is_refused.any(1) | is_left_out.all(1)
    return (is_refused | is_left_out).any(1)


def _refuse_non_finite(logits: Tensor, likelihood: Likelihood) -> None:
    broken = _broken(logits, likelihood)
    remedy = "Check the inputs and the weights for non-finite values."
    if bool(logits.isneginf().any()):
        if getattr(likelihood, "leaves_out", False):
            remedy += " A logit of -inf excludes its class; each example needs a finite one."
        else:
            remedy += f" {type(likelihood).__name__} outputs cannot be excluded by -inf."
    raise NonFiniteLogitsError(
        f"The logits of {int(broken.sum())} of {len(logits)} examples are NaN or infinite (the first is number "
        f"{int(broken.int().argmax())}). {remedy}"
    )


def looks_like_probabilities(logits: Tensor, likelihood: Likelihood) -> bool:
    """Return whether the outputs ``(B, K)`` are probabilities instead of logits.

    For one label out of K these are non-negative rows that sum to one; for K labels they are outputs of a sigmoid.

    Args:
        logits: ``(B, K)``.
        likelihood: The output distribution.

    Returns:
        Whether they are. A coincidence is very unlikely.
    """
    _, sums_to_one, is_between = _seen(logits, likelihood)
    return _are_probabilities(sums_to_one, is_between, likelihood)


def _are_probabilities(sums_to_one: bool, is_between: bool, likelihood: Likelihood) -> bool:
    if likelihood.shift_invariant:
        return sums_to_one
    return isinstance(likelihood, Bernoulli) and is_between


def _sum_to_one(logits: Tensor) -> Tensor:
    return (logits >= 0).all() & ((logits.sum(1) - 1).abs() < 1e-3).all()


def _lie_between(logits: Tensor) -> Tensor:
    # exact zeros come from a ReLU, and nearly equal numbers from an untrained head
    smallest, largest = logits.aminmax()
    is_enough = logits.numel() >= 16
    return (smallest > 0) & (largest <= 1) & (largest - smallest > 0.1) & is_enough
