"""Upper bounds, composed over the traced network from one rule per layer type."""

from fisher_reg.bounds import rules  # noqa: F401  (registers the rules of torch's layers)
from fisher_reg.bounds.api import (
    certified_radius,
    fisher_bound,
    lipschitz_bound,
    local_fisher_bound,
    log_fisher_bound,
)
from fisher_reg.bounds.report import BoundTerm, UpperBound
from fisher_reg.bounds.rules.layer import Gain, Layer, ScaledGain, diagonal_gain
from fisher_reg.bounds.rules.registry import register_bound_rule
from fisher_reg.bounds.tightening import Tightening

__all__ = [
    "BoundTerm",
    "Gain",
    "Layer",
    "ScaledGain",
    "Tightening",
    "UpperBound",
    "certified_radius",
    "diagonal_gain",
    "fisher_bound",
    "lipschitz_bound",
    "local_fisher_bound",
    "log_fisher_bound",
    "register_bound_rule",
]
