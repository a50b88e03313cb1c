"""The bound rules of what puts entries in order: the largest over an axis, a sort, the k largest.

For entries in any fixed order these pick each at most once, and where the order changes the picks agree, so that they
are 1-Lipschitz. Their indices jump and are refused where they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.registry import register
from fisher_reg.bounds.sensitivity import Sensitivity, log, shifted, side_by_side


def _ordered(call: Call) -> Sensitivity:
    """The values, and the indices beside them."""
    log_norm = call.sensitivity.plain().log_norm
    if isinstance(call.value, Tensor):
        return Sensitivity(log_norm)
    return Sensitivity(log_norm, parts=(Sensitivity(log_norm), Sensitivity(log_norm)))


def _running(call: Call) -> Sensitivity:
    """The largest so far: no entry is picked more than n times."""
    size = call.operands["input"].value.shape[call.argument("dim")]
    log_norm = shifted(call.sensitivity.plain(), 0.5 * log(size))
    return Sensitivity(log_norm, parts=(Sensitivity(log_norm), Sensitivity(log_norm)))


def _largest_or_larger(call: Call) -> Sensitivity:
    """``max(x, dim)`` and ``max(x)``, or ``max(x, other)`` of two tensors entry by entry."""
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
