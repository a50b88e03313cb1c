"""Propagation of Lipschitz constants through the traced graph by the rules of the layers.

Each value in the graph has one number, the logarithm ``log L`` of a Lipschitz constant with respect to the network's
input. A layer of norm ``g`` gives ``log L + log g``, an addition ``log(L_1 + L_2)``, and a concatenation
``log sqrt(L_1^2 + L_2^2)``. It follows that a residual block gives ``Lip(x) (Lip(shortcut) + Lip(branch))`` and a dense
block ``Lip(x) sqrt(1 + Lip(h)^2)``, also for nested blocks.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisher_reg.bounds.deviations import Deviations
from fisher_reg.bounds.region import Region
from fisher_reg.bounds.rules.call import Call, make_call, name_of
from fisher_reg.bounds.rules.layer import Deviation, Gain, Layer, Norms, ScaledGain
from fisher_reg.bounds.rules.linear import in_coordinates, linear_rule, scales_outputs
from fisher_reg.bounds.rules.normalization import batch_norm_rule, batch_norm_scale
from fisher_reg.bounds.rules.registry import find_function_rule, find_rule, no_rule
from fisher_reg.bounds.sensitivity import CONSTANT, Sensitivity, as_double, log, log_sum, side_by_side
from fisher_reg.bounds.tangents import Tangents
from fisher_reg.bounds.tighten.averaging import average
from fisher_reg.bounds.tightening import Tightening
from fisher_reg.bounds.tracing import Trace, asks_for_shape, recomputed, where
from fisher_reg.errors import NoBoundError, NonFiniteWeightsError


@dataclass(frozen=True)
class Term:
    """The constant of one layer, as a leaf of the autograd graph of the composition."""

    name: str
    layer: str
    log_norm: Tensor


@dataclass(frozen=True)
class Composition:
    """The sensitivity of the output.

    Attributes:
        log_norm: Log of the constant of the output; with a head, that of the head's scaled input.
        head: Weight ``(K, D)`` of a last linear layer, divided by the scaling of its input, or None.
        head_name: Its name.
        terms: One per layer, without the head.
        domains: The domains for which the rules of the layers hold.
        deviations: The deviations of the values over the region, if there is one.
        log_error: Log of a bound of the change of the Jacobian over the region, with the same scaling, if known.
    """

    log_norm: Tensor
    head: Tensor | None
    head_name: str
    terms: tuple[Term, ...]
    domains: tuple[str, ...]
    deviations: Deviations | None = None
    log_error: Tensor | None = None


def compose(
    trace: Trace,
    norms: Norms,
    *,
    tightening: Tightening,
    is_local: bool = False,
    differentiable: bool = False,
    output_scales: Mapping[fx.Node, Tensor] | None = None,
    region: Region | None = None,
    tangents: Tangents | None = None,
) -> Composition:
    """Compose the rules of the layers of a traced model into one constant.

    Args:
        trace: The model, in evaluation mode, at an example; its values are used only for local bounds.
        norms: Computes the norms of weights.
        tightening: The certified improvements to use.
        is_local: Whether the constants are those at the given examples.
        differentiable: Whether there is a gradient with respect to the weights; otherwise only to the terms.
        output_scales: Requested scalings ``(C,)`` of the outputs of linear layers, by their nodes.
        region: The inputs around the examples for which the constants hold; None for all inputs or the examples.
        tangents: The Jacobians of the values at the examples, ``(B, d, *S)``, if they are known; with a region.

    Returns:
        The constant with its terms.

    Raises:
        NoBoundError: For a part without a rule.
        NonFiniteWeightsError: For weights that are not finite.
    """
    deviations = None if region is None else Deviations(trace, region, tangents or Tangents({}))
    composer = _Composer(trace, norms, tightening, is_local, differentiable, output_scales or {}, deviations)
    with torch.enable_grad():
        for node in trace.graph.nodes:
            composer.visit(node)
        sensitivity = composer.sensitivities[trace.output].plain()
    if sensitivity.log_norm is None or sensitivity.parts:
        raise NoBoundError("The output does not depend on the input, or is not a tensor.")
    log_norm, head = sensitivity.log_norm, None
    if composer.head is not None:
        log_norm, head = composer.head
    assert log_norm is not None
    if bool(log_norm.isnan().any()):
        raise NonFiniteWeightsError("The bound is not a number. Check the weights and buffers for NaN.")
    terms = tuple(composer.terms)
    domains = tuple(dict.fromkeys(composer.domains))
    log_error = None
    if log_norm.ndim == 2:
        log_norm, log_error = log_norm
    return Composition(log_norm, head, composer.head_name, terms, domains, deviations, log_error)


@dataclass
class _Composer:
    """Visits the nodes in order and computes the sensitivity of every value."""

    trace: Trace
    norms: Norms
    tightening: Tightening
    is_local: bool
    differentiable: bool
    output_scales: Mapping[fx.Node, Tensor]
    deviations: Deviations | None = None
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    sensitivities: dict[fx.Node, Sensitivity] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    gains: dict[fx.Node, Tensor] = field(default_factory=dict)
    head: tuple[Tensor, Tensor] | None = None
    head_name: str = ""
    head_node: fx.Node | None = None
    values: dict[fx.Node, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.values = dict(self.trace.values)

    def visit(self, node: fx.Node) -> None:
        """Compute the sensitivity of the value of the node."""
        value = self.values[node]
        sensitivity = self._sensitivity(node, value)
        if self.differentiable and sensitivity.is_constant:
            self.values[node] = self._with_gradient(node, value)
        if self.tightening.averaged and not (self._at_example or self.differentiable or self._is_head(node, value)):
            sensitivity = self._averaged(node, sensitivity)
        if self.deviations is not None and not (self.head is not None and self.head_node is node):
            sensitivity = self.deviations.refined(node, sensitivity, self.sensitivities, self.calls.get(node))
        keeps = self.tightening.merged or sensitivity.parts or self._batch_norm_after(node, value) is not None
        self.sensitivities[node] = sensitivity if keeps else sensitivity.plain()
        if self.deviations is not None:
            is_head = self.head is not None and self.head_node is node
            self.deviations.visit(node, self.sensitivities[node], self.sensitivities, self.calls.get(node), is_head)

    def _averaged(self, node: fx.Node, sensitivity: Sensitivity) -> Sensitivity:
        """Return the sensitivity at the end of a block, bounded together with its activation if that is smaller."""
        with torch.no_grad():
            block = None if sensitivity.is_constant or sensitivity.parts else average(self.trace, node)
        if block is None or block.source not in self.sensitivities:
            return sensitivity
        source = self.sensitivities[block.source]
        branch = sensitivity if block.branch[-1] is node else self.sensitivities[block.branch[-1]]
        # the branch term r ||W_2|| ||W_1|| needs the plain norms: undo earlier improvements on the branch
        gained = sum(self.gains.get(item, 0.0) for item in block.branch)
        before, after = source.scale, sensitivity.scale
        matrix = block.matrix
        if before is not None:
            matrix = matrix / before.expand(self.values[block.source].shape).amin(0).reshape(1, -1)
        if after is not None:
            matrix = matrix * after.expand(self.values[node].shape).amax(0).reshape(-1, 1)
        log_norm = log(self.norms.matrix(matrix)).detach().requires_grad_()  # log ||S + c W_2 W_1||
        assert sensitivity.log_norm is not None
        assert source.log_norm is not None
        # L (||S + c W_2 W_1|| + r ||W_2|| ||W_1||), with r = share * beta
        joint = log_sum([source.log_norm + log_norm, branch.within(after) + gained + math.log(block.share)])
        if bool(joint >= sensitivity.log_norm):
            return sensitivity
        self.terms.append(Term(where(node), "block, with the mean slope of its activation", log_norm))
        self.gains[node] = sensitivity.log_norm - joint
        return replace(sensitivity, log_norm=joint)

    @property
    def _at_example(self) -> bool:
        """Whether the constants are those at the examples or in regions around them."""
        return self.is_local or self.deviations is not None

    def _deviation_of(self, node: fx.Node) -> Deviation | None:
        known = self.deviations is not None and node in self.trace.batched
        return self.deviations.of(node) if known else None  # type: ignore[union-attr]

    def _around_of(self, node: fx.Node) -> tuple[Deviation | None, bool]:
        return None if self.deviations is None else self.deviations.of(node), node in self.trace.batched

    def _knows(self, nodes: Iterable[fx.Node]) -> bool:
        """Return whether all values that depend on the input have the examples along their first axis."""
        varying = [node for node in nodes if not self.sensitivities[node].is_constant]
        return all(node in self.trace.batched for node in varying)

    def _fetch(self, argument: Any) -> Any:
        return fx.map_arg(argument, lambda node: self.values[node])

    def _with_gradient(self, node: fx.Node, value: Any) -> Any:
        """Recompute a value that depends only on weights, with an autograd graph, which the trace does not have."""
        if node.op not in ("call_function", "call_method", "call_module") or asks_for_shape(node):
            return value
        weights = [self.values[item] for item in node.all_input_nodes]
        target = node.target
        if node.op == "call_module":
            target = self.trace.modules[str(target)]
            weights.append(list(target.parameters()))
        return recomputed(target, self._fetch(node.args), self._fetch(node.kwargs)) if _has_graph(weights) else value

    def _sensitivity(self, node: fx.Node, value: Any) -> Sensitivity:
        if node.op == "placeholder":
            return Sensitivity(self._of_input(value.device))
        incoming = [self.sensitivities[argument] for argument in node.all_input_nodes]
        if value is None or all(sensitivity.is_constant for sensitivity in incoming) or asks_for_shape(node):
            return CONSTANT
        if node.op == "output":
            return incoming[0]
        if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
            if self.is_local:
                return CONSTANT  # the derivative of integers and booleans is zero wherever it exists
            raise NoBoundError(
                f"'{where(node)}' converts a value that depends on the input to integers or booleans "
                f"({str(value.dtype).removeprefix('torch.')}). That is not continuous in the input, and has no "
                "Lipschitz constant."
            )
        if node.op == "call_module":
            return self._module_sensitivity(node, value)
        rule = find_function_rule(node.target)
        if rule is None:
            raise no_rule(f"the {node.op.removeprefix('call_')} {name_of(node.target)}", where(node))
        is_local = self.is_local and self._knows(node.all_input_nodes)
        if rule.first_of_several and isinstance(value, list | tuple):
            self._check_users(node)
            value = value[0]
        call = make_call(
            *(rule, node, self.sensitivities, value, self._fetch, self.norms, is_local, self._deviation_of),
            around_of=self._around_of,
            at_example=self.is_local,
        )
        if call is None:
            return CONSTANT
        self.calls[node] = call
        if self._is_head(node, value) and name_of(node.target) == "linear":
            return self._head_sensitivity(node, call.argument("weight"), call.sensitivity, call.source.value)
        with torch.set_grad_enabled(self.differentiable or not rule.is_layer):
            result = rule.apply(call)
        return self._after(node, name_of(node.target), call.sensitivity, result) if isinstance(result, Gain) else result

    def _of_input(self, device: torch.device) -> Tensor:
        """Return log L = log 1 of the input, and with Jacobians also log e = log 0."""
        if self.deviations is None or not self.deviations.tangents:
            return torch.zeros((), dtype=torch.float64, device=device)
        return torch.tensor([[0.0], [-math.inf]], dtype=torch.float64, device=device)

    def _module_sensitivity(self, node: fx.Node, value: Any) -> Sensitivity:
        module = self.trace.modules[str(node.target)]
        if not isinstance(value, Tensor):
            self._check_users(node)
        if self.differentiable:
            _set_weights(module)
        operands = {name: item for name, item in _bind(node, module).items() if isinstance(item, fx.Node)}
        varying = [item for item in operands.values() if not self.sensitivities[item].is_constant]
        single = self.sensitivities[varying[0]] if len(set(varying)) == 1 else None
        if single is not None and varying[0] is not next(iter(operands.values())):
            single = Sensitivity(single.plain().log_norm)  # rules use the range of the first input
        if single is not None and self._is_head(node, value) and find_rule(module) is linear_rule:
            weight: Any = module.weight
            return self._head_sensitivity(node, weight, single, self._fetch(varying[0]))
        with torch.set_grad_enabled(self.differentiable):
            gain = _gain(module, self._layer(node, module, operands, single, value), where(node))
        if single is not None and (len(varying) == 1 or gain.of_one_input):
            source = single
        elif single is not None and isinstance(gain, ScaledGain):  # the others may be used with or without scaling
            assert single.log_norm is not None
            others = [torch.maximum(single.log_norm, single.within(None))] * (len(varying) - 1)
            source = Sensitivity(side_by_side([single.log_norm, *others]))
        else:
            plain = [self.sensitivities[item].plain().log_norm for item in varying]
            source = Sensitivity(side_by_side([item for item in plain if item is not None]))
        label = type(module).__name__
        if self._batch_norm_after(node, value) is not None:
            label = f"{label} + batch norm"
        return self._after(node, label, source, gain)

    def _check_users(self, node: fx.Node) -> None:
        if any(_takes_another(user) for user in node.users):
            raise NoBoundError(f"The rule of '{where(node)}' bounds only its first output, but another output is used.")

    def _after(self, node: fx.Node, label: str, source: Sensitivity, gain: Gain) -> Sensitivity:
        log_norm = log(gain.norm)
        if not self.differentiable:
            log_norm = log_norm.detach().requires_grad_()
        self.terms.append(Term(where(node), label, log_norm))
        if gain.domain is not None:
            self.domains.append(gain.domain)
        reached = gain.after(source)
        trivial = _with_norm_one(gain).after(source)
        assert trivial.log_norm is not None
        return Sensitivity(trivial.log_norm + log_norm, reached.scale, reached.range)  # log L + log g

    def _layer(
        self, node: fx.Node, module: nn.Module, operands: Mapping[str, fx.Node], single: Sensitivity | None, value: Any
    ) -> Layer:
        return Layer(
            inputs={
                name: self._fetch(item) for name, item in operands.items() if isinstance(self._fetch(item), Tensor)
            },
            output=value,
            norms=self.norms,
            input_range=None if single is None else single.range,
            sources={
                name: None if self.sensitivities[item].is_constant else item.name for name, item in operands.items()
            },
            is_local=self.is_local and self._knows(operands.values()),
            deviation=None if single is None else self._deviation_of(next(iter(operands.values()))),
            scale=None if single is None else single.scale,
            output_scale=self._output_scale(node, value),
        )

    def _output_scale(self, node: fx.Node, value: Any) -> Tensor | None:
        """Return the requested scaling of a linear layer's output, with that of a batch norm after it."""
        norm = self._batch_norm_after(node, value)
        scale = None
        if norm is not None:
            size = batch_norm_scale(norm).abs()
            scale = size.clamp_min(1e-12 * size.amax().detach()) if bool(size.amax() > 0) else None
        wanted = self.output_scales.get(node)
        if wanted is None:
            return scale
        return wanted if scale is None else wanted * scale

    def _batch_norm_after(self, node: fx.Node, value: Any) -> _BatchNorm | None:
        (user,) = node.users if len(node.users) == 1 else (None,)
        if node.op != "call_module" or user is None or user.op != "call_module" or not isinstance(value, Tensor):
            return None
        module, following = (self.trace.modules[str(item.target)] for item in (node, user))
        absorbed = self.tightening.folded and find_rule(following) is batch_norm_rule
        if not absorbed or not scales_outputs(module, value.ndim):
            return None
        assert isinstance(following, _BatchNorm)
        return following

    def _is_head(self, node: fx.Node, value: Any) -> bool:
        is_returned = self.trace.output.args[0] is node and len(node.users) == 1
        return self.tightening.head and is_returned and isinstance(value, Tensor) and value.ndim == 2

    def _head_sensitivity(self, node: fx.Node, weight: Tensor, source: Sensitivity, hidden: Tensor) -> Sensitivity:
        layer = Layer({"input": hidden}, None, self.norms, scale=source.scale)
        with torch.set_grad_enabled(self.differentiable):
            scaled = in_coordinates(weight, layer.scale_along(-1), None)
        assert source.log_norm is not None
        self.head, self.head_name, self.head_node = (source.log_norm, scaled), where(node), node
        return source


def _with_norm_one(gain: Gain) -> Gain:
    if isinstance(gain, ScaledGain):
        return ScaledGain(1.0, gain.output_range, gain.domain, gain.of_one_input, gain.scale)
    return Gain(1.0, gain.output_range, gain.domain, gain.of_one_input)


def _bind(node: fx.Node, module: nn.Module) -> dict[str, Any]:
    """Return the arguments of a module call by the names of its forward's parameters."""
    try:
        return inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments
    except TypeError as error:
        raise NoBoundError(f"The call of '{where(node)}' does not fit its forward: {error}") from error


def _gain(module: nn.Module, layer: Layer, name: str) -> Gain:
    rule = find_rule(module)
    if rule is None:
        raise no_rule(type(module).__name__, name)
    try:
        returned = rule(module, layer)
    except NoBoundError as error:
        raise NoBoundError(f"At '{name}': {error}") from error
    what = f"The bound rule of {type(module).__name__} ({getattr(rule, '__qualname__', rule)}) at '{name}'"
    gain = returned if isinstance(returned, Gain) else Gain(returned)
    norm = _checked_norm(gain.norm, layer, what)
    if isinstance(gain, ScaledGain) and gain.scale is not None:
        is_tensor = isinstance(gain.scale, Tensor) and gain.scale.is_floating_point()
        if not is_tensor:
            raise TypeError(f"{what} returned coordinates that are not a real tensor: {gain.scale!r}. {_RETURNS}")
        if not bool((gain.scale.isfinite() & (gain.scale > 0)).all()) and not _is_ours(rule):
            raise ValueError(f"{what} returned coordinates that are not positive and finite: {gain.scale}. {_RETURNS}")
    if not bool((norm >= 0).all() & norm.isfinite().all()):
        if bool(norm.isnan().any()) and (_is_ours(rule) or _has_nan(module)):
            raise NonFiniteWeightsError(f"'{name}' has no norm. Check its weights and buffers for NaN.")
        if not _is_ours(rule) or bool((norm < 0).any()):
            raise ValueError(f"{what} returned {gain.norm}, which is not finite and >= 0. {_RETURNS}")
    return replace(gain, norm=norm)


_RETURNS = (
    "A rule returns the Lipschitz constant of the module, a number >= 0 or a real tensor, () or (B,); "
    "or a Gain or ScaledGain with such a norm and positive coordinates."
)


def _checked_norm(norm: Any, layer: Layer, what: str) -> Tensor:
    """Return the norm of a rule as a tensor; its shape is ``()`` for a global bound."""
    if isinstance(norm, Tensor):
        is_real = norm.dtype != torch.bool and not norm.is_complex()
        if not is_real or norm.shape not in ((), (1,), layer.input.shape[:1]):
            shape, kind = tuple(norm.shape), str(norm.dtype).removeprefix("torch.")
            raise TypeError(f"{what} returned a tensor of shape {shape} and type {kind}. {_RETURNS}")
        wide = norm.double()
        return wide if wide.ndim and layer.is_local else wide.amax()
    if isinstance(norm, bool) or not isinstance(norm, Real):
        raise TypeError(f"{what} returned {norm!r}, a {type(norm).__name__}. {_RETURNS}")
    return as_double(float(norm))


def _is_ours(rule: Any) -> bool:
    function = getattr(rule, "func", rule)
    return str(getattr(function, "__module__", "")).startswith("fisher_reg.")


def _has_nan(module: nn.Module) -> bool:
    return any(bool(item.isnan().any()) for item in (*module.parameters(), *module.buffers()))


def _has_graph(values: Iterable[Any]) -> bool:
    found: list[Tensor] = []
    for value in values:
        found.extend(
            item for item in (value if isinstance(value, list | tuple) else (value,)) if isinstance(item, Tensor)
        )
    return any(item.requires_grad for item in found)


def _set_weights(module: nn.Module) -> None:
    """Recompute weights that hooks of :mod:`torch.nn.utils` set, with an autograd graph."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils"):
            hook(module, ())


def _takes_another(node: fx.Node) -> bool:
    takes_first = node.target is operator.getitem and node.args[1] in (0,)
    return len(node.users) > 0 and not takes_first
