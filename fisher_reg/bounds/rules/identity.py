"""The bound rules of functions that return their input: the identity, dropout in evaluation, casts and clones."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.layer import Layer, ScaledGain
from fisher_reg.bounds.rules.registry import register, register_bound_rule
from fisher_reg.bounds.sensitivity import Sensitivity
from fisher_reg.errors import NoBoundError


def passes(module: nn.Module, layer: Layer) -> ScaledGain:
    """Return the gain of the identity: for the identity, and dropout in evaluation."""
    return ScaledGain(1.0, layer.input_range, scale=layer.scale)


def same(call: Call) -> Sensitivity:
    """Return the sensitivity of the input."""
    return call.sensitivity


def drop(call: Call) -> Sensitivity:
    """Return the sensitivity of the input of a dropout in evaluation."""
    if call.argument("training", call.argument("train")) is not False:
        raise NoBoundError(f"{call.name} also drops in evaluation mode; pass training=self.training.")
    return call.sensitivity


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(
        nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
    )(passes)
    register(same, "input memory_format", "float", "double", "half", "bfloat16", torch.clone, "clone", "contiguous")
    register(same, "input", "alias", "lift_fresh_copy", "detach", "detach_", torch.detach)
    register(same, None, "to", "_to_copy", "type_as", "type", shape_only="*")
    register(drop, "input p training inplace", F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
    register(drop, "input p mode training", "stochastic_depth")
    register(drop, "input p train", "dropout", "feature_dropout")
