r"""How far the values of a network can be from those at an example, for all inputs of a region around it.

Every value :math:`h` has two bounds. Its sensitivity :math:`L` over the region gives
:math:`\|T(h(x') - h(x))\| \le L r` in its coordinates T, and therefore :math:`|h_i(x') - h_i(x)| \le L r / T_i`. And
the widths of what it is made of give its own: those of a linear map by its rows, :math:`\sum_j |W_{ij}| w_j` or
:math:`\|W_i T^{-1}\| L r` of its input; those of a monotone activation at the ends of the interval. The smaller counts.

With the widths comes the *remainder* of each layer that is not affine: how much its Jacobian can differ from that at
the example. For an activation it is the change of its slope; for max pooling it is zero for a window whose largest
entry stays the largest; for any other layer it is twice the layer's own constant.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from fisher_reg.bounds.region import Region
from fisher_reg.bounds.rules import (
    arithmetic,
    identity,
    linear,
    normalization,
    padding,
    reductions,
    resampling,
    shapes,
    writes,
)
from fisher_reg.bounds.rules.activations import activation_gain
from fisher_reg.bounds.rules.call import Call
from fisher_reg.bounds.rules.elementwise import quotient_width
from fisher_reg.bounds.rules.extents import distance_to
from fisher_reg.bounds.rules.layer import Deviation
from fisher_reg.bounds.rules.normalization import batch_norm_rule, batch_norm_scale
from fisher_reg.bounds.rules.pooling import AVERAGE_RULES, MAX_RULES
from fisher_reg.bounds.rules.registry import find_function_rule, find_rule
from fisher_reg.bounds.rules.slopes import range_within, slopes_at, slopes_within
from fisher_reg.bounds.sensitivity import Sensitivity
from fisher_reg.bounds.tracing import Trace


@dataclass(frozen=True)
class Remainder:
    r"""By how much the Jacobian of one layer can differ from the one at the example, over the region.

    For a row :math:`b` of the Jacobian of the logits with respect to the layer's output, at the example, the difference
    adds at most :math:`\|b \odot \rho\|\, e^{\text{log\_norm}}` to the row of the whole.

    Attributes:
        node: The layer.
        weights: :math:`\rho`, broadcastable to the output.
        log_norm: ``(B,)`` or ``()``.
    """

    node: fx.Node
    weights: Tensor
    log_norm: Tensor


_SMOOTHING = 1e-9
"""Relative excess of all widths, far above the rounding of float64."""


@dataclass
class Deviations:
    """Visits the calls in order and keeps the deviations of their values."""

    trace: Trace
    region: Region
    tangents: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    widths: dict[fx.Node, Any] = field(default_factory=dict)
    lengths: dict[fx.Node, Tensor] = field(default_factory=dict)
    remainders: list[Remainder] = field(default_factory=list)
    varying: set[fx.Node] = field(default_factory=set)

    def of(self, node: fx.Node) -> Deviation | None:
        """Return the deviation of a tensor that depends on the input."""
        width = self.widths.get(node)
        return Deviation(width, self.lengths[node]) if isinstance(width, Tensor) else None

    def visit(
        self,
        node: fx.Node,
        sensitivity: Sensitivity,
        before: Mapping[fx.Node, Sensitivity],
        call: Call | None,
        is_head: bool,
    ) -> None:
        """Keep the widths of a value and the remainder of its layer.

        Args:
            node: The call.
            sensitivity: Of its value; for the head, of its input.
            before: The sensitivities of the nodes before.
            call: The call, for a function.
            is_head: Whether it is the last linear layer.
        """
        value = self.trace.values[node]
        if sensitivity.is_constant or node.op == "output":
            return
        self.varying.add(node)
        if node.op == "placeholder":
            self.widths[node] = (self.region.width * (1 + _SMOOTHING)).expand(value.shape)
            self.lengths[node] = self.region.radius * (1 + _SMOOTHING)
            return
        found = self._width(node, value, before, call)
        if isinstance(value, Tensor):
            if found is not None:
                found = torch.where(found.isnan(), math.inf, found)
            if not is_head:
                length = lipschitz_of(sensitivity.plain()).detach().exp() * self.region.radius
                self.lengths[node] = length * (1 + _SMOOTHING)
                found = _smaller(found, self._from_length(node, value, sensitivity))
                if node in self.tangents:
                    found = torch.minimum(found, self._from_rows(node, value, sensitivity))
                if sensitivity.range is not None:
                    found = torch.minimum(found, distance_to(sensitivity.range, value))
            if found is not None:
                self.widths[node] = found * (1 + _SMOOTHING)
                batched, width = node in self.trace.batched, self.widths[node]
                vectors = width.reshape(len(width) if batched else 1, -1)
                own = torch.linalg.vector_norm(vectors, dim=1).view(-1 if batched else ())
                self.lengths[node] = torch.minimum(self.lengths.get(node, own), own)
        elif isinstance(value, tuple | list):
            self.widths[node] = found
        if not is_head:
            self._remain(node, value, sensitivity, before, call)

    def _from_length(self, node: fx.Node, value: Tensor, sensitivity: Sensitivity) -> Tensor:
        """Return the widths that the sensitivity allows: an entry moves no further than the whole."""
        length = self._length_along(node, sensitivity, value.ndim)
        scale = 1.0 if sensitivity.scale is None else sensitivity.scale.detach()
        return (length / scale).expand(value.shape)

    def _from_rows(self, node: fx.Node, value: Tensor, sensitivity: Sensitivity) -> Tensor:
        """Return the widths by the rows of the Jacobian at the example, and what may be added to it."""
        rows = torch.linalg.vector_norm(self.tangents[node], dim=1).view(value.shape)
        error = error_of(sensitivity).detach().exp().view(-1, *[1] * (value.ndim - 1))
        scale = 1.0 if sensitivity.scale is None else sensitivity.scale.detach()
        widths: Tensor = (rows + error / scale) * self.region.radius.view(-1, *[1] * (value.ndim - 1))
        return widths

    def refined(
        self, node: fx.Node, sensitivity: Sensitivity, before: Mapping[fx.Node, Sensitivity], call: Call | None
    ) -> Sensitivity:
        r"""Return a sensitivity with what the Jacobian at the example says of it.

        The Jacobian of a value is M at the example, and at most e away from it over the region. An affine layer of norm
        g makes :math:`g e` of e; any other adds :math:`\|(J_l(x') - J_l(x)) M\|`. The constant is then at most
        :math:`\|M\| + e`.
        """
        if not self.tangents or sensitivity.is_constant or node.op in ("output", "placeholder") or sensitivity.parts:
            return sensitivity
        assert sensitivity.log_norm is not None
        lipschitz, error = lipschitz_of(sensitivity), error_of(sensitivity)
        if not self._is_affine(node, call):
            added = self._added(node, sensitivity, before, call)
            error = torch.logaddexp(error, added) if added is not None else lipschitz + math.log(2.0)
        if node in self.tangents:
            size = _log_norm(self.tangents[node], sensitivity.scale)
            lipschitz = torch.minimum(lipschitz, torch.logaddexp(size, error))
            error = torch.minimum(error, torch.logaddexp(size, lipschitz))
        rows = torch.stack(torch.broadcast_tensors(lipschitz, error))
        return replace(sensitivity, log_norm=rows)

    def _added(
        self, node: fx.Node, after: Sensitivity, before: Mapping[fx.Node, Sensitivity], call: Call | None
    ) -> Tensor | None:
        r"""Return the log of :math:`\|(J_l(x') - J_l(x)) M\|` ``(B,)``, None where nothing is known of it."""
        inputs = [item for item in node.all_input_nodes if item in self.tangents and not before[item].is_constant]
        varying = [item for item in node.all_input_nodes if not before[item].is_constant]
        if len(varying) != 1 or inputs != varying or node not in self.trace.batched:
            return None
        (source,) = inputs
        tangents, width = self.tangents[source], self.widths.get(source)
        if not isinstance(width, Tensor):
            return None
        change = self._change_of_slope(node, source, call)
        if change is not None:  # the change is diagonal
            scale = before[source].scale
            weights = change if scale is None else change * scale.detach()
            return _log_norm(tangents, weights)
        gain = lipschitz_of(after).detach() - lipschitz_of(before[source]).detach()
        own = before[source].scale
        weights = torch.ones_like(width) if own is None else own.expand(width.shape)
        if call is None and find_rule(self.trace.modules[str(node.target)]) in MAX_RULES:
            weights = weights * self._in_doubt(self.trace.modules[str(node.target)], source, self.trace.values[node])
        return gain + math.log(2.0) + _log_norm(tangents, weights)

    def _in_doubt(self, module: nn.Module, source: fx.Node, value: Tensor) -> Tensor:
        """Return one for the entries of the windows of a max pooling that are not settled, else zero."""
        hidden, unsettled = self.trace.values[source], self._unsettled(module, source, value)
        kind = type(module).__name__
        if kind != "MaxPool2d" or _doubled(module.dilation) != (1, 1):
            return torch.ones_like(hidden)
        with torch.enable_grad():
            point = torch.zeros_like(hidden).requires_grad_()
            shares = F.avg_pool2d(point, module.kernel_size, module.stride, module.padding, module.ceil_mode)  # type: ignore
            (found,) = torch.autograd.grad((shares * unsettled).sum(), point)
        return (found > 0).to(hidden)

    def _change_of_slope(self, node: fx.Node, source: fx.Node, call: Call | None) -> Tensor | None:
        """Return by how much the slope of an activation can differ from that at the example, None for another layer."""
        activation = self._activation(node, call)
        if activation is None:
            return None
        hidden = self.trace.values[source]
        slopes = slopes_within(activation, hidden, self.widths[source])
        if slopes is None:
            return None
        here = slopes_at(activation, hidden)
        return torch.maximum(slopes[1] - here, here - slopes[0]).clamp_min(0)

    def _length_along(self, node: fx.Node, sensitivity: Sensitivity, ndim: int) -> Tensor:
        """Return how far a value can move in its coordinates, per example where it has an axis of the examples."""
        length = lipschitz_of(sensitivity).detach().exp() * self.region.radius
        return length.view(-1, *[1] * (ndim - 1)) if node in self.trace.batched else length.max()

    def _width(self, node: fx.Node, value: Any, before: Mapping[fx.Node, Sensitivity], call: Call | None) -> Any:
        if node.op == "call_module":
            inputs = [item for item in node.all_input_nodes if isinstance(self.widths.get(item), Tensor)]
            if len(inputs) != 1 or not isinstance(value, Tensor):
                return None
            module = self.trace.modules[str(node.target)]
            return self._of_module(module, inputs[0], before[inputs[0]])
        return None if call is None else self._of_call(node, value, before, call)

    def _of_module(self, module: nn.Module, source: fx.Node, before: Sensitivity) -> Tensor | None:
        width, hidden = self.widths[source], self.trace.values[source]
        rule: Any = find_rule(module)
        if rule is linear.linear_rule:
            return self._through_weight(module.weight, source, before, F.linear)  # type: ignore[arg-type]
        if rule is linear.conv_rule:
            convolve: Callable[[Tensor, Tensor], Tensor] = lambda item, kernel: module._conv_forward(item, kernel, None)  # type: ignore  # noqa: E731
            return self._through_weight(module.weight, source, before, convolve, axis=1)  # type: ignore[arg-type]
        if rule is batch_norm_rule:
            factor = batch_norm_scale(module).abs().detach()  # type: ignore[arg-type]
            scaled: Tensor = width * factor.view(1, -1, *[1] * (width.ndim - 2))
            return scaled
        if rule is activation_gain:
            return range_within(module, hidden, width)
        if rule in _MONOTONE_MODULES or rule in AVERAGE_RULES or rule in MAX_RULES:
            moved = module(width.contiguous()) - module(torch.zeros_like(width))
            return moved if isinstance(moved, Tensor) else None
        return None

    def _through_weight(
        self,
        weight: Tensor,
        source: fx.Node,
        before: Sensitivity,
        apply: Callable[[Tensor, Tensor], Tensor],
        axis: int = -1,
    ) -> Tensor:
        """Return the widths after a linear map: by the widths before, or by the norms of its rows."""
        kernel, width = weight.detach().double(), self.widths[source]
        by_width = apply(width, kernel.abs())
        # |W_i T^-1| L r, for a row of the kernel and the smallest scale of each channel
        scale = torch.ones((), dtype=torch.float64, device=kernel.device)
        if before.scale is not None:
            scale = before.scale.detach().expand(width.shape)
            scale = scale.amin([other for other in range(scale.ndim) if other != axis % scale.ndim])
        if scale.ndim and axis == 1 and kernel.shape[1] != len(scale):  # the channels of its groups
            scale = scale.amin()
        rows = kernel / scale.view(1, -1, *[1] * (kernel.ndim - 2)) if scale.ndim else kernel / scale
        norms = torch.linalg.vector_norm(rows.flatten(1), dim=1)
        shape = [1] * by_width.ndim
        shape[axis] = -1
        by_length = norms.view(shape) * self._length_along(source, before, by_width.ndim)
        return torch.minimum(by_width, by_length)

    def _of_call(self, node: fx.Node, value: Any, before: Mapping[fx.Node, Sensitivity], call: Call) -> Any:
        rule: Any = getattr(find_function_rule(node.target), "apply", None)
        varying = [name for name, operand in call.operands.items() if not operand.is_constant]
        if hasattr(rule, "module_form") and isinstance(value, Tensor):
            (source,) = [item for item in node.all_input_nodes if isinstance(self.widths.get(item), Tensor)]
            return self._of_module(rule.module_form(call), source, before[source])
        if hasattr(rule, "width"):
            return rule.width(call) if isinstance(value, Tensor) else None
        if rule is linear._linear:
            (source,) = [item for item in node.all_input_nodes if item in self.widths]
            return self._through_weight(call.argument("weight"), source, before[source], F.linear)
        if rule is linear._convolution:
            (source,) = [item for item in node.all_input_nodes if item in self.widths]
            convolve = (F.conv1d, F.conv2d, F.conv3d)[value.ndim - 3]
            options = {
                key: call.argument(key) for key in ("stride", "padding", "dilation", "groups") if key in call.operands
            }
            return self._through_weight(
                call.argument("weight"), source, before[source], partial(convolve, **options), axis=1
            )
        if rule in (arithmetic._multiply, arithmetic._divide):
            return self._of_product(call, value, rule is arithmetic._divide)
        if rule is arithmetic._sum:
            parts = [call.operands[name].deviation for name in varying]
            if any(part is None for part in parts):
                return None
            widths = [part.width.expand(value.shape) for part in parts if part is not None]
            return torch.stack(widths).sum(0)
        if rule in _SAME_CALLS:
            deviation = call.operands[varying[0]].deviation
            return None if deviation is None else deviation.width
        if rule in _MONOTONE_CALLS and node.target not in (torch.amin, "amin"):
            return self._replayed(node)
        return None

    def _of_product(self, call: Call, value: Tensor, divides: bool) -> Tensor | None:
        varying = [item for item in call.operands.values() if not item.is_constant]
        if divides and not call.operands["other"].is_constant:
            return quotient_width(call)
        if any(item.deviation is None for item in varying):
            return None
        if len(varying) == 1:
            (other,) = [item.value for item in call.operands.values() if item is not varying[0]][:1]
            factor = torch.as_tensor(other, dtype=torch.float64, device=value.device).abs()
            width = varying[0].deviation.width  # type: ignore[union-attr]
            return (width / factor if divides else width * factor).expand(value.shape)
        (first, second) = ((item.value.abs(), item.deviation.width) for item in varying)  # type: ignore[union-attr]
        moved: Tensor = first[0] * second[1] + second[0] * first[1] + first[1] * second[1]
        return moved.expand(value.shape)

    def _replayed(self, node: fx.Node) -> Any:
        """Return what a call that is monotone and linear in its tensors makes of the widths in place of the values."""

        def call(fill: Callable[[fx.Node], Any]) -> Any:
            args, keywords = fx.map_arg(node.args, fill), fx.map_arg(node.kwargs, fill)
            if isinstance(node.target, str):
                return getattr(args[0], node.target)(*args[1:], **keywords)
            function: Any = node.target
            return function(*args, **keywords)

        def width(item: fx.Node) -> Any:
            value = self.trace.values[item]
            known = self.widths.get(item)
            if known is not None:
                return known.contiguous() if isinstance(known, Tensor) else known
            is_operand = isinstance(value, Tensor) and value.is_floating_point()
            return torch.zeros_like(value) if is_operand else value

        def zero(item: fx.Node) -> Any:
            value = width(item)
            if isinstance(value, tuple | list):
                return type(value)(torch.zeros_like(part) if isinstance(part, Tensor) else part for part in value)
            return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        if any(item in self.varying and self.widths.get(item) is None for item in node.all_input_nodes):
            return None
        at, origin = call(width), call(zero)
        if isinstance(at, tuple | list):
            return type(at)(a - b for a, b in zip(at, origin, strict=True))
        return at - origin

    def _remain(
        self, node: fx.Node, value: Any, after: Sensitivity, before: Mapping[fx.Node, Sensitivity], call: Call | None
    ) -> None:
        """Keep the remainder of a layer that is not affine."""
        if self._is_affine(node, call):
            return
        inputs = [item for item in node.all_input_nodes if isinstance(self.widths.get(item), Tensor)]
        change = self._change_of_slope(node, inputs[0], call) if len(inputs) == 1 else None
        if change is not None:
            scale = before[inputs[0]].scale
            weights = change if scale is None else change / scale.detach()
            self.remainders.append(Remainder(node, weights, lipschitz_of(before[inputs[0]]).detach()))
            return
        assert after.log_norm is not None
        if not isinstance(value, Tensor):  # a module with several outputs, of which only the first is ever taken
            for user in node.users:
                self.remainders.append(
                    Remainder(user, torch.full((), 2.0).double(), lipschitz_of(after.plain()).detach())
                )
            return
        weights = torch.full((), 2.0, dtype=torch.float64, device=value.device)
        if call is None and find_rule(self.trace.modules[str(node.target)]) in MAX_RULES and len(inputs) == 1:
            module = self.trace.modules[str(node.target)]
            weights = 2.0 * self._unsettled(module, inputs[0], value)
        scale = after.scale
        weights = weights if scale is None else (weights / scale.detach()).expand(value.shape)
        self.remainders.append(Remainder(node, weights, lipschitz_of(after).detach()))

    def _unsettled(self, module: nn.Module, source: fx.Node, value: Tensor) -> Tensor:
        """Return one for each window of a max pooling in which another entry may become the largest, else zero.

        It stays the largest if its lowest value is above the highest of all others.
        """
        hidden, width = self.trace.values[source], self.widths[source]
        kind = type(module).__name__
        axes = int(kind[-2])
        pool = getattr(F, f"{'adaptive_' if kind.startswith('Adaptive') else ''}max_pool{axes}d")
        options: dict[str, Any] = (
            {"output_size": module.output_size}
            if kind.startswith("Adaptive")
            else {key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}
        )
        _, winner = pool(hidden, **options, return_indices=True)
        lowest = (hidden - width).flatten(-axes).gather(-1, winner.flatten(-axes)).view(value.shape)
        # Widths are rounded up, so that an upper end at the lower one is that of entries that never move.
        doubtful: Tensor = (self._runner_up(hidden + width, winner, axes, options) > lowest).to(value)
        return doubtful

    def _runner_up(self, upper: Tensor, winner: Tensor, axes: int, options: dict[str, Any]) -> Tensor:
        """Return the highest upper end in each window except that of its winner."""
        if axes != 2 or "output_size" in options or _doubled(options["padding"]) != (0, 0):
            return torch.full_like(winner, torch.inf, dtype=upper.dtype)
        if _doubled(options["dilation"]) != (1, 1) or options["ceil_mode"]:
            return torch.full_like(winner, torch.inf, dtype=upper.dtype)
        kernel, stride = _doubled(options["kernel_size"]), _doubled(options["stride"])
        places = torch.arange(upper.shape[-2] * upper.shape[-1], device=upper.device).view(upper.shape[-2:])
        windows = upper.unfold(-2, kernel[0], stride[0]).unfold(-2, kernel[1], stride[1]).flatten(-2)
        of_window = places.unfold(0, kernel[0], stride[0]).unfold(1, kernel[1], stride[1]).flatten(-2)
        others = windows.masked_fill(of_window == winner[..., None], -torch.inf)
        return others.amax(-1)

    def _activation(self, node: fx.Node, call: Call | None) -> nn.Module | None:
        if call is None:
            module = self.trace.modules[str(node.target)]
            return module if find_rule(module) is activation_gain else None
        rule: Any = getattr(find_function_rule(node.target), "apply", None)
        form = rule.module_form(call) if hasattr(rule, "module_form") else None
        return form if form is not None and find_rule(form) is activation_gain else None

    def _is_affine(self, node: fx.Node, call: Call | None) -> bool:
        if call is None:
            rule: Any = find_rule(self.trace.modules[str(node.target)])
            return rule in _AFFINE_MODULES or rule in AVERAGE_RULES
        rule = getattr(find_function_rule(node.target), "apply", None)
        if hasattr(rule, "module_form"):
            return isinstance(call.value, Tensor) and find_rule(rule.module_form(call)) in AVERAGE_RULES
        if hasattr(rule, "is_affine"):
            return bool(rule.is_affine(call))
        if rule in (arithmetic._multiply, arithmetic._divide):
            varying = [name for name, item in call.operands.items() if not item.is_constant]
            return len(varying) == 1 and (rule is arithmetic._multiply or varying[0] == "input")
        if rule is arithmetic._flips:
            return node.target in (operator.neg, torch.neg, "neg")
        return rule in _AFFINE_CALLS


_MONOTONE_MODULES = (identity.passes, shapes.moved_module, padding._constant_pad, padding._copying_pad)
_AFFINE_MODULES = (
    *_MONOTONE_MODULES,
    linear.linear_rule,
    linear.conv_rule,
    linear._transposed_conv,
    batch_norm_rule,
    resampling._upsample_module,
)
_SAME_CALLS = (identity.same, identity.drop, arithmetic._flips)
_MONOTONE_CALLS = (
    shapes.move_entries,
    shapes._copies,
    shapes._index,
    arithmetic._concatenate,
    reductions._mean,
    reductions._total,
    reductions._largest,
    padding._pad,
)
_AFFINE_CALLS = (
    *(rule for rule in (*_SAME_CALLS, *_MONOTONE_CALLS) if rule not in (arithmetic._flips, reductions._largest)),
    arithmetic._sum,
    linear._linear,
    linear._convolution,
    writes._scatter,
    writes._overwrite,
    writes._where,
    writes._masked_fill,
    writes._put,
    normalization._functional_batch_norm,
    resampling._interpolate,
)


def lipschitz_of(sensitivity: Sensitivity) -> Tensor:
    """Return the log of the Lipschitz constant."""
    assert sensitivity.log_norm is not None
    return sensitivity.log_norm[0] if sensitivity.log_norm.ndim == 2 else sensitivity.log_norm


def error_of(sensitivity: Sensitivity) -> Tensor:
    """Return the log of how far the Jacobian can be from that at the example."""
    assert sensitivity.log_norm is not None
    return sensitivity.log_norm[1]


def _log_norm(tangents: Tensor, weights: Tensor | None) -> Tensor:
    """Return the logs of the spectral norms of Jacobians ``(B, d, *S)`` with weighted rows, ``(B,)``."""
    matrix = tangents if weights is None else tangents * weights.detach().expand(tangents[:, 0].shape)[:, None]
    flat = matrix.flatten(2)
    gram = flat @ flat.mT if flat.shape[1] <= flat.shape[2] else flat.mT @ flat
    largest: Tensor = torch.linalg.eigvalsh(gram)[:, -1]
    return 0.5 * (largest.clamp_min(0) * (1 + _SMOOTHING)).log()


def _smaller(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else torch.minimum(first, second)


def _doubled(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
