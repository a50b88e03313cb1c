"""What reaches a value in the graph, and the calls of functions and methods that pass it on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fisher_reg.bounds.registry import Ball, Gain, Norms, Number, ScaledGain, Tokens
from fisher_reg.errors import NoBoundError


@dataclass(frozen=True)
class Reach:
    """How far the network's input reaches to a value.

    Attributes:
        log_norm: Logarithm of a Lipschitz constant of ``scale * value``, a scalar or one per example ``(B,)``; None for
            a value that does not depend on the input.
        scale: Coordinates, positive and broadcastable to the value; None for 1.
        range: Where the value lies, if known.
        parts: Of a value that is a tuple of tensors, what reaches each of them.
    """

    log_norm: Tensor | None
    scale: Tensor | None = None
    range: Tokens | Ball | None = None
    parts: tuple[Reach, ...] = ()

    @property
    def is_constant(self) -> bool:
        """Whether the value is known not to depend on the input."""
        return self.log_norm is None

    def after(self, gain: Gain) -> Reach:
        """Return what reaches the output of a layer."""
        assert self.log_norm is not None
        if isinstance(gain, ScaledGain):
            return Reach(self.log_norm + log(gain.norm), gain.scale, gain.reach)
        return Reach(self.plain().log_norm + log(gain.norm), None, gain.reach)  # type: ignore[operator]

    def plain(self) -> Reach:
        """Return the same without coordinates."""
        if self.scale is None or self.log_norm is None:
            return self
        return replace(self, log_norm=self.log_norm - self.scale.amin().log(), scale=None)

    def within(self, scale: Tensor | None) -> Tensor:
        """Return the log norm in other coordinates."""
        assert self.log_norm is not None
        if scale is self.scale:
            return self.log_norm
        ratio = torch.ones(()).double() if scale is None else scale
        return self.log_norm + (ratio if self.scale is None else ratio / self.scale).amax().log()


CONSTANT = Reach(None)


@dataclass(frozen=True)
class Operand:
    """An argument of a call: its value, and what reaches it (nothing, for a number or a constant)."""

    value: Any
    reach: Reach | tuple[Reach, ...]

    @property
    def is_constant(self) -> bool:
        """Whether nothing in it depends on the input."""
        reaches = self.reach if isinstance(self.reach, tuple) else (self.reach,)
        return all(reach.is_constant for reach in reaches)


@dataclass(frozen=True)
class Call:
    """One call of a function in the graph.

    Attributes:
        name: What a reader would call it.
        operands: The arguments by name.
        value: What it returned.
        again: Calls it once more with another first tensor.
        is_local: Whether the constant at the example is wanted.
        norms: What computes the norms of weights.
    """

    name: str
    operands: dict[str, Operand]
    value: Any
    again: Callable[[Any], Any]
    is_local: bool
    norms: Norms

    @property
    def source(self) -> Operand:
        """The one argument that depends on the input."""
        varying = [operand for operand in self.operands.values() if not operand.is_constant]
        if len(varying) != 1:
            raise NoBoundError(
                f"{self.name} combines two values that depend on the input, which has no global Lipschitz constant."
            )
        return varying[0]

    @property
    def reach(self) -> Reach:
        """What reaches the one argument that depends on the input."""
        reach = self.source.reach
        if isinstance(reach, tuple):
            raise NoBoundError(f"{self.name} takes several tensors at once.")
        return reach

    @property
    def copies(self) -> float:
        """How many outputs there are to one input: more than one where it was broadcast."""
        inputs: int = self.source.value.numel()
        outputs: int = self.value.numel()
        return outputs / inputs

    def argument(self, name: str, default: Any = None) -> Any:
        """Return the value of a constant argument."""
        if name not in self.operands:
            return default
        if not self.operands[name].is_constant:
            raise NoBoundError(f"{self.name}: {name} depends on the input.")
        return self.operands[name].value


@dataclass(frozen=True)
class FunctionRule:
    """A rule for calls whose arguments have these names, in this order; any others where ``names`` is None.

    It returns what reaches the value, or, for a layer of one input, its gain.
    """

    apply: Callable[[Call], Reach | Gain]
    names: tuple[str, ...] | None
    is_layer: bool = False


def make_call(
    rule: FunctionRule,
    node: fx.Node,
    reaches: dict[fx.Node, Reach],
    value: Any,
    fetch: Callable[[Any], Any],
    norms: Norms,
    is_local: bool,
) -> Call:
    """Bind the arguments of a node to their names.

    Args:
        rule: The rule that will be applied.
        node: A function or method call.
        reaches: What reaches the nodes before.
        value: What the call returned.
        fetch: From an argument of the node to its value.
        norms: What computes the norms of weights.
        is_local: Whether the constant at the example is wanted.

    Returns:
        The call.

    Raises:
        NoBoundError: For a signature that the rule does not know, or no tensor as the value.
    """
    name = f"'{node}' ({name_of(node.target)})"
    tensors = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise NoBoundError(f"{name} makes a {type(value).__name__} of a value that depends on the input.")
    arguments = _named(node, rule.names, name)
    operands = {key: Operand(fetch(argument), _reach_of(argument, reaches)) for key, argument in arguments.items()}

    def again(tensor: Any) -> Any:
        rest, keywords = fetch(node.args[1:]), fetch(node.kwargs)
        return (
            getattr(tensor, node.target)(*rest, **keywords)
            if isinstance(node.target, str)
            else node.target(tensor, *rest, **keywords)
        )

    return Call(name, operands, value, again, is_local, norms)


def _named(node: fx.Node, names: Sequence[str] | None, name: str) -> dict[str, Any]:
    if isinstance(node.target, torch._ops.OpOverload):
        schema = ["input" if item.name == "self" else item.name for item in node.target._schema.arguments]
        arguments = dict(zip(schema, node.args, strict=False)) | dict(node.kwargs)
        unknown = set() if names is None else set(arguments) - set(names)
    elif names is None:
        return {str(index): item for index, item in enumerate(node.args)} | dict(node.kwargs)
    else:
        unknown = set(node.kwargs) - set(names)
        if len(node.args) > len(names):
            raise NoBoundError(f"{name} is called with more arguments than its rule knows.")
        arguments = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if unknown:
        raise NoBoundError(f"{name} is called with {sorted(unknown)} more arguments than its rule knows.")
    return arguments


def _reach_of(argument: Any, reaches: dict[fx.Node, Reach]) -> Reach | tuple[Reach, ...]:
    if isinstance(argument, fx.Node):
        return reaches[argument]
    if isinstance(argument, list | tuple) and any(isinstance(item, fx.Node) for item in argument):
        return tuple(reaches[item] if isinstance(item, fx.Node) else CONSTANT for item in argument)
    found: list[Reach] = []
    fx.map_arg(argument, lambda node: found.append(reaches[node]))
    return tuple(found) if any(not reach.is_constant for reach in found) else CONSTANT


def name_of(target: Any) -> str:
    """Return what a reader would call the target of a node."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).removeprefix("aten.")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def as_double(value: Number) -> Tensor:
    """Return a number or tensor in double precision; a Python number is not rounded on the way."""
    return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def log(value: Number) -> Tensor:
    """Return the logarithm in double precision: minus infinity for zero, with a zero gradient there."""
    tensor = as_double(value)
    positive = tensor > 0
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(positive | tensor.isnan(), torch.where(positive, tensor, tiny + 0 * tensor).log(), -math.inf)


def log_sum(log_values: Iterable[Tensor]) -> Tensor:
    """Return the log of the sum of what the values are the logs of; the gradient is finite also where all are zero."""
    values = torch.stack(torch.broadcast_tensors(*log_values))
    largest = values.detach().amax(0)
    base = torch.where(largest == -math.inf, 0.0, largest)
    return base + log((values - base).exp().sum(0))


def side_by_side(log_norms: Iterable[Tensor]) -> Tensor:
    """Return the log norm of several values as one vector: the root of the sum of squares."""
    return 0.5 * log_sum([2 * log_norm for log_norm in log_norms])
