"""The bound rules of functions that use only the shape, the type or the device of a value."""

from __future__ import annotations

import torch

from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.registry import register
from fisher_reg.bounds.sensitivity import Sensitivity
from fisher_reg.errors import NoBoundError


def _filled(call: Call) -> Sensitivity:
    raise NoBoundError(f"{call.name} fills a tensor with a value that depends on the input; expand the value.")


def register_rules() -> None:
    """Register the rules of this family."""
    options = "dtype layout device pin_memory requires_grad memory_format"
    like = (torch.zeros_like, torch.ones_like, "zeros_like", "ones_like")
    register(_filled, f"input {options}", *like, shape_only="input *")
    new = ("new_zeros", "new_ones", "zero_", "zero")
    register(_filled, None, *new, shape_only="0 input *")
    register(_filled, f"input fill_value {options}", torch.full_like, "full_like", shape_only=f"input {options}")
    register(_filled, f"input size fill_value {options}", "new_full", shape_only=f"input size {options}")
    register(_filled, f"input data {options}", "new_tensor", shape_only=f"input {options}")
    register(_filled, "input value", "fill", "fill_", shape_only="input")
