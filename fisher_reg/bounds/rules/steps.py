"""The bound rules of functions that are constant between their jumps."""

from __future__ import annotations

import operator

import torch

from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.registry import register
from fisher_reg.bounds.sensitivity import CONSTANT, Sensitivity
from fisher_reg.errors import NoBoundError


def _step(call: Call) -> Sensitivity:
    """Bound a step function: its derivative at the example is zero, where it exists."""
    if call.is_local:
        return CONSTANT
    raise _jumps(call)


def _saw(call: Call) -> Sensitivity:
    """Bound a function with a constant slope between its jumps."""
    raise _jumps(call)


def _jumps(call: Call) -> NoBoundError:
    return NoBoundError(
        f"{call.name} jumps: it is not continuous in the input, and has no Lipschitz constant. Remove it, or replace "
        "it by a continuous function."
    )


def register_rules() -> None:
    """Register the rules of this family."""
    register(_step, None, torch.round, torch.floor, torch.ceil, torch.trunc, torch.fix, torch.sign, torch.sgn)
    register(_step, None, "round", "floor", "ceil", "trunc", "fix", "sign", "sgn")
    register(_step, None, operator.floordiv, torch.floor_divide, "floor_divide", torch.heaviside, "heaviside")
    register(_saw, None, operator.mod, torch.remainder, "remainder", torch.fmod, "fmod", torch.frac, "frac")
    register(_saw, None, torch.nn.functional.hardshrink, torch.hardshrink, "hardshrink")
    register(_saw, None, torch.nn.functional.threshold, torch.threshold, "threshold")
