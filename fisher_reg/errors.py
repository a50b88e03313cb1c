"""The errors of a network as classes, so that a caller can distinguish them."""

from __future__ import annotations


class NonFiniteError(ValueError):
    """A value that must be finite is NaN or infinite."""


class NonFiniteLogitsError(NonFiniteError):
    """The model returned logits that are NaN or infinite (minus infinity is allowed for a class that is left out)."""


class NonFiniteJacobianError(NonFiniteError):
    """The logits are finite, but their derivatives are not."""


class ForwardError(RuntimeError):
    """The model raised an error, which is the cause; the message describes the call and gives a remedy."""


class LogitsShapeError(ValueError):
    """The model returned something else than logits ``(B, K)``."""


class NonFiniteWeightsError(NonFiniteError):
    """A layer has NaN or infinite weights, for which no bound exists."""


class NoBoundError(NotImplementedError):
    """No certified bound is known for this network; the message names the part and the remedy."""
