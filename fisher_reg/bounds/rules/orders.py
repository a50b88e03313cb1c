"""The bound rules of functions that order entries: the largest over an axis, a sort, the k largest.

For a fixed order of the entries each function selects every entry at most once, and it is continuous where the order
changes. Therefore it is 1-Lipschitz. The indices are not continuous; using them raises an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.registry import register
from fisher_reg.bounds.sensitivity import Sensitivity, log, shifted, side_by_side


def _ordered(call: Call) -> Sensitivity:
    """Bound the values, and the indices if they are returned."""
    log_norm = call.sensitivity.plain().log_norm
    if isinstance(call.value, Tensor):
        return Sensitivity(log_norm)
    return Sensitivity(log_norm, parts=(Sensitivity(log_norm), Sensitivity(log_norm)))


def _running(call: Call) -> Sensitivity:
    """Bound a running maximum or minimum: no entry is selected more than n times."""
    size = call.operands["input"].value.shape[call.argument("dim")]
    log_norm = shifted(call.sensitivity.plain(), 0.5 * log(size))
    return Sensitivity(log_norm, parts=(Sensitivity(log_norm), Sensitivity(log_norm)))


def _largest_or_larger(call: Call) -> Sensitivity:
    """Bound ``max(x, dim)``, ``max(x)``, or the elementwise ``max(x, other)``."""
    other = call.operands.get("other", call.operands.get("dim"))
    if other is None or not isinstance(other.value, Tensor):
        return _ordered(call)
    terms = []
    for operand in (call.operands["input"], other):
        if not operand.is_constant:
            assert isinstance(operand.sensitivity, Sensitivity)
            copies = call.value.numel() / operand.value.numel()
            terms.append(shifted(operand.sensitivity.plain(), 0.5 * log(copies)))
    return Sensitivity(side_by_side(terms))


def register_rules() -> None:
    """Register the rules of this family."""
    register(_largest_or_larger, "input dim keepdim other", torch.max, torch.min, "max", "min")
    register(_ordered, "input dim keepdim", torch.median, "median", torch.nanmedian, "nanmedian")
    register(_ordered, "input dim descending stable", torch.sort, "sort", torch.msort, "msort")
    register(_ordered, "input k dim largest sorted", torch.topk, "topk")
    register(_ordered, "input k dim keepdim", torch.kthvalue, "kthvalue")
    register(_running, "input dim", torch.cummax, torch.cummin, "cummax", "cummin")
