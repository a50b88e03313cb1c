"""What a model returned, checked before anything is computed of it."""

from __future__ import annotations

import warnings

from torch import Tensor

from fisher_reg.errors import NonFiniteLogitsError
from fisher_reg.likelihood import Bernoulli, Likelihood


def check_logits(logits: Tensor, batch_size: int, likelihood: Likelihood) -> None:
    """Refuse outputs that are not ``(B, K)`` logits, finite or minus infinity for classes that are left out.

    Raises:
        ValueError: If the shape is not ``(B, K)`` or ``K`` is too small for the likelihood.
        NonFiniteLogitsError: If any logit is NaN or plus infinity, or minus infinity where the likelihood gives that no
            meaning, or if a row has no finite logit; the message counts the examples.
    """
    found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch_size:
        raise ValueError(
            f"The model must return logits of shape (B, K) with B = {batch_size}; it returned {found}. "
            "If the logits are inside that, say how to get them: logits_fn=lambda model, inputs: model(inputs).logits "
            "in a callback, LogitsOf(model, logits_fn) elsewhere."
        )
    num_outputs = logits.shape[1]
    if num_outputs < likelihood.min_outputs:
        raise ValueError(
            f"{type(likelihood).__name__} needs at least {likelihood.min_outputs} outputs; the model returned "
            f"K = {num_outputs}. A single logit is a yes/no label: pass likelihood=Bernoulli()."
        )
    if not logits.is_floating_point():
        raise ValueError(f"The model must return floating-point logits; it returned {logits.dtype}.")
    _refuse_non_finite(logits.detach(), likelihood)
    if looks_like_probabilities(logits.detach(), likelihood):
        warnings.warn(
            "The model returns probabilities and not logits: its rows are non-negative and sum to one, so that every "
            "number comes out far too small. Return the values before softmax (sigmoid for Bernoulli).",
            stacklevel=2,
        )
    elif likelihood.shift_invariant and _looks_like_sigmoid(logits.detach()):
        warnings.warn(
            "All outputs lie between 0 and 1 and their rows do not sum to one, as those of a sigmoid do. If they are "
            f"probabilities of {num_outputs} yes/no labels, return the values before the sigmoid and pass "
            "likelihood=Bernoulli(). If they are logits, this warning is wrong.",
            stacklevel=2,
        )


def _refuse_non_finite(logits: Tensor, likelihood: Likelihood) -> None:
    is_left_out = logits.isneginf()
    broken = (~(logits.isfinite() | is_left_out)).any(1) | is_left_out.all(1)
    remedy = "Check the inputs and the weights for non-finite values."
    if bool(is_left_out.any()):
        if getattr(likelihood, "leaves_out", False):
            remedy += " A logit of -inf leaves its class out; each example needs a finite one."
        else:
            broken = broken | is_left_out.any(1)
            remedy += f" {type(likelihood).__name__} outputs cannot be left out by -inf."
    if bool(broken.any()):
        raise NonFiniteLogitsError(
            f"The logits of {int(broken.sum())} of {len(logits)} examples are NaN or infinite (the first is number "
            f"{int(broken.int().argmax())}). {remedy}"
        )


def looks_like_probabilities(logits: Tensor, likelihood: Likelihood) -> bool:
    """Say whether what should be logits ``(B, K)`` are probabilities.

    For one label out of K these are non-negative rows that sum to one; for K labels they are outputs of a sigmoid.

    Args:
        logits: ``(B, K)``.
        likelihood: What they parametrise.

    Returns:
        Whether they do. A numerical accident is very unlikely.
    """
    if likelihood.shift_invariant:
        return bool((logits >= 0).all() & ((logits.sum(1) - 1).abs() < 1e-3).all())
    return isinstance(likelihood, Bernoulli) and _looks_like_sigmoid(logits)


def _looks_like_sigmoid(logits: Tensor) -> bool:
    # exact zeros are the work of a ReLU, and nearly equal numbers that of an untrained head
    smallest, largest = float(logits.min()), float(logits.max())
    return logits.numel() >= 16 and smallest > 0 and largest <= 1 and largest - smallest > 0.1
