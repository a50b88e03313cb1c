r"""The bound rules of functions that copy entries, add them up, or are another linear map without weights.

If each output is one input or a constant, and each input is used at most c times, the norm is at most :math:`\sqrt c`.
To count the uses, the function is applied to the indices of the inputs. The norm of a matrix without negative entries
is at most :math:`\sqrt{r c}` with its largest row sum r and column sum c (Schur); both are computed with a vector of
ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fisher_reg.bounds.operator_norms.matrix import linear_norm
from fisher_reg.bounds.operator_norms.ranges import Interval, Range, largest_entry
from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.layer import Gain, Layer, ScaledGain
from fisher_reg.bounds.rules.registry import register, register_bound_rule
from fisher_reg.bounds.sensitivity import Sensitivity, log, shifted
from fisher_reg.errors import NoBoundError


def _places(apply: Callable[[Tensor], Any], like: Tensor) -> list[Tensor]:
    """Return for each output the index of its input, from 1 on; 0 for a constant."""
    numbers = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device).view(like.shape)
    moved, zeros = apply(numbers), apply(torch.zeros_like(numbers))
    parts = zip(*(item if isinstance(item, list | tuple) else (item,) for item in (moved, zeros)), strict=True)
    return [(part - zero).round().long() for part, zero in parts]


def _most_used(places: list[Tensor], size: int) -> float:
    counts = torch.bincount(torch.cat([part.flatten() for part in places]), minlength=size + 1)[1:]
    return float(counts.max())


def _scale_at(scale: Tensor | None, like: Tensor, place: Tensor) -> Tensor | None:
    """Return the scaling of the outputs; for constants the largest."""
    if scale is None:
        return None
    entries = scale.expand(like.shape).reshape(-1)
    return torch.where(place > 0, entries[(place - 1).clamp_min(0)], entries.detach().amax())


def copy_entries(call: Call) -> Sensitivity:
    """Bound a call whose outputs are inputs or constants."""
    first, source = next(iter(call.operands.values())), call.source
    if first is not source:
        raise NoBoundError(f"{call.name}: an argument other than the first depends on the input of the network.")
    sensitivity = call.sensitivity
    places = _places(call.again, source.value)
    log_norm = shifted(sensitivity, 0.5 * log(_most_used(places, source.value.numel())))
    known = _range_with_zeros(sensitivity.range)
    parts = [Sensitivity(log_norm, _scale_at(sensitivity.scale, source.value, place), known) for place in places]
    if isinstance(call.value, list | tuple):
        return Sensitivity(log_norm, parts=tuple(parts))
    return parts[0]


def _range_with_zeros(known: Range | None) -> Interval | None:
    if isinstance(known, Interval):
        return Interval(min(known.low, 0.0), max(known.high, 0.0))
    size = largest_entry(known)
    return Interval(-size, size) if size < math.inf else None


def _copied_by_module(module: nn.Module, layer: Layer) -> ScaledGain:
    (place,) = _places(module, layer.input)
    used = _most_used([place], layer.input.numel())
    return ScaledGain(math.sqrt(used), scale=_scale_at(layer.scale, layer.input, place))


def _schur(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return the root of the product of the largest row sum and column sum."""
    with torch.enable_grad():
        ones = torch.ones(like.shape, dtype=torch.float64, device=like.device).requires_grad_()
        rows = apply(ones)
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    return (rows.detach().amax() * columns.amax()).sqrt()


def _add_up(call: Call) -> Sensitivity:
    source = call.source
    return Sensitivity(shifted(call.sensitivity.plain(), log(_schur(call.again, source.value))))


def _added_up_by_module(module: nn.Module, layer: Layer) -> Gain:
    return Gain(_schur(module, layer.input))


def _along_axis(call: Call) -> Sensitivity:
    """Bound a linear map of one axis by the norm of its matrix."""
    source = call.source.value
    dim = call.argument("dim", -1)
    count = call.argument("n", 1)
    if call.argument("prepend") is not None or call.argument("append") is not None:
        raise NoBoundError(f"{call.name} has a bound rule without other tensors.")
    basis = torch.eye(source.shape[dim], dtype=torch.float64, device=source.device)
    matrix = torch.diff(basis, n=count, dim=0) if call.function == "diff" else torch.cumsum(basis, 0)
    return Sensitivity(shifted(call.sensitivity.plain(), log(linear_norm(matrix))))


def _replayed(call: Call) -> Tensor | None:
    """Return the widths after a linear map without negative entries."""
    deviation = call.source.around
    if deviation is None:
        return None
    width = deviation.width.contiguous()
    moved: Tensor = call.again(width) - call.again(torch.zeros_like(width))
    return moved


def _attribute(call: Call) -> Sensitivity:
    """Bound an attribute: a transposed tensor, or one of the tensors of a named tuple."""
    name = call.argument("name")
    source = call.operands["input"]
    assert isinstance(source.sensitivity, Sensitivity)
    if isinstance(source.value, Tensor) and name in ("T", "mT", "H", "mH", "data", "real"):
        return copy_entries(call)
    if source.sensitivity.parts and name in ("values", "indices"):
        return source.sensitivity.parts[0 if name == "values" else 1]
    raise NoBoundError(f"{call.name}: the attribute {name} has no bound rule.")


def register_rules() -> None:
    """Register the rules of this family."""
    register(copy_entries, None, torch.tile, "tile", torch.repeat_interleave, "repeat_interleave")
    register(copy_entries, None, torch.index_select, "index_select", torch.gather, "gather", "index")
    register(copy_entries, None, torch.take_along_dim, "take_along_dim", torch.take, "take", "masked_select")
    register(copy_entries, None, F.unfold, "unfold", "im2col", torch.rot90, "rot90")
    register(copy_entries, None, torch.triu, "triu", torch.tril, "tril", torch.diagonal, "diagonal")
    register(copy_entries, None, torch.diag_embed, "diag_embed", torch.movedim, "movedim", torch.moveaxis, "moveaxis")
    register(copy_entries, None, torch.swapdims, "swapdims", torch.ravel, "ravel", torch.fliplr, "fliplr")
    register(copy_entries, None, torch.flipud, "flipud", torch.tensor_split, "tensor_split", torch.adjoint, "adjoint")
    register(copy_entries, None, F.channel_shuffle, "channel_shuffle")
    register(copy_entries, None, torch.broadcast_to, "broadcast_to", torch.t, torch.unflatten)
    register(_attribute, "input name", getattr)
    register(_add_up, None, F.fold, "col2im")
    register(_along_axis, "input dim dtype", torch.cumsum, "cumsum")
    register(_along_axis, "input n dim prepend append", torch.diff, "diff")
    register_bound_rule(nn.Unfold)(_copied_by_module)
    register_bound_rule(nn.Fold)(_added_up_by_module)
    copy_entries.width = _add_up.width = _replayed  # type: ignore[attr-defined]
    for rule in (copy_entries, _add_up, _along_axis):
        rule.is_affine = lambda call: True  # type: ignore[attr-defined]
