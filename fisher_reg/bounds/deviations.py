r"""Bounds of the deviation of the values of a network from those at an example, over a region around it.

Let :math:`w_i` be the *width* of entry i of a value :math:`h`: a bound of :math:`|h_i(x') - h_i(x)|` for all
:math:`x'` in the region, with radius r. It is the smaller of two bounds. The sensitivity :math:`L` over the region
gives :math:`\|T(h(x') - h(x))\| \le L r` for the diagonal scaling T, and therefore :math:`w_i \le L r / T_i`. The
widths of the operands give the second: :math:`\sum_j |W_{ij}| w_j` or :math:`\|W_i T^{-1}\| L r` (L and T of the input)
for a linear map W, and the values at the ends of the interval for a monotone activation.

The *remainder* of a layer that is not affine bounds the change of its Jacobian over the region. For an activation it is
the change of its slope; for max pooling it is zero for a window whose largest entry stays the largest; for any other
layer it is twice the Lipschitz constant of the layer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from fisher_reg.bounds.rules.registry import find_function_rule, find_rule, layer_name
from fisher_reg.bounds.rules.slopes import range_within, slopes_at, slopes_within
from fisher_reg.bounds.sensitivity import Sensitivity
from fisher_reg.bounds.tangents import Tangents
from fisher_reg.bounds.tracing import Trace
from fisher_reg.bounds.tracing.capture import detaches


@dataclass(frozen=True)
class Remainder:
    r"""A bound of the change of the Jacobian of one layer over the region.

    For a row :math:`b` of the Jacobian of the logits with respect to the layer's output, at the example, this change
    adds at most :math:`\|b \odot \rho\|\, e^{\text{log\_norm}}` to the row of the Jacobian with respect to the input.

    Attributes:
        node: The layer.
        weights: :math:`\rho`, broadcastable to the output.
        log_norm: ``(B,)`` or ``()``.
    """

    node: fx.Node
    weights: Tensor
    log_norm: Tensor


_SMOOTHING = 1e-9
"""Relative excess of all widths, much larger than the rounding errors of float64."""


@dataclass
class Deviations:
    """Visits the calls in order and stores the deviations of their values."""

    trace: Trace
    region: Region
    tangents: Tangents = field(default_factory=lambda: Tangents({}))
    widths: dict[fx.Node, Any] = field(default_factory=dict)
    lengths: dict[fx.Node, Tensor] = field(default_factory=dict)
    remainders: list[Remainder] = field(default_factory=list)
    row_errors: dict[fx.Node, Any] = field(default_factory=dict)
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
        """Compute the widths of a value and the remainder of its layer.

        Args:
            node: The call.
            sensitivity: That of its value; for the head, that of its input.
            before: The sensitivities of the previous nodes.
            call: The call, if it is a function.
            is_head: Whether it is the last linear layer.
        """
        value = self.trace.values[node]
        if sensitivity.is_constant or node.op == "output":
            return
        self.varying.add(node)
        if node.op == "placeholder":
            self.widths[node] = (self.region.width * (1 + _SMOOTHING)).expand(value.shape)
            self.lengths[node] = self.region.radius * (1 + _SMOOTHING)
            self.row_errors[node] = torch.zeros_like(value)
            return
        found = self._width(node, value, before, call)
        if isinstance(value, Tensor):
            if found is not None:
                found = torch.where(found.isnan(), math.inf, found)
            if not is_head:
                # ||h(x') - h(x)|| <= L r
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
        """Return the widths ``L r / T_i`` from the sensitivity."""
        length = self._length_along(node, sensitivity, value.ndim)
        scale = 1.0 if sensitivity.scale is None else sensitivity.scale.detach()  # T
        return (length / scale).expand(value.shape)

    def _from_rows(self, node: fx.Node, value: Tensor, sensitivity: Sensitivity) -> Tensor:
        r"""Return the widths :math:`(\|M_i\| + e_i) r` from the rows of the Jacobian M and their errors e."""
        rows = self.tangents.row_norms(node) + self.row_errors[node]
        widths: Tensor = rows * self.region.radius.view(-1, *[1] * (value.ndim - 1))
        return widths

    def refined(
        self, node: fx.Node, sensitivity: Sensitivity, before: Mapping[fx.Node, Sensitivity], call: Call | None
    ) -> Sensitivity:
        r"""Return a sensitivity that also uses the Jacobian at the example.

        Let M be the Jacobian of a value at the example, and e a bound of its change over the region. An affine layer of
        norm g multiplies e by g; any other layer also adds :math:`\|(J_l(x') - J_l(x)) M\|`. The Lipschitz constant is
        then at most :math:`\|M\| + e`.
        """
        if not self.tangents or sensitivity.is_constant or node.op in ("output", "placeholder") or sensitivity.parts:
            return sensitivity
        assert sensitivity.log_norm is not None
        lipschitz, error = lipschitz_of(sensitivity), error_of(sensitivity)
        if not self._is_affine(node, call):
            added = self._added(node, sensitivity, before, call)
            error = torch.logaddexp(error, added) if added is not None else lipschitz + math.log(2.0)
            lipschitz = self._masked(node, lipschitz, before, call)
        if node in self.tangents:
            size = self.tangents.log_norm(node, sensitivity.scale)  # log ||T M||
            rows = self._row_error(node, sensitivity, error, before, call)
            self.row_errors[node] = rows
            scaled = rows if sensitivity.scale is None else rows * sensitivity.scale.detach()
            error = torch.minimum(error, torch.linalg.vector_norm(scaled.reshape(len(scaled), -1), dim=1).log())
            lipschitz = torch.minimum(lipschitz, torch.logaddexp(size, error))  # L <= ||M|| + e
            error = torch.minimum(error, torch.logaddexp(size, lipschitz))  # e <= ||M|| + L
        elif isinstance(self.trace.values[node], tuple | list):
            self.row_errors[node] = self._carried(self.row_errors, node, self.trace.values[node], call)
        both = torch.stack(torch.broadcast_tensors(lipschitz, error))
        return replace(sensitivity, log_norm=both)

    def _masked(
        self, node: fx.Node, lipschitz: Tensor, before: Mapping[fx.Node, Sensitivity], call: Call | None
    ) -> Tensor:
        r"""Return the constant after an activation: :math:`\|D M\| + \max(D)\, e` for its largest slopes D.

        :math:`M^\top D'^2 M \preceq M^\top D^2 M` for all slopes with :math:`|D'| \le D`.
        """
        source = self._source_of_rows(node, before)
        slopes = None if source is None else self._slopes(node, source, call)
        if source is None or slopes is None:
            return lipschitz
        steepest = torch.maximum(slopes[0].abs(), slopes[1].abs())  # D
        scale = before[source].scale
        weights = steepest if scale is None else steepest * scale.detach()
        # log(max(D) e)
        rest = steepest.reshape(len(steepest), -1).amax(1).log() + error_of(before[source]).detach()
        return torch.minimum(lipschitz, torch.logaddexp(self.tangents.log_norm(source, weights), rest))

    def _row_error(
        self,
        node: fx.Node,
        after: Sensitivity,
        error: Tensor,
        before: Mapping[fx.Node, Sensitivity],
        call: Call | None,
    ) -> Tensor:
        """Return the errors of the rows of the Jacobian: bounds of the Euclidean norms of their changes."""
        value = self.trace.values[node]
        whole = error.detach().exp().view(-1, *[1] * (value.ndim - 1)).expand(value.shape)
        whole = whole if after.scale is None else whole / after.scale.detach()
        found = None
        source = self._source_of_rows(node, before)
        if self._is_affine(node, call):
            found = self._carried(self.row_errors, node, value, call)
        elif source is not None and isinstance(self.row_errors.get(source), Tensor):
            slopes = self._slopes(node, source, call)
            rows, known = self.tangents.row_norms(source), self.row_errors[source]
            if slopes is not None:
                change = self._change_of_slope(node, source, call)
                assert change is not None
                # D e_i + rho ||M_i||
                found = torch.maximum(slopes[0].abs(), slopes[1].abs()) * known + change * rows
            elif call is None and find_rule(self.trace.modules[str(node.target)]) in MAX_RULES:
                found = self._row_error_of_maxima(self.trace.modules[str(node.target)], source, value, rows, known)
        found = whole if not isinstance(found, Tensor) else torch.minimum(found, whole)
        return found * (1 + _SMOOTHING)

    def _row_error_of_maxima(
        self, module: nn.Module, source: fx.Node, value: Tensor, rows: Tensor, known: Tensor
    ) -> Tensor:
        """Return the row errors of a max pooling: those of the largest entry, or of another that may replace it."""
        winner = self._winners(module, self.trace.values[source])
        of_winner = _gathered(rows, winner), _gathered(known, winner)
        other = module(rows + known) + of_winner[0]
        return torch.where(self._unsettled(module, source, value) > 0, other, of_winner[1])

    def _source_of_rows(self, node: fx.Node, before: Mapping[fx.Node, Sensitivity]) -> fx.Node | None:
        """Return the only non-constant input, if its Jacobian at the example and its widths are known."""
        varying = [item for item in node.all_input_nodes if not before[item].is_constant]
        if len(varying) != 1 or varying[0] not in self.tangents or node not in self.trace.batched:
            return None
        return varying[0] if isinstance(self.widths.get(varying[0]), Tensor) else None

    def _added(
        self, node: fx.Node, after: Sensitivity, before: Mapping[fx.Node, Sensitivity], call: Call | None
    ) -> Tensor | None:
        r"""Return the log of a bound of :math:`\|(J_l(x') - J_l(x)) M\|` ``(B,)``; None if there is none."""
        source = self._source_of_rows(node, before)
        if source is None:
            return None
        width = self.widths[source]
        change = self._change_of_slope(node, source, call)
        if change is not None:  # the change is diagonal: ||diag(rho) M||
            scale = before[source].scale
            weights = change if scale is None else change * scale.detach()
            return self.tangents.log_norm(source, weights)
        reached = lipschitz_of(before[source]).detach()
        gain = torch.where(reached == -math.inf, -math.inf, lipschitz_of(after).detach() - reached)
        own = before[source].scale
        weights = torch.ones_like(width) if own is None else own.expand(width.shape)
        if call is None and find_rule(self.trace.modules[str(node.target)]) in MAX_RULES:
            weights = weights * self._in_doubt(self.trace.modules[str(node.target)], source, self.trace.values[node])
        # ||J_l(x') - J_l(x)|| <= 2 g
        return gain + math.log(2.0) + self.tangents.log_norm(source, weights)

    def _in_doubt(self, module: nn.Module, source: fx.Node, value: Tensor) -> Tensor:
        """Return one for entries in windows of a max pooling whose largest entry may change, else zero."""
        hidden, unsettled = self.trace.values[source], self._unsettled(module, source, value)
        if not isinstance(module, nn.MaxPool2d) or _doubled(module.dilation) != (1, 1):
            return torch.ones_like(hidden)
        with torch.enable_grad():
            point = torch.zeros_like(hidden).requires_grad_()
            shares = F.avg_pool2d(point, module.kernel_size, module.stride, module.padding, module.ceil_mode)
            (found,) = torch.autograd.grad((shares * unsettled).sum(), point)
        return (found > 0).to(hidden)

    def _slopes(self, node: fx.Node, source: fx.Node, call: Call | None) -> tuple[Tensor, Tensor] | None:
        """Return the smallest and the largest slope of an activation over the region; None for another layer."""
        activation = self._activation(node, call)
        return None if activation is None else slopes_within(activation, self.trace.values[source], self.widths[source])

    def _change_of_slope(self, node: fx.Node, source: fx.Node, call: Call | None) -> Tensor | None:
        """Return rho, the largest change of the slope of an activation over the region; None for another layer."""
        activation, slopes = self._activation(node, call), self._slopes(node, source, call)
        if activation is None or slopes is None:
            return None
        here = slopes_at(activation, self.trace.values[source])
        return torch.maximum(slopes[1] - here, here - slopes[0]).clamp_min(0)

    def _length_along(self, node: fx.Node, sensitivity: Sensitivity, ndim: int) -> Tensor:
        """Return ``L r``, the largest change of the scaled value; per example if it has an axis of examples."""
        length = lipschitz_of(sensitivity).detach().exp() * self.region.radius
        return length.view(-1, *[1] * (ndim - 1)) if node in self.trace.batched else length.max()

    def _width(self, node: fx.Node, value: Any, before: Mapping[fx.Node, Sensitivity], call: Call | None) -> Any:
        activation = self._activation(node, call)
        inputs = [item for item in node.all_input_nodes if isinstance(self.widths.get(item), Tensor)]
        if activation is not None and len(inputs) == 1:
            return range_within(activation, self.trace.values[inputs[0]], self.widths[inputs[0]])
        rule: Any = None if call is None else getattr(find_function_rule(node.target), "apply", None)
        if call is not None and hasattr(rule, "width"):
            return rule.width(call) if isinstance(value, Tensor) else None
        if call is not None and rule in (arithmetic._multiply, arithmetic._divide):
            return self._of_product(call, value, rule is arithmetic._divide)
        found = self._carried(self.widths, node, value, call)
        weight = self._weight(node, call)
        if weight is None or not isinstance(found, Tensor) or len(inputs) != 1:
            return found
        return torch.minimum(found, self._by_rows(*weight, inputs[0], found, before[inputs[0]]))

    def _weight(self, node: fx.Node, call: Call | None) -> tuple[Tensor, int] | None:
        """Return the weight of a linear layer or convolution, and the axis of its output channels."""
        if call is None:
            module = self.trace.modules[str(node.target)]
            rule: Any = find_rule(module)
            axis = {linear.linear_rule: -1, linear.conv_rule: 1}.get(rule)
            if getattr(module, "padding_mode", "zeros") != "zeros":
                return None  # a window may contain an entry twice
            return None if axis is None else (module.weight, axis)  # type: ignore[return-value]
        rule = getattr(find_function_rule(node.target), "apply", None)
        axis = {linear._linear: -1, linear._convolution: 1}.get(rule)
        return None if axis is None else (call.argument("weight"), axis)

    def _by_rows(self, weight: Tensor, axis: int, source: fx.Node, found: Tensor, before: Sensitivity) -> Tensor:
        r"""Return the widths after a linear map by the norms of its rows, :math:`\|W_i T^{-1}\| L r`."""
        kernel, shape = weight.detach().double(), self.trace.values[source].shape
        scale = torch.ones((), dtype=torch.float64, device=kernel.device)
        if before.scale is not None:  # the smallest scale of each channel
            scale = before.scale.detach().expand(shape)
            scale = scale.amin([other for other in range(scale.ndim) if other != axis % scale.ndim])
        if scale.ndim and axis == 1 and kernel.shape[1] != len(scale):  # the channels of its groups
            scale = scale.amin()
        # ||W_i T^-1||
        rows = kernel / scale.view(1, -1, *[1] * (kernel.ndim - 2)) if scale.ndim else kernel / scale
        along = [1] * found.ndim
        along[axis] = -1
        norms = torch.linalg.vector_norm(rows.flatten(1), dim=1).view(along)
        widths: Tensor = norms * self._length_along(source, before, found.ndim)
        return widths

    def _carried(self, known: dict[fx.Node, Any], node: fx.Node, value: Any, call: Call | None) -> Any:
        r"""Propagate bounds of the entries through a layer: :math:`\sum_j |W_{ij}| w_j` for a linear one.

        Args:
            known: The bounds of the entries of the previous values.
            node: The layer.
            value: Its output.
            call: The call, if it is a function.

        Returns:
            The bounds of the entries of the value; None if the layer is not known to be monotone in them.
        """
        inputs = [item for item in node.all_input_nodes if isinstance(known.get(item), Tensor)]
        if call is None:
            if len(inputs) != 1 or not isinstance(value, Tensor):
                return None
            return self._through_module(self.trace.modules[str(node.target)], known[inputs[0]])
        rule: Any = getattr(find_function_rule(node.target), "apply", None)
        if hasattr(rule, "module_form"):
            single = len(inputs) == 1 and isinstance(value, Tensor)
            return self._through_module(rule.module_form(call), known[inputs[0]]) if single else None
        if rule is linear._linear and len(inputs) == 1:
            return F.linear(known[inputs[0]], call.argument("weight").detach().double().abs())
        if rule is linear._convolution and len(inputs) == 1:
            convolve = (F.conv1d, F.conv2d, F.conv3d)[value.ndim - 3]
            options = {
                key: call.argument(key) for key in ("stride", "padding", "dilation", "groups") if key in call.operands
            }
            return convolve(known[inputs[0]], call.argument("weight").detach().double().abs(), **options)
        if rule in (arithmetic._multiply, arithmetic._divide) and len(inputs) == 1:
            return self._scaled(known[inputs[0]], call, value, rule is arithmetic._divide)
        if rule is arithmetic._sum:
            terms = [item for item in (*node.args, *node.kwargs.values()) if item in self.varying]
            if not all(isinstance(known.get(item), Tensor) for item in terms):  # type: ignore[arg-type]
                return None
            return torch.stack([known[item].expand(value.shape) for item in terms]).sum(0)  # type: ignore[index]
        if rule in _SAME_CALLS and len(inputs) >= 1:
            return known[inputs[0]]
        if rule in _MONOTONE_CALLS and node.target not in (torch.amin, "amin"):
            return self._replayed(known, node)
        return None

    def _through_module(self, module: nn.Module, entries: Tensor) -> Tensor | None:
        rule: Any = find_rule(module)
        weight: Any = getattr(module, "weight", None)
        if rule is linear.linear_rule:
            return F.linear(entries, weight.detach().double().abs())
        if rule is linear.conv_rule:
            convolution: Any = module
            through: Tensor = convolution._conv_forward(entries, weight.detach().double().abs(), None)
            return through
        if rule is batch_norm_rule:
            factor = batch_norm_scale(module).abs().detach()  # type: ignore[arg-type]
            scaled: Tensor = entries * factor.view(1, -1, *[1] * (entries.ndim - 2))
            return scaled
        if rule in _MONOTONE_MODULES or rule in AVERAGE_RULES or rule in MAX_RULES:
            moved = module(entries.contiguous()) - module(torch.zeros_like(entries))
            return moved if isinstance(moved, Tensor) else None
        return None

    def _scaled(self, entries: Tensor, call: Call, value: Tensor, divides: bool) -> Tensor | None:
        """Propagate bounds of the entries through a product or quotient with a constant."""
        (other,) = [item.value for item in call.operands.values() if item.is_constant][:1]
        if divides and call.operands["input"].is_constant:
            return None
        factor = torch.as_tensor(other, dtype=torch.float64, device=value.device).abs()
        return (entries / factor if divides else entries * factor).expand(value.shape)

    def _of_product(self, call: Call, value: Tensor, divides: bool) -> Tensor | None:
        varying = [item for item in call.operands.values() if not item.is_constant]
        if divides and not call.operands["other"].is_constant:
            return quotient_width(call)
        if any(item.deviation is None for item in varying):
            return None
        if len(varying) == 1:
            return self._scaled(varying[0].deviation.width, call, value, divides)  # type: ignore[union-attr]
        (first, second) = ((item.value.abs(), item.deviation.width) for item in varying)  # type: ignore[union-attr]
        # |a| w_b + |b| w_a + w_a w_b
        moved: Tensor = first[0] * second[1] + second[0] * first[1] + first[1] * second[1]
        return moved.expand(value.shape)

    def _replayed(self, entries: dict[fx.Node, Any], node: fx.Node) -> Any:
        """Propagate bounds of the entries through a call that is monotone and linear in its tensors."""

        def call(fill: Callable[[fx.Node], Any]) -> Any:
            args, keywords = fx.map_arg(node.args, fill), fx.map_arg(node.kwargs, fill)
            if isinstance(node.target, str):
                return getattr(args[0], node.target)(*args[1:], **keywords)
            function: Any = node.target
            return function(*args, **keywords)

        def width(item: fx.Node) -> Any:
            value = self.trace.values[item]
            known = entries.get(item)
            if known is not None:
                return known.contiguous() if isinstance(known, Tensor) else known
            is_operand = isinstance(value, Tensor) and value.is_floating_point()
            return torch.zeros_like(value) if is_operand else value

        def zero(item: fx.Node) -> Any:
            value = width(item)
            if isinstance(value, tuple | list):
                return type(value)(torch.zeros_like(part) if isinstance(part, Tensor) else part for part in value)
            return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        if any(item in self.varying and entries.get(item) is None for item in node.all_input_nodes):
            return None
        at, origin = call(width), call(zero)
        if isinstance(at, tuple | list):
            return type(at)(a - b for a, b in zip(at, origin, strict=True))
        return at - origin

    def _remain(
        self, node: fx.Node, value: Any, after: Sensitivity, before: Mapping[fx.Node, Sensitivity], call: Call | None
    ) -> None:
        """Store the remainder of a layer that is not affine."""
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
        if not isinstance(value, Tensor):  # a module with several outputs, of which only the first is used
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

        An entry stays the largest if its lower end is above the upper ends of all others.
        """
        hidden, width = self.trace.values[source], self.widths[source]
        winner = self._winners(module, hidden)
        # > instead of >=: widths are rounded up, so that equal ends belong to entries without deviation
        lowest = _gathered(hidden - width, winner)
        doubtful: Tensor = (self._runner_up(module, hidden + width, winner) > lowest).to(value)
        return doubtful

    def _winners(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Return the index of the largest entry of each window of a max pooling, in its plane."""
        kind = layer_name(module)
        name = f"{'adaptive_' if kind.startswith('Adaptive') else ''}max_pool{kind[-2]}d"
        winner: Tensor = getattr(F, name)(hidden, **_options(module), return_indices=True)[1]
        return winner

    def _runner_up(self, module: nn.Module, upper: Tensor, winner: Tensor) -> Tensor:
        """Return the highest upper end in each window, except that of its largest entry; infinite if not known."""
        options = _options(module)
        if not layer_name(module).endswith("2d") or "output_size" in options or _doubled(options["padding"]) != (0, 0):
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
        if detaches(node):  # the identity for values, but zero for autograd
            return False
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
    """Return log e, where e bounds the change of the Jacobian over the region."""
    assert sensitivity.log_norm is not None
    return sensitivity.log_norm[1]


def _options(module: nn.Module) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    names = ("output_size",) if layer_name(module).startswith("Adaptive") else names  # type: ignore[assignment]
    return {name: getattr(module, name) for name in names}


def _gathered(entries: Tensor, places: Tensor) -> Tensor:
    """Return the entries at the indices of a max pooling, which count along each plane."""
    axes = entries.ndim - 2
    return entries.flatten(-axes).gather(-1, places.flatten(-axes)).view(places.shape)


def _smaller(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else torch.minimum(first, second)


def _doubled(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
