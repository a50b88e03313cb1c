"""Composition of the layer rules over the traced graph: add is a sum, concatenate a root of squares, compose a product.

Each value in the graph carries one number, the logarithm of a Lipschitz constant with respect to the network's input.
A residual block then gives ``Lip(x) (Lip(shortcut) + Lip(branch))`` and a dense one ``Lip(x) sqrt(1 + Lip(h)^2)`` by
themselves, for any way the blocks are nested.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisher_reg.bounds.functions import CONSTANT, FUNCTION_RULES, Reach, call_reach, log, name_of, side_by_side
from fisher_reg.bounds.layers import absorbs, batch_norm_scale
from fisher_reg.bounds.registry import Gain, Layer, find_rule, no_rule
from fisher_reg.errors import NoBoundError, NonFiniteWeightsError


@dataclass(frozen=True)
class BoundTerm:
    """The share of one layer.

    Attributes:
        name: Qualified name of the module.
        layer: Its type, with what was merged into it.
        norm: Its Lipschitz constant.
    """

    name: str
    layer: str
    norm: float


@dataclass(frozen=True)
class Composition:
    """The composed constant of the output, one term per layer, the domains that layers asked for, and the logits."""

    log_norm: float
    terms: tuple[BoundTerm, ...]
    domains: tuple[str, ...]
    logits: Any


def compose(model: nn.Module, inputs: Tensor, *, centre: bool) -> Composition:
    """Trace ``model``, which is in evaluation mode, and compose the rules of its layers into one constant.

    The input's values do not matter, its shape does. Batch norm is folded into the linear layer before it. With
    ``centre`` the constant is that of the outputs less their mean: a last linear layer is centred.

    Returns:
        The constant with its terms, and the logits of the inputs.

    Raises:
        NoBoundError: For an untraceable model or a part without a rule.
        NonFiniteWeightsError: For weights that are not finite.
    """
    root = _Root(model)
    try:
        graph = _Tracer().trace(root)
    except Exception as error:  # the user's own forward meets placeholders here and may raise anything
        raise NoBoundError(
            f"{type(model).__name__} cannot be traced: {error}\nMake its control flow independent of the data, or put "
            "the part in a module of its own and register a bound rule for that (fisher_reg.register_bound_rule)."
        ) from error
    interpreter = _Interpreter(fx.GraphModule(root, graph), centre)
    logits = interpreter.run(inputs)
    (output,) = graph.find_nodes(op="output")
    result = interpreter.reaches[output]
    if math.isnan(result.log_norm):
        raise NonFiniteWeightsError(f"The bound of {type(model).__name__} is not a number. Check its weights for NaN.")
    domains = tuple(dict.fromkeys(interpreter.domains))
    return Composition(result.log_norm, tuple(interpreter.terms), domains, logits)


class _Root(nn.Module):
    """Calls the model as its user does: with its hooks and the defaults of its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs)


class _Tracer(fx.Tracer):
    """A module with a rule of its own is one layer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return find_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)


class _Interpreter(fx.Interpreter):
    """Runs the graph on an example for its shapes and carries the reach of every value along."""

    def __init__(self, module: fx.GraphModule, centre: bool) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False  # the messages of the rules name the place
        self.centre = centre
        self.modules = dict(module.named_modules())
        self.reaches: dict[fx.Node, Reach] = {}
        self.terms: list[BoundTerm] = []
        self.domains: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        versions = {node: _version(self.env[node]) for node in n.all_input_nodes}
        value = super().run_node(n)
        self.reaches[n] = self._reach(n, value)
        for node, version in versions.items():
            if _version(self.env[node]) != version:
                self._check_aliases(n, node)
        return value

    def _fetch(self, argument: Any) -> Any:
        return fx.map_arg(argument, lambda node: self.env[node])

    def _reach(self, node: fx.Node, value: Any) -> Reach:
        if node.op == "placeholder":
            return Reach(0.0)
        incoming = [self.reaches[argument] for argument in node.all_input_nodes]
        if value is None or all(reach.is_constant for reach in incoming) or _asks_for_shape(node):
            return Reach(CONSTANT)
        if node.op == "output":
            return incoming[0]
        if node.op == "call_module":
            return self._module_reach(node, value)
        rule = FUNCTION_RULES.get(node.target)
        if rule is None:
            raise no_rule(f"the {node.op.removeprefix('call_')} {name_of(node.target)}", str(node))
        return call_reach(rule, node, self.reaches, value, self._fetch)

    def _module_reach(self, node: fx.Node, value: Any) -> Reach:
        module, where = self.modules[str(node.target)], _where(node)
        label = type(module).__name__
        if self._absorbing(node, value) is not None:
            return self.reaches[node.all_input_nodes[0]]
        if not isinstance(value, Tensor) and any(_takes_another(user) for user in node.users):
            raise NoBoundError(f"Of what '{where}' returns, the rule speaks of the first output only; another is used.")
        layer = self._layer(node, module, value)
        target, before = module, node.all_input_nodes[0]
        if self._absorbing(before, value) is node:
            target, layer = (
                self.modules[str(before.target)],
                self._layer(before, self.modules[str(before.target)], value),
            )
            label = f"{type(target).__name__} + {label}"
            layer = replace(layer, transform=partial(_scale_outputs, batch_norm_scale(module)))
        elif self.centre and isinstance(module, nn.Linear) and all(user.op == "output" for user in node.users):
            layer, label = replace(layer, transform=_centre_outputs), f"{label}, centred"
        _check_finite((module, target), where)
        gain = _gain(target, layer, where)
        self.terms.append(BoundTerm(where, label, gain.norm))
        if gain.domain is not None:
            self.domains.append(gain.domain)
        operands = _bind(node, module)
        varying = [self.reaches[item] for item in operands.values() if isinstance(item, fx.Node)]
        source = max(reach.log_norm for reach in varying) if gain.of_one_input else side_by_side(varying)
        return Reach(source + log(gain.norm), gain.tokens)

    def _layer(self, node: fx.Node, module: nn.Module, value: Any) -> Layer:
        nodes = {name: item for name, item in _bind(node, module).items() if isinstance(item, fx.Node)}
        inputs = {name: self.env[item] for name, item in nodes.items() if isinstance(self.env[item], Tensor)}
        sources = {name: None if self.reaches[item].is_constant else item.name for name, item in nodes.items()}
        first = next(iter(nodes.values()))
        return Layer(inputs, value, self.reaches[first].tokens, sources)

    def _absorbing(self, node: fx.Node, value: Any) -> fx.Node | None:
        """Return the batch norm that takes this linear layer in, if it is the only user."""
        (user,) = node.users if len(node.users) == 1 else (None,)
        if node.op != "call_module" or user is None or user.op != "call_module" or not isinstance(value, Tensor):
            return None
        pair = self.modules[str(node.target)], self.modules[str(user.target)]
        return user if absorbs(*pair, value.ndim) else None

    def _check_aliases(self, node: fx.Node, mutated: fx.Node) -> None:
        """Refuse a call in place that makes an older name of the same memory wrong, if that name is used again."""
        order = {other: index for index, other in enumerate(node.graph.nodes)}
        storage = self.env[mutated].untyped_storage().data_ptr()
        for other, value in self.env.items():
            is_alias = isinstance(value, Tensor) and value.untyped_storage().data_ptr() == storage
            used_again = any(order[user] > order[node] for user in other.users)
            known = self.reaches[other]
            if is_alias and used_again and (known.tokens or known.log_norm < self.reaches[node].log_norm):
                raise NoBoundError(
                    f"'{node}' changes '{other}' in place, which is used again afterwards. Write it out of place."
                )


def _bind(node: fx.Node, module: nn.Module) -> dict[str, Any]:
    """Return the arguments of a module call by the names of its forward's parameters."""
    try:
        return inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments
    except TypeError as error:
        raise NoBoundError(f"The call of '{_where(node)}' does not fit its forward: {error}") from error


def _where(node: fx.Node) -> str:
    return str(node.target).removeprefix("model").removeprefix(".") or "the model itself"


def _gain(module: nn.Module, layer: Layer, where: str) -> Gain:
    rule = find_rule(module)
    if rule is None:
        raise no_rule(type(module).__name__, where)
    try:
        gain = rule(module, layer)
    except NoBoundError as error:
        raise NoBoundError(f"At '{where}': {error}") from error
    return gain if isinstance(gain, Gain) else Gain(float(gain))


def _asks_for_shape(node: fx.Node) -> bool:
    """Say whether the node asks a tensor for what does not depend on its values."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel", "is_floating_point")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def _takes_another(node: fx.Node) -> bool:
    takes_first = node.target is operator.getitem and node.args[1] in (0,)
    return len(node.users) > 0 and not takes_first


def _check_finite(modules: Iterable[nn.Module], where: str) -> None:
    for module in modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not torch.isfinite(tensor).all():
                raise NonFiniteWeightsError(
                    f"'{where}' ({type(module).__name__}) has NaN or infinite values in {name}."
                )


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) else None


def _scale_outputs(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *(1,) * (weight.ndim - 1)) * weight.detach().double()


def _centre_outputs(weight: Tensor) -> Tensor:
    return weight - weight.mean(0)
