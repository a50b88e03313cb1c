"""The bound rules of means, sums and largest entries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.layer import Interval
from fisher_reg.bounds.rules.registry import register
from fisher_reg.bounds.sensitivity import Sensitivity, log, shifted


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
    known = call.sensitivity.range
    found = _reduce(call, 0.5 * log(call.copies))
    return replace(found, range=known) if isinstance(known, Interval) else found


def _total(call: Call) -> Sensitivity:
    return _reduce(call, -0.5 * log(call.copies))


def _largest(call: Call) -> Sensitivity:
    # each output is one entry, or distributes its gradient over equal entries; the windows are disjoint
    return _reduce(call, torch.zeros(()).double())


def register_rules() -> None:
    """Register the rules of this family."""
    register(_mean, "input dim keepdim", torch.mean, "mean")
    register(_total, "input dim keepdim", torch.sum, "sum")
    register(_largest, "input dim keepdim", torch.amax, torch.amin, "amax", "amin")
