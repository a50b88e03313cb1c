"""Certified upper bounds, composed over the traced network from one rule per layer type."""

from fisher_reg.bounds.bound import UpperBound, fisher_bound, lipschitz_bound
from fisher_reg.bounds.graph import BoundTerm
from fisher_reg.bounds.registry import Gain, Layer, register_bound_rule

__all__ = [
    "BoundTerm",
    "Gain",
    "Layer",
    "UpperBound",
    "fisher_bound",
    "lipschitz_bound",
    "register_bound_rule",
]
