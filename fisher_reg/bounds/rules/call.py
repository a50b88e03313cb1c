"""One call of a function or method in the graph, with its arguments by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fisher_reg.bounds.rules.layer import Deviation, Gain, Layer, Norms
from fisher_reg.bounds.sensitivity import CONSTANT, Sensitivity
from fisher_reg.errors import NoBoundError


@dataclass(frozen=True)
class Operand:
    """An argument of a call.

    Attributes:
        value: The value at the examples.
        sensitivity: The sensitivity of the value; that of a constant for a number.
        deviation: The deviation over a region, if the first axis of the value is that of the examples.
        around: The deviation over a region, for any tensor.
        is_apart: Whether the first axis of the value is that of the examples.
        items: The operands of the tensors in a list.
    """

    value: Any
    sensitivity: Sensitivity | tuple[Sensitivity, ...]
    deviation: Deviation | None = None
    around: Deviation | None = None
    is_apart: bool = True
    items: tuple[Operand, ...] = ()

    @property
    def is_constant(self) -> bool:
        """Whether the argument does not depend on the input."""
        sensitivities = self.sensitivity if isinstance(self.sensitivity, tuple) else (self.sensitivity,)
        return all(sensitivity.is_constant for sensitivity in sensitivities)


@dataclass(frozen=True)
class Call:
    """One call of a function in the graph.

    Attributes:
        name: Name for messages.
        operands: The arguments by name.
        value: Its result.
        again: Repeats the call with another first argument.
        is_local: Whether the constant is that at each example; the first axis of all non-constant arguments is then
            that of the examples.
        norms: Computes the norms of weights.
        at_example: Whether the constant is that at the examples, for each of them or for all together.
    """

    name: str
    operands: dict[str, Operand]
    value: Any
    again: Callable[[Any], Any]
    is_local: bool
    norms: Norms
    at_example: bool = False

    @property
    def function(self) -> str:
        """The name of the called function."""
        return self.name[self.name.rfind("(") + 1 : -1]

    @property
    def source(self) -> Operand:
        """The only argument that depends on the input."""
        varying = [operand for operand in self.operands.values() if not operand.is_constant]
        if len(varying) != 1:
            raise NoBoundError(
                f"{self.name} combines two values that depend on the input, which has no global Lipschitz constant."
            )
        return varying[0]

    @property
    def sensitivity(self) -> Sensitivity:
        """The sensitivity of the only argument that depends on the input."""
        sensitivity = self.source.sensitivity
        if isinstance(sensitivity, tuple):
            raise NoBoundError(f"{self.name} takes several tensors at once.")
        return sensitivity

    @property
    def copies(self) -> float:
        """The number of outputs per input: more than one if the input was broadcast."""
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
    """A rule for calls whose arguments have these names, in this order; for any arguments if ``names`` is None.

    It returns the sensitivity of the value or, for a layer of one input, its gain.

    Attributes:
        apply: The rule.
        names: The names of the arguments.
        is_layer: Whether it returns a gain.
        shape_only: The arguments of which only the shape, type or device matters, not the value. ``*`` for all except
            the first.
        first_of_several: Whether the call returns a tuple, of which the rule bounds only the first item.
    """

    apply: Callable[[Call], Sensitivity | Gain]
    names: tuple[str, ...] | None
    is_layer: bool = False
    shape_only: tuple[str, ...] = ()
    first_of_several: bool = False

    def reads(self, name: str, place: int) -> bool:
        """Return whether the result depends on the value of an argument."""
        others = "*" in self.shape_only and place > 0
        return name not in self.shape_only and not others


def make_call(
    rule: FunctionRule,
    node: fx.Node,
    sensitivities: dict[fx.Node, Sensitivity],
    value: Any,
    fetch: Callable[[Any], Any],
    norms: Norms,
    is_local: bool,
    deviation_of: Callable[[fx.Node], Deviation | None] = lambda node: None,
    around_of: Callable[[fx.Node], tuple[Deviation | None, bool]] = lambda node: (None, True),
    at_example: bool = False,
) -> Call | None:
    """Bind the arguments of a node to their names.

    Args:
        rule: The rule that will be applied.
        node: A function or method call.
        sensitivities: Those of the previous nodes.
        value: The result of the call.
        fetch: From an argument of the node to its value.
        norms: Computes the norms of weights.
        is_local: Whether the constant is that at each example.
        deviation_of: From a node to its deviation over a region, if its first axis is that of the examples.
        around_of: From a node to its deviation, and whether its first axis is that of the examples.
        at_example: Whether the constant is at least that at all examples together.

    Returns:
        The call; None if the value does not depend on the input (its shape may).

    Raises:
        NoBoundError: For a signature that the rule does not know, or a result that is not a tensor.
    """
    name = f"'{node}' ({name_of(node.target)})"
    arguments = _named(node, rule.names, name)
    operands = {}
    for place, (key, argument) in enumerate(arguments.items()):
        is_read = rule.reads(key, place)
        operands[key] = Operand(
            fetch(argument),
            _sensitivity_of(argument, sensitivities) if is_read else CONSTANT,
            deviation_of(argument) if is_read and isinstance(argument, fx.Node) else None,
            *(around_of(argument) if is_read and isinstance(argument, fx.Node) else (None, True)),
            items=tuple(
                Operand(fetch(item), _sensitivity_of(item, sensitivities), None, *around_of(item))
                for item in (argument if isinstance(argument, list | tuple) else ())
                if isinstance(item, fx.Node)
            ),
        )
    if all(operand.is_constant for operand in operands.values()):
        return None
    tensors = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise NoBoundError(f"{name} converts a value that depends on the input to a {type(value).__name__}.")

    def again(first: Any) -> Any:
        rest, keywords = fetch(node.args[1:]), dict(fetch(node.kwargs))
        function: Any = getattr(first, node.target) if isinstance(node.target, str) else node.target
        if not node.args:
            return function(**keywords | {next(iter(arguments)): first})
        return function(*rest, **keywords) if isinstance(node.target, str) else function(first, *rest, **keywords)

    return Call(name, operands, value, again, is_local, norms, at_example)


def _named(node: fx.Node, names: Sequence[str] | None, name: str) -> dict[str, Any]:
    if isinstance(node.target, torch._ops.OpOverload):
        schema = ["input" if item.name == "self" else item.name for item in node.target._schema.arguments]
        arguments = dict(zip(schema, node.args, strict=False)) | dict(node.kwargs)
        unknown = set() if names is None else set(arguments) - set(names)
    elif names is None:
        return {str(index): item for index, item in enumerate(node.args)} | _first_tensor_first(node)
    else:
        keywords = {_SYNONYMS.get(key, key): item for key, item in _first_tensor_first(node).items()}
        unknown = set(keywords) - set(names)
        if len(node.args) > len(names):
            raise NoBoundError(f"{name} is called with more arguments than its rule knows.")
        arguments = dict(zip(names, node.args, strict=False)) | keywords
    if unknown:
        raise NoBoundError(f"{name} is called with {sorted(unknown)} more arguments than its rule knows.")
    return arguments


_SYNONYMS = {"axis": "dim", "keepdims": "keepdim"}
"""NumPy's names of arguments that torch also accepts, and torch's own names."""


def _first_tensor_first(node: fx.Node) -> dict[str, Any]:
    """Return the keywords; in a call without positional arguments, the one with the tensors first."""
    keywords = dict(node.kwargs)
    if node.args:
        return keywords
    first = next((key for key in keywords if key in ("input", "tensors", "tensor", "query")), next(iter(keywords)))
    return {first: keywords.pop(first), **keywords}


def _sensitivity_of(argument: Any, sensitivities: dict[fx.Node, Sensitivity]) -> Sensitivity | tuple[Sensitivity, ...]:
    if isinstance(argument, fx.Node):
        return sensitivities[argument]
    if isinstance(argument, list | tuple) and any(isinstance(item, fx.Node) for item in argument):
        return tuple(sensitivities[item] if isinstance(item, fx.Node) else CONSTANT for item in argument)
    found: list[Sensitivity] = []
    fx.map_arg(argument, lambda node: found.append(sensitivities[node]))
    return tuple(found) if any(not sensitivity.is_constant for sensitivity in found) else CONSTANT


def layer_of(call: Call, of: str | None = "input") -> Layer:
    """Return the call as that of a layer with one input: the argument ``of``, or, if None, the one that varies."""
    sensitivity = call.sensitivity
    if of is not None and call.operands[of] is not call.source:
        raise NoBoundError(f"{call.name}: an argument other than {of} depends on the input of the network.")
    return Layer(
        {"input": call.source.value},
        call.value,
        call.norms,
        sensitivity.range,
        is_local=call.is_local,
        deviation=call.source.deviation,
        scale=sensitivity.scale,
    )


def name_of(target: Any) -> str:
    """Return the name of the target of a node for messages."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).removeprefix("aten.")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
