"""The bound rules of sums, products, quotients and concatenations."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import Tensor, fx

from fisher_reg.bounds.rules.call import Call, Operand, layer_of
from fisher_reg.bounds.rules.elementwise import quotient
from fisher_reg.bounds.rules.extents import largest_modulus, worst
from fisher_reg.bounds.rules.layer import Ball, Interval, diagonal_gain
from fisher_reg.bounds.rules.registry import (
    find_function_rule,
    register,
)
from fisher_reg.bounds.sensitivity import Sensitivity, as_double, log, log_sum, shifted, side_by_side
from fisher_reg.errors import NoBoundError


def adds(node: fx.Node) -> bool:
    """Return whether the node is a sum or a difference."""
    rule = find_function_rule(node.target) if node.op in ("call_function", "call_method") else None
    return rule is not None and rule.apply is _sum


def _sum(call: Call) -> Sensitivity:
    if call.argument("alpha", 1) != 1:
        raise NoBoundError(f"{call.name} is called with a factor; write it as a product.")
    if not isinstance(call.value, Tensor):
        raise NoBoundError(f"{call.name} joins tuples of tensors; concatenate the tensors.")
    terms = [_broadcast(operand, call.value) for operand in call.operands.values() if not operand.is_constant]
    if len(terms) == 1:
        return replace(terms[0], range=_shifted_range(call))
    scales = [term.scale for term in terms if term.scale is not None]
    scale = None
    if scales:  # the smallest scaling: no scaled term becomes larger
        ones = [torch.ones((), dtype=torch.float64, device=call.value.device)] * (len(terms) - len(scales))
        scale = torch.stack([item.expand(call.value.shape) for item in (*scales, *ones)]).amin(0)
    return Sensitivity(log_sum([term.within(scale) for term in terms]), scale)


def _shifted_range(call: Call) -> Interval | None:
    """Return the interval of a value after a number is added, as in ``variance + eps``."""
    (source,) = (item for item in call.operands.values() if not item.is_constant)
    known = source.sensitivity.range if isinstance(source.sensitivity, Sensitivity) else None
    others = [item.value for name, item in call.operands.items() if item is not source and name != "alpha"]
    is_sum = call.function in ("add", "iadd")
    if not isinstance(known, Interval) or len(others) != 1 or isinstance(others[0], Tensor) or not is_sum:
        return None
    return Interval(known.low + others[0], known.high + others[0])


def _broadcast(operand: Operand, value: Tensor) -> Sensitivity:
    assert isinstance(operand.sensitivity, Sensitivity)
    return replace(
        operand.sensitivity,
        log_norm=shifted(operand.sensitivity, 0.5 * log(value.numel() / operand.value.numel())),
        range=None,
    )


def _multiply(call: Call) -> Sensitivity:
    operands = [item for item in call.operands.values() if isinstance(item.value, Tensor) and not item.is_constant]
    if len(operands) == 2:
        return _product_at(call, *operands)
    source = call.source
    (factor,) = (operand.value for operand in call.operands.values() if operand is not source)
    return _scaled(call, as_double(factor))


def _product_at(call: Call, first: Operand, second: Operand) -> Sensitivity:
    """Bound a product of bounded factors by the product rule ``d(a b) = b da + a db``."""
    sizes = [worst(largest_modulus(item, call), item, call) for item in (second, first)]
    if not all(bool(size.isfinite().all()) for size in sizes):
        raise NoBoundError(
            f"{call.name} combines two values that depend on the input, which has no global Lipschitz constant."
        )
    terms = [_broadcast(item, call.value).plain() for item in (first, second)]
    return Sensitivity(log_sum([shifted(term, log(size)) for term, size in zip(terms, sizes, strict=True)]))


def _add_product(call: Call) -> Sensitivity:
    call.argument("input")
    if call.argument("value", 1) != 1:
        raise NoBoundError(f"{call.name} is called with a factor; write it as a product.")
    source = call.source
    (factor,) = (call.operands[name].value for name in ("tensor1", "tensor2") if call.operands[name] is not source)
    return _scaled(call, as_double(factor))


def _divide(call: Call) -> Sensitivity:
    if not call.operands["other"].is_constant:
        return quotient(call)
    return _scaled(call, 1 / as_double(call.argument("other")))


def _scaled(call: Call, factor: Tensor) -> Sensitivity:
    sensitivity = _broadcast(call.source, call.value)
    ball = call.sensitivity.range
    factor = factor.to(call.value.device)
    if factor.numel() == 1:
        size = factor.abs().reshape(())
        kept = (
            replace(ball, radius=ball.radius * size, norm=ball.norm * size)
            if isinstance(ball, Ball) and call.copies == 1
            else None
        )
        return Sensitivity(shifted(sensitivity, log(size)), sensitivity.scale, kept)
    layer = replace(layer_of(call, None), scale=sensitivity.scale)
    return (
        diagonal_gain(factor, layer).after(Sensitivity(sensitivity.log_norm, sensitivity.scale))
        if factor.any()
        else Sensitivity(shifted(sensitivity, log(0.0)))
    )


def _flips(call: Call) -> Sensitivity:
    return replace(call.sensitivity, range=None)


def _concatenate(call: Call) -> Sensitivity:
    tensors = call.operands["tensors"]
    if not isinstance(tensors.value, list | tuple):
        raise NoBoundError(f"{call.name} takes a list of tensors.")
    sensitivities = tensors.sensitivity if isinstance(tensors.sensitivity, tuple) else tensors.sensitivity.parts
    varying = [sensitivity for sensitivity in sensitivities if sensitivity.log_norm is not None]
    scale = None
    if any(sensitivity.scale is not None for sensitivity in varying):
        ones = [torch.ones((), dtype=torch.float64, device=item.device) for item in tensors.value]
        pieces = zip(sensitivities, tensors.value, ones, strict=True)
        scale = call.again(
            [
                (one if sensitivity.scale is None else sensitivity.scale).expand(item.shape)
                for sensitivity, item, one in pieces
            ]
        )
    return Sensitivity(
        side_by_side([sensitivity.log_norm for sensitivity in varying if sensitivity.log_norm is not None]), scale
    )


def register_rules() -> None:
    """Register the rules of this family."""
    register(_sum, "input other", operator.add, operator.sub)
    register(_sum, "input other alpha", torch.add, torch.sub, "add", "sub")
    register(_multiply, "input other", operator.mul, torch.mul, "mul")
    register(_add_product, "input tensor1 tensor2 value", torch.addcmul, "addcmul")
    register(_divide, "input other", operator.truediv, torch.div, "div")
    register(_flips, "input", operator.neg, torch.neg, "neg")
    register(_concatenate, "tensors dim", torch.cat, torch.concat, torch.stack, "cat", "stack", "concat")
