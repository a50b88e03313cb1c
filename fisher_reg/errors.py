"""The errors of this package about networks, by kind."""

from __future__ import annotations


class NonFiniteError(ValueError):
    """A value that must be finite is NaN or infinite."""


class NonFiniteLogitsError(NonFiniteError):
    """The model returned logits without a Fisher matrix: NaN or infinite (-inf may exclude a class)."""


class NonFiniteJacobianError(NonFiniteError):
    """The logits are finite but their derivatives are not."""


class ForwardError(RuntimeError):
    """The model raised an error, which is the cause; the message names the call, its arguments and a remedy."""


class LogitsShapeError(ValueError):
    """The model did not return logits ``(B, K)``."""


class NonFiniteWeightsError(NonFiniteError):
    """A layer has NaN or infinite weights, so that there is no bound."""


class NoBoundError(NotImplementedError):
    """No certified bound is known for this network; the message names the part and the remedy."""
