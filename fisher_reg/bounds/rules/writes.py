"""The bound rules of functions that write into a part of a value, or choose each entry from two values."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_reg.bounds.rules.call import Call, Operand
from fisher_reg.bounds.rules.registry import register
from fisher_reg.bounds.sensitivity import CONSTANT, Sensitivity, log, shifted, side_by_side
from fisher_reg.errors import NoBoundError


def _beside(call: Call, parts: dict[str, int]) -> Sensitivity:
    """Bound a call whose output entries come from several parts; ``parts`` has the largest number of uses of each."""
    norms = []
    for name, count in parts.items():
        operand = call.operands[name]
        sensitivity = operand.sensitivity
        if operand.is_constant or not isinstance(sensitivity, Sensitivity):
            continue
        copies = max(1.0, count / operand.value.numel())
        norms.append(shifted(sensitivity.plain(), 0.5 * log(copies)))
    return Sensitivity(side_by_side(norms)) if norms else CONSTANT


def _scatter(call: Call) -> Sensitivity:
    return _beside(call, {"input": call.value.numel(), "src": call.operands["src"].value.numel()})


def _overwrite(call: Call) -> Sensitivity:
    return _beside(call, {"src": call.value.numel()})


def _where(call: Call) -> Sensitivity:
    _check_condition(call, "condition")
    if call.operands.keys() != {"condition", "input", "other"}:
        raise NoBoundError(f"{call.name} has a bound rule only with two values to choose from.")
    return _beside(call, {"input": call.value.numel(), "other": call.value.numel()})


def _masked_fill(call: Call) -> Sensitivity:
    _check_condition(call, "mask")
    return _beside(call, {"input": call.value.numel(), "value": call.value.numel()})


def _check_condition(call: Call, name: str) -> None:
    if not call.operands[name].is_constant:
        raise NoBoundError(f"{call.name} has a condition that depends on the input, which is not continuous.")


def _put(call: Call) -> Sensitivity:
    if call.argument("accumulate", False):
        raise NoBoundError(f"{call.name} adds to existing entries; write it as a sum.")
    indices: Operand = call.operands["indices"]
    if not indices.is_constant:
        raise NoBoundError(f"{call.name} writes to indices that depend on the input, which is not continuous.")
    index = tuple(slice(None) if item is None else item for item in indices.value)
    written: Tensor = call.value[index]
    return _beside(call, {"input": call.value.numel(), "values": written.numel()})


def register_rules() -> None:
    """Register the rules of this family."""
    register(_scatter, "input src dim start end step", torch.slice_scatter, "slice_scatter")
    register(_scatter, "input src dim index", torch.select_scatter, "select_scatter")
    register(_overwrite, "input src non_blocking", "copy", "copy_", shape_only="input")
    register(_where, "condition input other", torch.where)
    register(_where, "input condition other", "where")
    register(_masked_fill, "input mask value", torch.masked_fill, "masked_fill")
    register(_put, "input indices values accumulate", torch.index_put, "index_put")
