"""The bound rules of functions and tensor methods, by what the graph calls.

A rule sees a call with its arguments under their names; an argument that it does not name is refused, and so is every
function without a rule. ATen operators, which :func:`torch.export` leaves, are found by the name of their method.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from fisher_reg.bounds.calls import Call, FunctionRule, Operand, Reach, as_double, log, log_sum, name_of, side_by_side
from fisher_reg.bounds.normalizations import diagonal_gain
from fisher_reg.bounds.registry import Ball, Gain, Layer
from fisher_reg.errors import NoBoundError

FUNCTION_RULES: dict[Any, FunctionRule] = {}
"""From what the graph calls, a function or the name of a method, to its rule."""


def find_function_rule(target: Any) -> FunctionRule | None:
    """Return the rule of a function, the name of a method, or an ATen operator."""
    if isinstance(target, torch._ops.OpOverload):
        return FUNCTION_RULES.get(name_of(target)) if target.namespace == "aten" else None
    if target in FUNCTION_RULES:
        return FUNCTION_RULES[target]
    module = getattr(target, "__module__", "") or ""
    return FUNCTION_RULES.get(name_of(target)) if module.startswith("torchvision.ops") else None


def adds(node: fx.Node) -> bool:
    """Say whether the node is a sum or a difference."""
    rule = find_function_rule(node.target) if node.op in ("call_function", "call_method") else None
    return rule is not None and rule.apply is _sum


def moves(node: fx.Node) -> bool:
    """Say whether the node moves entries without a change."""
    rule = find_function_rule(node.target) if node.op in ("call_function", "call_method") else None
    return rule is not None and rule.apply in (_moves, _same)


def passes_channels(target: Any) -> bool:
    """Say whether the function leaves each channel where it is and apart from the others."""
    rule = find_function_rule(target)
    return rule is not None and (
        rule.is_layer and rule.apply.__name__ == "as_module" or rule.apply in (_same, _dropout)
    )


def layer_of(call: Call) -> Layer:
    """Return the call as the call of a layer of one input."""
    reach = call.reach
    return Layer(
        {"input": call.source.value},
        call.value,
        call.norms,
        reach.range,
        is_local=call.is_local,
        scale=reach.scale,
    )


def _same(call: Call) -> Reach:
    return call.reach


def _flips(call: Call) -> Reach:
    return replace(call.reach, range=None)


def _moves(call: Call) -> Reach:
    """Entries are moved or dropped, each is used once at most."""
    reach = call.reach
    moved = None if reach.scale is None else _replayed(call, reach.scale)
    ranges = _moved_ranges(call, reach)
    if isinstance(call.value, list | tuple):
        scales = [None] * len(call.value) if moved is None else list(moved)
        parts = tuple(Reach(reach.log_norm, *part) for part in zip(scales, ranges, strict=True))
        return Reach(reach.log_norm, parts=parts)
    return Reach(reach.log_norm, moved, ranges[0])


def _replayed(call: Call, entries: Tensor) -> Any:
    """Return where the call moves the entries of another tensor that broadcasts to its input."""
    return call.again(entries.expand(call.source.value.shape).contiguous())  # an expanded tensor refuses a view


def _moved_ranges(call: Call, reach: Reach) -> Sequence[Ball | None]:
    """Return the range of each output in which a vector along the last axis is still a part of one before."""
    count = len(call.value) if isinstance(call.value, list | tuple) else 1
    ball, value = reach.range, call.source.value
    if not isinstance(ball, Ball):
        return [None] * count
    owner = torch.arange(value[..., 0].numel(), device=value.device).view(value.shape[:-1])[..., None]
    columns = torch.arange(value.shape[-1], device=value.device) if ball.columns is None else ball.columns
    moved = [_replayed(call, entries) for entries in (owner, columns)]
    owners, places = moved if isinstance(call.value, list | tuple) else [[item] for item in moved]
    return [
        replace(ball, columns=place) if bool((part == part[..., :1]).all()) else None
        for part, place in zip(owners, places, strict=True)
    ]


def _dropout(call: Call) -> Reach:
    if call.argument("training", call.argument("train")) is not False:
        raise NoBoundError(f"{call.name} drops also in evaluation; pass training=self.training.")
    return call.reach


def _index(call: Call) -> Reach:
    source, index = call.operands["input"], call.operands["index"].value
    parts = source.reach if isinstance(source.reach, tuple) else source.reach.parts
    if parts:
        chosen: Any = parts[index]
        if isinstance(chosen, Reach):
            return chosen
        varying = [part.log_norm for part in chosen if part.log_norm is not None]
        return Reach(side_by_side(varying) if varying else None, parts=chosen)
    assert isinstance(source.reach, Reach)
    if isinstance(source.value, list | tuple):
        return source.reach  # the outputs of a module, of which only the first is ever taken
    indices = index if isinstance(index, tuple) else (index,)
    if not all(item is None or item is Ellipsis or isinstance(item, int | slice) for item in indices):
        raise NoBoundError(f"{call.name} is indexed with a list or tensor, which may repeat elements.")
    return _moves(call)


def _copies(call: Call) -> Reach:
    reach = call.reach
    scale = None if reach.scale is None else call.again(reach.scale.expand(call.source.value.shape))
    return Reach(shifted(reach, 0.5 * log(call.copies)), scale)


def shifted(reach: Reach, log_factor: Tensor | float) -> Tensor:
    """Return the log norm after a factor."""
    assert reach.log_norm is not None
    return reach.log_norm + log_factor


def _sum(call: Call) -> Reach:
    if call.argument("alpha", 1) != 1:
        raise NoBoundError(f"{call.name} is called with a factor; write it as a product.")
    if not isinstance(call.value, Tensor):
        raise NoBoundError(f"{call.name} joins tuples of tensors; concatenate the tensors.")
    terms = [_broadcast(operand, call.value) for operand in call.operands.values() if not operand.is_constant]
    if len(terms) == 1:
        return terms[0]
    scales = [term.scale for term in terms if term.scale is not None]
    scale = None
    if scales:  # the smaller coordinates: no term gets longer in them
        ones = [torch.ones((), dtype=torch.float64, device=call.value.device)] * (len(terms) - len(scales))
        scale = torch.stack([item.expand(call.value.shape) for item in (*scales, *ones)]).amin(0)
    return Reach(log_sum([term.within(scale) for term in terms]), scale)


def _broadcast(operand: Operand, value: Tensor) -> Reach:
    assert isinstance(operand.reach, Reach)
    return replace(
        operand.reach, log_norm=shifted(operand.reach, 0.5 * log(value.numel() / operand.value.numel())), range=None
    )


def _multiply(call: Call) -> Reach:
    operands = [item for item in call.operands.values() if isinstance(item.value, Tensor) and not item.is_constant]
    if call.is_local and len(operands) == 2:
        return _product_at(call, *operands)
    source = call.source
    (factor,) = (operand.value for operand in call.operands.values() if operand is not source)
    return _scaled(call, as_double(factor))


def _product_at(call: Call, first: Operand, second: Operand) -> Reach:
    """At the example the product rule holds: ``d(a b) = b da + a db``."""
    sizes = [item.value.double().abs().flatten(1).amax(1) for item in (second, first)]
    terms = [_broadcast(item, call.value).plain() for item in (first, second)]
    return Reach(log_sum([shifted(term, log(size)) for term, size in zip(terms, sizes, strict=True)]))


def _add_product(call: Call) -> Reach:
    call.argument("input")
    if call.argument("value", 1) != 1:
        raise NoBoundError(f"{call.name} is called with a factor; write it as a product.")
    (factor,) = (call.operands[name].value for name in ("tensor1", "tensor2") if call.operands[name].is_constant)
    return _scaled(call, as_double(factor))


def _divide(call: Call) -> Reach:
    if call.source is not call.operands["input"]:
        raise NoBoundError(f"{call.name} divides by a value that depends on the input: no global constant.")
    return _scaled(call, 1 / as_double(call.argument("other")))


def _scaled(call: Call, factor: Tensor) -> Reach:
    reach = _broadcast(call.source, call.value)
    ball = call.reach.range
    factor = factor.to(call.value.device)
    if factor.numel() == 1:
        size = factor.abs().reshape(())
        kept = (
            replace(ball, radius=ball.radius * size, norm=ball.norm * size)
            if isinstance(ball, Ball) and call.copies == 1
            else None
        )
        return Reach(shifted(reach, log(size)), reach.scale, kept)
    layer = replace(layer_of(call), scale=reach.scale)
    return (
        Reach(reach.log_norm, reach.scale).after(diagonal_gain(factor, layer))
        if factor.any()
        else Reach(shifted(reach, log(0.0)))
    )


def _concatenate(call: Call) -> Reach:
    tensors = call.operands["tensors"]
    if not isinstance(tensors.value, list | tuple):
        raise NoBoundError(f"{call.name} takes a list of tensors.")
    reaches = tensors.reach if isinstance(tensors.reach, tuple) else tensors.reach.parts
    varying = [reach for reach in reaches if reach.log_norm is not None]
    scale = None
    if any(reach.scale is not None for reach in varying):
        ones = [torch.ones((), dtype=torch.float64, device=item.device) for item in tensors.value]
        pieces = zip(reaches, tensors.value, ones, strict=True)
        scale = call.again(
            [(one if reach.scale is None else reach.scale).expand(item.shape) for reach, item, one in pieces]
        )
    return Reach(side_by_side([reach.log_norm for reach in varying if reach.log_norm is not None]), scale)


def _reduce(call: Call, log_factor: Tensor) -> Reach:
    reach = call.reach
    dims, keepdim = call.argument("dim"), call.argument("keepdim", False)
    dims = tuple(range(call.source.value.ndim)) if dims is None else dims
    scale = None if reach.scale is None else reach.scale.expand(call.source.value.shape).amin(dims, keepdim=keepdim)
    return Reach(shifted(reach, log_factor), scale)


def _mean(call: Call) -> Reach:
    return _reduce(call, 0.5 * log(call.copies))


def _total(call: Call) -> Reach:
    return _reduce(call, -0.5 * log(call.copies))


def _largest(call: Call) -> Reach:
    # Each output takes one entry, or shares equal ones out; the windows are disjoint.
    return _reduce(call, torch.zeros(()).double())


def _softmax(call: Call) -> Reach:
    # diag(p) - p p' has norm 1/2 at most.
    return Reach(shifted(call.reach.plain(), log(0.5)))


def _pad(call: Call) -> Reach:
    if call.argument("mode", "constant") != "constant":
        raise NoBoundError(f"{call.name} pads with copies; use a padding module, which has a rule.")
    reach = call.reach
    if reach.scale is None:
        return Reach(reach.log_norm)
    widths = list(call.argument("pad"))
    padded = F.pad(reach.scale.expand(call.source.value.shape), widths, value=float(reach.scale.detach().amax()))
    return Reach(reach.log_norm, padded)


def register(
    apply: Callable[[Call], Reach] | Callable[[Call], Gain], names: str | None, *targets: Any, is_layer: bool = False
) -> None:
    """Register a rule for functions and for the names of methods, with the names of its arguments in their order."""
    rule = FunctionRule(apply, None if names is None else tuple(names.split()), is_layer)
    FUNCTION_RULES.update(dict.fromkeys(targets, rule))


register(_sum, "input other", operator.add, operator.iadd, operator.sub, operator.isub)
register(_sum, "input other alpha", torch.add, torch.sub, "add", "add_", "sub", "sub_")
register(_multiply, "input other", operator.mul, operator.imul, torch.mul, "mul", "mul_")
register(_add_product, "input tensor1 tensor2 value", torch.addcmul, "addcmul")
register(_divide, "input other", operator.truediv, operator.itruediv, torch.div, "div", "div_")
register(_flips, "input", operator.neg, torch.neg, "neg", torch.abs, "abs")
register(_same, "input", "float", "double", "alias", "lift_fresh_copy", "detach", "detach_", torch.clone)
register(_same, "input dtype device layout memory_format other", "to", "_to_copy", "clone", "contiguous", "type_as")
register(_concatenate, "tensors dim", torch.cat, torch.concat, torch.stack, "cat", "stack", "concat")
register(_mean, "input dim keepdim", torch.mean, "mean")
register(_total, "input dim keepdim", torch.sum, "sum")
register(_largest, "input dim keepdim", torch.amax, torch.amin, "amax", "amin")
register(_copies, None, "expand", "expand_as", "repeat")
register(_index, "input index", operator.getitem)
register(_moves, None, torch.flatten, "flatten", torch.reshape, torch.permute, "reshape", "view", "permute")
register(_moves, None, torch.transpose, "transpose", torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze", "t")
register(_moves, None, torch.select, "select", "slice", torch.chunk, "chunk", torch.split, "split", "split_with_sizes")
register(_moves, None, torch.unbind, "unbind", torch.roll, "roll", torch.flip, "flip", "narrow", torch.narrow)
register(_moves, None, F.pixel_shuffle, F.pixel_unshuffle, "pixel_shuffle", "pixel_unshuffle")
register(_moves, None, "unflatten", "_unsafe_view", "swapaxes", torch.swapaxes)
register(_dropout, "input p training inplace", F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
register(_dropout, "input p mode training", "stochastic_depth")
register(_dropout, "input p train", "dropout", "feature_dropout")
register(_softmax, "input dim dtype half_to_float _stacklevel", torch.softmax, F.softmax, "softmax", "_softmax")
register(_pad, "input pad mode value", F.pad, "constant_pad_nd", "pad")
