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
        value: At the examples.
        sensitivity: That of a constant, for a number.
        deviation: Over a region, where the first axis of the value is that of the examples.
        around: Likewise for any tensor.
        is_apart: Whether the first axis of the value is that of the examples.
        items: The same of each tensor in a list.
    """

    value: Any
    sensitivity: Sensitivity | tuple[Sensitivity, ...]
    deviation: Deviation | None = None
    around: Deviation | None = None
    is_apart: bool = True
    items: tuple[Operand, ...] = ()

    @property
    def is_constant(self) -> bool:
        """Whether nothing in it depends on the input."""
        sensitivities = self.sensitivity if isinstance(self.sensitivity, tuple) else (self.sensitivity,)
        return all(sensitivity.is_constant for sensitivity in sensitivities)


@dataclass(frozen=True)
class Call:
    """One call of a function in the graph.

    Attributes:
        name: What a reader would call it.
        operands: The arguments by name.
        value: What it returned.
        again: Calls it once more with another first argument.
        is_local: Whether the constant at the example is wanted, and the first axis of what varies is that of examples.
        norms: What computes the norms of weights.
        at_example: Whether the constant at the examples is wanted, for each or for all of them together.
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
        """The name of what is called."""
        return self.name[self.name.rfind("(") + 1 : -1]

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
    def sensitivity(self) -> Sensitivity:
        """The sensitivity of the one argument that depends on the input."""
        sensitivity = self.source.sensitivity
        if isinstance(sensitivity, tuple):
            raise NoBoundError(f"{self.name} takes several tensors at once.")
        return sensitivity

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

    It returns the sensitivity of the value, or, for a layer of one input, its gain.

    Attributes:
        apply: The rule.
        names: The names of the arguments.
        is_layer: Whether it returns a gain.
        shape_only: The arguments that give no more than a shape, a type or a device: the value does not depend on
            theirs. ``*`` for all but the first.
        first_of_several: Whether the call returns a tuple, of which the rule is about the first.
    """

    apply: Callable[[Call], Sensitivity | Gain]
    names: tuple[str, ...] | None
    is_layer: bool = False
    shape_only: tuple[str, ...] = ()
    first_of_several: bool = False

    def reads(self, name: str, place: int) -> bool:
        """Say whether the value depends on that of an argument."""
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
        sensitivities: Those of the nodes before.
        value: What the call returned.
        fetch: From an argument of the node to its value.
        norms: What computes the norms of weights.
        is_local: Whether the constant at the example is wanted.
        deviation_of: From a node to how far its value may be from the one at the example, over a region.
        around_of: Likewise for every tensor, and whether its first axis is that of the examples.
        at_example: Whether the constant at all examples together is wanted at least.

    Returns:
        The call; None where the value does not depend on the input, only its shape may.

    Raises:
        NoBoundError: For a signature that the rule does not know, or no tensor as the value.
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
        raise NoBoundError(f"{name} makes a {type(value).__name__} of a value that depends on the input.")

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
"""Names of arguments that torch knows from NumPy, and its own."""


def _first_tensor_first(node: fx.Node) -> dict[str, Any]:
    """Return the keywords, in a call without positional arguments the one with the tensors first."""
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
    """Return the call as the call of a layer of one input, the argument of a name; None for whichever it is."""
    sensitivity = call.sensitivity
    if of is not None and call.operands[of] is not call.source:
        raise NoBoundError(f"{call.name}: another argument than its {of} depends on the input of the network.")
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
    """Return what a reader would call the target of a node."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).removeprefix("aten.")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
