"""What can go wrong with a network, by kind, so that a caller can tell the kinds apart."""

from __future__ import annotations


class NonFiniteError(ValueError):
    """Something that must be finite is NaN or infinite."""


class NonFiniteLogitsError(NonFiniteError):
    """The model returned logits for which no Fisher matrix exists: NaN, or infinite (but to leave a class out)."""


class NonFiniteJacobianError(NonFiniteError):
    """The logits are finite and their derivatives are not."""


class ForwardError(RuntimeError):
    """The model raised an error, which is the cause; the message says what was called with what, and the remedy."""


class LogitsShapeError(ValueError):
    """The model returned something else than logits ``(B, K)``."""


class NonFiniteWeightsError(NonFiniteError):
    """A layer has NaN or infinite weights, for which no bound exists."""


class NoBoundError(NotImplementedError):
    """No certified bound is known for this network; the message names the part and the remedy."""
