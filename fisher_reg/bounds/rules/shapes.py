"""The bound rules of functions that move, drop or copy entries."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisher_reg.bounds.operator_norms.ranges import Interval, Range, Tokens, ball_of, largest_entry
from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.copies import copy_entries
from fisher_reg.bounds.rules.identity import same
from fisher_reg.bounds.rules.layer import Layer, ScaledGain
from fisher_reg.bounds.rules.registry import (
    find_function_rule,
    register,
    register_bound_rule,
)
from fisher_reg.bounds.sensitivity import Sensitivity, log, shifted, side_by_side
from fisher_reg.errors import NoBoundError


def moves(node: fx.Node) -> bool:
    """Return whether the node only moves entries."""
    rule = find_function_rule(node.target) if node.op in ("call_function", "call_method") else None
    return rule is not None and rule.apply in (move_entries, same)


def moved_module(module: nn.Module, layer: Layer) -> ScaledGain:
    """Move the entries of the scaling like those of the value."""
    return ScaledGain(1.0, scale=None if layer.scale is None else module(layer.scale.expand(layer.input.shape)))


def move_entries(call: Call) -> Sensitivity:
    """Bound a call that moves or drops entries and uses each at most once."""
    sensitivity = call.sensitivity
    moved = None if sensitivity.scale is None else _replayed(call, sensitivity.scale)
    ranges = _moved_ranges(call, sensitivity)
    if isinstance(call.value, list | tuple):
        scales = [None] * len(call.value) if moved is None else list(moved)
        parts = tuple(Sensitivity(sensitivity.log_norm, *part) for part in zip(scales, ranges, strict=True))
        return Sensitivity(sensitivity.log_norm, parts=parts)
    return Sensitivity(sensitivity.log_norm, moved, ranges[0])


def _replayed(call: Call, entries: Tensor) -> Any:
    """Apply the call to another tensor that broadcasts to its input."""
    return call.again(entries.expand(call.source.value.shape).contiguous())  # an expanded tensor has no view


def _moved_ranges(call: Call, sensitivity: Sensitivity) -> Sequence[Range | None]:
    """Return the range of each output: that of vectors if each is a part of an input vector, else that of entries."""
    count = len(call.value) if isinstance(call.value, list | tuple) else 1
    known, value = sensitivity.range, call.source.value
    if known is None or isinstance(known, Interval):
        return [known] * count
    ball = ball_of(known) if isinstance(known, Tokens) else known
    entries = Interval(-largest_entry(known), largest_entry(known))
    owner = torch.arange(value[..., 0].numel(), device=value.device).view(value.shape[:-1])[..., None]
    columns = torch.arange(value.shape[-1], device=value.device) if ball.columns is None else ball.columns
    moved = [_replayed(call, entries) for entries in (owner, columns)]
    owners, places = moved if isinstance(call.value, list | tuple) else [[item] for item in moved]
    found: list[Range | None] = []
    for part, place in zip(owners, places, strict=True):
        is_one_vector = part.ndim > 0 and bool((part == part[..., :1]).all())
        is_whole = is_one_vector and ball.columns is None and _is_counted(place, value.shape[-1])
        found.append(known if is_whole else replace(ball, columns=place) if is_one_vector else entries)
    return found


def _is_counted(places: Tensor, size: int) -> bool:
    """Return whether the entries along the last axis are all entries of a vector, in order."""
    return places.shape[-1] == size and bool((places == torch.arange(size, device=places.device)).all())


def _index(call: Call) -> Sensitivity:
    source, index = call.operands["input"], call.operands["index"].value
    parts = source.sensitivity if isinstance(source.sensitivity, tuple) else source.sensitivity.parts
    if parts:
        chosen: Any = parts[index]
        if isinstance(chosen, Sensitivity):
            return chosen
        varying = [part.log_norm for part in chosen if part.log_norm is not None]
        return Sensitivity(side_by_side(varying) if varying else None, parts=chosen)
    assert isinstance(source.sensitivity, Sensitivity)
    if isinstance(source.value, list | tuple):
        return source.sensitivity  # the outputs of a module, of which only the first is used
    indices = index if isinstance(index, tuple) else (index,)
    if not call.operands["index"].is_constant:
        raise NoBoundError(f"{call.name} is indexed by a value that depends on the input, which is not continuous.")
    if not all(item is None or item is Ellipsis or isinstance(item, int | slice) for item in indices):
        return copy_entries(call)
    return move_entries(call)


def _copies(call: Call) -> Sensitivity:
    sensitivity = call.sensitivity
    scale = None if sensitivity.scale is None else call.again(sensitivity.scale.expand(call.source.value.shape))
    known = sensitivity.range if isinstance(sensitivity.range, Interval) else None
    return Sensitivity(shifted(sensitivity, 0.5 * log(call.copies)), scale, known)


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(nn.Flatten, nn.Unflatten)(moved_module)
    register(_copies, None, "expand", "expand_as", "repeat", shape_only="*")
    register(_index, "input index", operator.getitem)
    register(move_entries, None, "view_as", "reshape_as", shape_only="*")
    register(move_entries, None, "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
    register(move_entries, None, torch.flatten, "flatten", torch.reshape, torch.permute, "reshape", "view", "permute")
    register(move_entries, None, torch.transpose, "transpose", "t")
    register(move_entries, None, torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze")
    register(move_entries, None, torch.select, "select", "slice", torch.chunk, "chunk")
    register(move_entries, None, torch.split, "split", "split_with_sizes")
    register(move_entries, None, torch.unbind, "unbind", torch.roll, "roll", torch.flip, "flip", "narrow", torch.narrow)
    register(move_entries, None, "unflatten", "_unsafe_view", "swapaxes", torch.swapaxes)
