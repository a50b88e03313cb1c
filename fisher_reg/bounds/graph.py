"""Composition of the layer rules over the traced graph: add is a sum, concatenate a root of squares, compose a product.

Each value in the graph carries one number, the logarithm of a Lipschitz constant with respect to the network's input.
A residual block then gives ``Lip(x) (Lip(shortcut) + Lip(branch))`` and a dense one ``Lip(x) sqrt(1 + Lip(h)^2)`` by
themselves, for any way the blocks are nested.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fisher_reg.bounds.functions import CONSTANT, FUNCTION_RULES, Call, Reach, log, name_of, root_of_squares
from fisher_reg.bounds.layers import batch_norm_scale
from fisher_reg.bounds.registry import Gain, Layer, NoBoundError, find_rule, no_rule


class NonFiniteWeightsError(ValueError):
    """A layer has NaN or infinite weights, for which no bound exists."""


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
    """The composed constant: ``log_norm`` of the output, one term per layer, and the domains that layers asked for."""

    log_norm: float
    terms: tuple[BoundTerm, ...]
    domains: tuple[str, ...]


def compose(model: nn.Module, inputs: Tensor, *, centre: bool) -> Composition:
    """Trace ``model``, which is in evaluation mode, and compose the rules of its layers into one constant.

    The input's values do not matter, its shape does. Batch norm is folded into the linear layer before it. With
    ``centre`` the constant is that of the outputs less their mean: a last linear layer is centred.

    Returns:
        The constant with its terms.

    Raises:
        NoBoundError: For an untraceable model or a part without a rule.
        NonFiniteWeightsError: For weights that are not finite.
    """
    root = model if find_rule(model) is None else nn.Sequential(model)
    try:
        graph = _Tracer().trace(root)
    except (fx.proxy.TraceError, TypeError) as error:
        raise NoBoundError(
            f"{type(model).__name__} cannot be traced: {error}\nMake its control flow independent of the data, or put "
            "the part in a module of its own and register a bound rule for that (fisher_reg.register_bound_rule)."
        ) from error
    interpreter = _Interpreter(fx.GraphModule(root, graph), centre)
    interpreter.run(inputs)
    (output,) = graph.find_nodes(op="output")
    result = interpreter.reaches[output]
    if math.isnan(result.log_norm):
        raise NonFiniteWeightsError(f"The bound of {type(model).__name__} is not a number. Check its weights for NaN.")
    return Composition(result.log_norm, tuple(interpreter.terms), tuple(dict.fromkeys(interpreter.domains)))


class _Tracer(fx.Tracer):
    """A module with a rule of its own is one layer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return find_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)


class _Interpreter(fx.Interpreter):
    """Runs the graph on an example for its shapes and carries the reach of every value along."""

    def __init__(self, module: fx.GraphModule, centre: bool) -> None:
        super().__init__(module)
        self.extra_traceback = False  # the messages of the rules name the place
        self.centre = centre
        self.reaches: dict[fx.Node, Reach] = {}
        self.terms: list[BoundTerm] = []
        self.domains: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.reaches[n] = self._reach(n, value)
        return value

    def _reach(self, node: fx.Node, value: Any) -> Reach:
        if node.op == "placeholder":
            return Reach(0.0)
        incoming = [self.reaches[argument] for argument in node.all_input_nodes]
        if not _has_tensor(value) or all(reach.log_norm == CONSTANT for reach in incoming):
            return Reach(CONSTANT)
        if node.op == "output":
            return incoming[0] if len(incoming) == 1 else Reach(root_of_squares(incoming))
        if node.op == "call_module":
            return self._module_reach(node, value)
        rule = FUNCTION_RULES.get(node.target)
        if rule is None:
            raise no_rule(f"the {node.op.removeprefix('call_')} {name_of(node.target)}", str(node))
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return rule(Call(node, incoming, args, kwargs, value))

    def _module_reach(self, node: fx.Node, value: Any) -> Reach:
        module = self.fetch_attr(str(node.target))
        source = self.reaches[node.all_input_nodes[0]]
        modules = dict(self.module.named_modules())
        ndim = value.ndim if isinstance(value, Tensor) else 0
        if _absorbing_batch_norm(node, modules, ndim) is not None:
            return source
        before = node.all_input_nodes[0]
        absorbed = _absorbing_batch_norm(before, modules, ndim) is node
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        layer = Layer(
            [argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)],
            value,
            source.tokens,
            same_inputs=len([n for n in node.all_input_nodes if self.reaches[n].log_norm > CONSTANT]) == 1,
        )
        target, label = module, type(module).__name__
        if absorbed:
            target, label = modules[str(before.target)], f"{type(modules[str(before.target)]).__name__} + {label}"
            layer = replace(layer, transform=partial(_scale_outputs, batch_norm_scale(module)))
        elif self.centre and isinstance(module, nn.Linear) and _is_last(node):
            layer, label = replace(layer, transform=_centre_outputs), f"{label}, centred"
        _check_finite((module, target), str(node.target))
        gain = self._gain(target, layer, str(node.target))
        self.terms.append(BoundTerm(str(node.target), label, gain.norm))
        if gain.domain is not None:
            self.domains.append(gain.domain)
        return Reach(source.log_norm + log(gain.norm), gain.tokens)

    def _gain(self, module: nn.Module, layer: Layer, where: str) -> Gain:
        rule = find_rule(module)
        if rule is None:
            raise no_rule(type(module).__name__, where)
        try:
            gain = rule(module, layer)
        except NoBoundError as error:
            raise NoBoundError(f"At '{where}': {error}") from error
        return gain if isinstance(gain, Gain) else Gain(float(gain))


def _absorbing_batch_norm(node: fx.Node, modules: dict[str, nn.Module], ndim: int) -> fx.Node | None:
    """Return the batch norm that takes this linear layer in, if it is the only user and scales the same axis."""
    (user,) = node.users if len(node.users) == 1 else (None,)
    if node.op != "call_module" or user is None or user.op != "call_module":
        return None
    linear = modules[str(node.target)]
    if not isinstance(linear, _ConvNd) and not (isinstance(linear, nn.Linear) and ndim == 2):
        return None
    return user if isinstance(modules[str(user.target)], _BatchNorm) else None


def _check_finite(modules: Iterable[nn.Module], where: str) -> None:
    for module in modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not torch.isfinite(tensor).all():
                raise NonFiniteWeightsError(
                    f"'{where}' ({type(module).__name__}) has NaN or infinite values in {name}."
                )


def _scale_outputs(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *(1,) * (weight.ndim - 1)) * weight.detach().double()


def _centre_outputs(weight: Tensor) -> Tensor:
    return weight - weight.mean(0)


def _is_last(node: fx.Node) -> bool:
    return all(user.op == "output" for user in node.users)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _has_tensor(value: Any) -> bool:
    return next(_tensors(value), None) is not None
