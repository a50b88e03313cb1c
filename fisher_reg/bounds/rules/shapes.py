"""The bound rules of what moves, drops or copies entries and changes none."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.identity import same
from fisher_reg.bounds.rules.layer import Ball, Layer, ScaledGain
from fisher_reg.bounds.rules.registry import (
    find_function_rule,
    register,
    register_bound_rule,
)
from fisher_reg.bounds.sensitivity import Sensitivity, log, shifted, side_by_side
from fisher_reg.errors import NoBoundError


def moves(node: fx.Node) -> bool:
    """Say whether the node moves entries without a change."""
    rule = find_function_rule(node.target) if node.op in ("call_function", "call_method") else None
    return rule is not None and rule.apply in (move_entries, same)


def moved_module(module: nn.Module, layer: Layer) -> ScaledGain:
    """Move the entries of the coordinates as those of the value."""
    return ScaledGain(1.0, scale=None if layer.scale is None else module(layer.scale.expand(layer.input.shape)))


def move_entries(call: Call) -> Sensitivity:
    """Entries are moved or dropped, each is used once at most."""
    sensitivity = call.sensitivity
    moved = None if sensitivity.scale is None else _replayed(call, sensitivity.scale)
    ranges = _moved_ranges(call, sensitivity)
    if isinstance(call.value, list | tuple):
        scales = [None] * len(call.value) if moved is None else list(moved)
        parts = tuple(Sensitivity(sensitivity.log_norm, *part) for part in zip(scales, ranges, strict=True))
        return Sensitivity(sensitivity.log_norm, parts=parts)
    return Sensitivity(sensitivity.log_norm, moved, ranges[0])


def _replayed(call: Call, entries: Tensor) -> Any:
    """Return where the call moves the entries of another tensor that broadcasts to its input."""
    return call.again(entries.expand(call.source.value.shape).contiguous())  # an expanded tensor refuses a view


def _moved_ranges(call: Call, sensitivity: Sensitivity) -> Sequence[Ball | None]:
    """Return the range of each output in which a vector along the last axis is still a part of one before."""
    count = len(call.value) if isinstance(call.value, list | tuple) else 1
    ball, value = sensitivity.range, call.source.value
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
        return source.sensitivity  # the outputs of a module, of which only the first is ever taken
    indices = index if isinstance(index, tuple) else (index,)
    if not all(item is None or item is Ellipsis or isinstance(item, int | slice) for item in indices):
        raise NoBoundError(f"{call.name} is indexed with a list or tensor, which may repeat elements.")
    return move_entries(call)


def _copies(call: Call) -> Sensitivity:
    sensitivity = call.sensitivity
    scale = None if sensitivity.scale is None else call.again(sensitivity.scale.expand(call.source.value.shape))
    return Sensitivity(shifted(sensitivity, 0.5 * log(call.copies)), scale)


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
