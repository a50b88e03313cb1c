"""The bound rules of means, sums, largest entries and the softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.layer import Layer
from fisher_reg.bounds.rules.registry import register, register_bound_rule
from fisher_reg.bounds.sensitivity import Sensitivity, log, shifted


def _softmax_module(module: nn.Softmax, layer: Layer) -> float:
    return 0.5  # the largest eigenvalue of diag(p) - p p'


def _reduce(call: Call, log_factor: Tensor) -> Sensitivity:
    sensitivity = call.sensitivity
    dims, keepdim = call.argument("dim"), call.argument("keepdim", False)
    dims = tuple(range(call.source.value.ndim)) if dims is None else dims
    scale = (
        None
        if sensitivity.scale is None
        else sensitivity.scale.expand(call.source.value.shape).amin(dims, keepdim=keepdim)
    )
    return Sensitivity(shifted(sensitivity, log_factor), scale)


def _mean(call: Call) -> Sensitivity:
    return _reduce(call, 0.5 * log(call.copies))


def _total(call: Call) -> Sensitivity:
    return _reduce(call, -0.5 * log(call.copies))


def _largest(call: Call) -> Sensitivity:
    # Each output takes one entry, or shares equal ones out; the windows are disjoint.
    return _reduce(call, torch.zeros(()).double())


def _softmax(call: Call) -> Sensitivity:
    # diag(p) - p p' has norm 1/2 at most.
    return Sensitivity(shifted(call.sensitivity.plain(), log(0.5)))


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(nn.Softmax)(_softmax_module)
    register(_mean, "input dim keepdim", torch.mean, "mean")
    register(_total, "input dim keepdim", torch.sum, "sum")
    register(_largest, "input dim keepdim", torch.amax, torch.amin, "amax", "amin")
    register(_softmax, "input dim dtype half_to_float _stacklevel", torch.softmax, F.softmax, "softmax", "_softmax")
