"""The bound rules of functions and tensor methods, by what the graph calls.

A rule sees a call with its arguments under their names; an argument that it does not name is refused, and so is every
function without a rule.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from fisher_reg.bounds.registry import Gain, Layer, Tokens, find_rule
from fisher_reg.errors import NoBoundError

CONSTANT = -math.inf
"""Log of the Lipschitz constant of a value that does not depend on the input."""


@dataclass(frozen=True)
class Reach:
    """How far the network's input reaches to a value: log of a Lipschitz constant, and the range of the value."""

    log_norm: float
    tokens: Tokens | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the value is known not to depend on the input."""
        return self.log_norm == CONSTANT


@dataclass(frozen=True)
class Operand:
    """An argument of a call: its value, and what reaches it (nothing, for a number or a constant)."""

    value: Any
    reach: Reach


@dataclass(frozen=True)
class Call:
    """One call of a function in the graph, with its arguments by name and the tensor that it returned."""

    name: str
    operands: dict[str, Operand]
    value: Tensor

    @property
    def source(self) -> Operand:
        """The one argument that depends on the input."""
        varying = [operand for operand in self.operands.values() if not operand.reach.is_constant]
        if len(varying) != 1:
            raise NoBoundError(
                f"{self.name} combines two values that depend on the input, which has no global Lipschitz constant."
            )
        return varying[0]

    @property
    def copies(self) -> float:
        """How many outputs there are to one input: more than one where it was broadcast."""
        inputs: int = self.source.value.numel()
        return self.value.numel() / inputs


@dataclass(frozen=True)
class FunctionRule:
    """A rule for calls whose arguments have these names, in this order."""

    apply: Callable[[Call], Reach]
    names: tuple[str, ...]


def call_reach(rule: FunctionRule, node: fx.Node, reaches: dict[fx.Node, Reach], value: Any, fetch: Any) -> Reach:
    """Apply a rule to a node.

    Args:
        rule: What to apply.
        node: A function or method call.
        reaches: What reaches the nodes before.
        value: What the call returned.
        fetch: From an argument of the node to its value.

    Returns:
        What reaches the value.

    Raises:
        NoBoundError: For a signature that the rule does not know, or no tensor as the value.
    """
    name = f"'{node}' ({name_of(node.target)})"
    if not isinstance(value, Tensor):
        raise NoBoundError(f"{name} makes a {type(value).__name__} of a value that depends on the input.")
    unknown = set(node.kwargs) - set(rule.names)
    if len(node.args) > len(rule.names) or unknown:
        raise NoBoundError(f"{name} is called with {sorted(unknown) or 'more arguments'} than its rule knows.")
    arguments = dict(zip(rule.names, node.args, strict=False)) | dict(node.kwargs)
    operands = {key: Operand(fetch(argument), _reach_of(argument, reaches)) for key, argument in arguments.items()}
    return rule.apply(Call(name, operands, value))


def _reach_of(argument: Any, reaches: dict[fx.Node, Reach]) -> Reach:
    if isinstance(argument, fx.Node):
        return reaches[argument]
    found: list[Reach] = []
    fx.map_arg(argument, lambda node: found.append(reaches[node]))
    return Reach(side_by_side(found))


def _reshape(call: Call) -> Reach:
    return Reach(call.source.reach.log_norm)


def _same(call: Call) -> Reach:
    return call.source.reach


def _dropout(call: Call) -> Reach:
    if "training" not in call.operands or call.operands["training"].value is not False:
        raise NoBoundError(f"{call.name} drops also in evaluation; pass training=self.training.")
    return call.source.reach


def _index(call: Call) -> Reach:
    source, index = call.operands["input"], call.operands["index"].value
    if isinstance(source.value, list | tuple):
        return source.reach  # the outputs of a module, of which only the first is ever taken
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
        raise NoBoundError(f"{call.name} is indexed with a list or tensor, which may repeat elements.")
    return Reach(source.reach.log_norm)


def _expand(call: Call) -> Reach:
    return Reach(call.source.reach.log_norm + 0.5 * log(call.copies))


def _sum(call: Call) -> Reach:
    log_norms = [
        operand.reach.log_norm + 0.5 * log(call.value.numel() / operand.value.numel())
        for operand in call.operands.values()
        if isinstance(operand.value, Tensor)
    ]
    return Reach(_log_sum_exp(log_norms))


def _multiply(call: Call) -> Reach:
    source = call.source
    (factor,) = (operand.value for operand in call.operands.values() if operand is not source)
    return _scaled(call, torch.as_tensor(factor).detach().double())


def _divide(call: Call) -> Reach:
    if call.source is not call.operands["input"]:
        raise NoBoundError(f"{call.name} divides by a value that depends on the input: no global constant.")
    return _scaled(call, 1 / torch.as_tensor(call.operands["other"].value).detach().double())


def _scaled(call: Call, factor: Tensor) -> Reach:
    return Reach(call.source.reach.log_norm + log(float(factor.abs().max())) + 0.5 * log(call.copies))


def _negate(call: Call) -> Reach:
    return Reach(call.source.reach.log_norm)


def _concatenate(call: Call) -> Reach:
    if not isinstance(call.operands["tensors"].value, list | tuple):
        raise NoBoundError(f"{call.name} takes a list of tensors.")
    return call.operands["tensors"].reach


def _mean(call: Call) -> Reach:
    return Reach(call.source.reach.log_norm + 0.5 * log(call.copies))


def _as_module(build: Callable[..., nn.Module]) -> Callable[[Call], Reach]:
    """Reuse the rule of the module that a functional call is the forward of; its settings are the other arguments."""

    def rule(call: Call) -> Reach:
        source = call.source
        settings = {key: item.value for key, item in call.operands.items() if key not in ("input", "inplace")}
        module = build(**settings)
        found = find_rule(module)
        if found is None:
            raise NoBoundError(f"{call.name} has no rule for its module form {module}.")
        gain = found(module, Layer({"input": source.value}, call.value, source.reach.tokens))
        return Reach(source.reach.log_norm + log(gain.norm if isinstance(gain, Gain) else gain))

    return rule


FUNCTION_RULES: dict[Any, FunctionRule] = {}
"""From what the graph calls, a function or the name of a method, to its rule."""


def _register(apply: Callable[[Call], Reach], names: str, *targets: Any) -> None:
    FUNCTION_RULES.update(dict.fromkeys(targets, FunctionRule(apply, tuple(names.split()))))


_register(_sum, "input other", operator.add, operator.iadd, operator.sub, operator.isub)
_register(_sum, "input other", torch.add, torch.sub, "add", "add_", "sub", "sub_")
_register(_multiply, "input other", operator.mul, operator.imul, torch.mul, "mul", "mul_")
_register(_divide, "input other", operator.truediv, operator.itruediv, torch.div, "div", "div_")
_register(_negate, "input", operator.neg, torch.neg, "neg")
_register(_concatenate, "tensors dim", torch.cat, torch.concat, torch.stack)
_register(_mean, "input dim keepdim", torch.mean, "mean")
_register(_expand, "input a b c d e f", "expand", "expand_as", "repeat")
_register(_index, "input index", operator.getitem)
_register(_reshape, "input start_dim end_dim", torch.flatten, "flatten")
_register(_reshape, "input a b c d e f", torch.reshape, torch.permute, "reshape", "view", "permute")
_register(_reshape, "input dim0 dim1", torch.transpose, "transpose")
_register(_reshape, "input dim", torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze")
_register(_reshape, "input dim index", torch.select, "select")
_register(_same, "input", "contiguous", "clone", "detach", torch.clone, "float", "double")
_register(_dropout, "input p training inplace", F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
_register(_as_module(nn.ReLU), "input inplace", F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_register(_as_module(nn.GELU), "input approximate", F.gelu)
_register(_as_module(nn.SiLU), "input inplace", F.silu)
_register(_as_module(nn.Hardswish), "input inplace", F.hardswish)
_register(_as_module(nn.LeakyReLU), "input negative_slope inplace", F.leaky_relu)
_register(_as_module(nn.Tanh), "input", torch.tanh, F.tanh, "tanh")
_register(_as_module(nn.Sigmoid), "input", torch.sigmoid, F.sigmoid, "sigmoid")
_register(_as_module(nn.AdaptiveAvgPool2d), "input output_size", F.adaptive_avg_pool2d)
_register(
    _as_module(nn.AvgPool2d),
    "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    F.avg_pool2d,
)
_register(_as_module(nn.MaxPool2d), "input kernel_size stride padding dilation ceil_mode", F.max_pool2d)


def name_of(target: Any) -> str:
    """Return what a reader would call the target of a node."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def log(value: float) -> float:
    """Return the logarithm, minus infinity for zero."""
    return CONSTANT if value == 0 else math.log(value)


def side_by_side(reaches: Iterable[Reach]) -> float:
    """Return the log norm of several values as one vector: the root of the sum of squares."""
    return 0.5 * _log_sum_exp([2 * reach.log_norm for reach in reaches])


def _log_sum_exp(log_values: list[float]) -> float:
    return float(torch.tensor(log_values, dtype=torch.float64).logsumexp(0)) if log_values else CONSTANT
