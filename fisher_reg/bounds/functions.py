"""The bound rules of functions and tensor methods, by what the graph calls."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from fisher_reg.bounds.registry import Gain, Layer, NoBoundError, Tokens, find_rule

CONSTANT = -math.inf
"""Log of the Lipschitz constant of a value that does not depend on the input."""


@dataclass(frozen=True)
class Reach:
    """How far the network's input reaches to a value: log of a Lipschitz constant, and the range of the value."""

    log_norm: float
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Call:
    """One call of a function in the graph: its node, what reaches its arguments, and their values."""

    node: fx.Node
    incoming: list[Reach]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any

    @property
    def source(self) -> Reach:
        """The one argument that depends on the input."""
        variable: list[Reach] = []
        fx.map_arg((self.node.args, self.node.kwargs), lambda node: variable.append(self.reach(node)))
        variable = [reach for reach in variable if reach.log_norm != CONSTANT]
        if len(variable) != 1:
            raise NoBoundError(
                f"'{self.node}' ({name_of(self.node.target)}) combines two values that depend on the input, "
                "which has no global Lipschitz constant."
            )
        return variable[0]

    def reach(self, node: fx.Node) -> Reach:
        """What reaches one argument."""
        return self.incoming[self.node.all_input_nodes.index(node)]


def _shape(call: Call) -> Reach:
    return Reach(call.source.log_norm)


def _same(call: Call) -> Reach:
    return call.source


def _expand(call: Call) -> Reach:
    copies = call.value.numel() / call.args[0].numel()
    return Reach(call.source.log_norm + 0.5 * log(copies))


def _sum(call: Call) -> Reach:
    if call.kwargs:
        raise NoBoundError(f"'{call.node}' adds with the options {sorted(call.kwargs)}, which have no rule.")
    log_norms = []
    for argument, node in zip(call.args, call.node.args, strict=True):
        if isinstance(node, fx.Node) and isinstance(argument, Tensor):
            log_norms.append(call.reach(node).log_norm + 0.5 * log(call.value.numel() / argument.numel()))
    return Reach(_log_sum_exp(log_norms))


def _scale(call: Call, invert: bool = False) -> Reach:
    source = call.source
    variable = next(
        argument
        for argument, node in zip(call.args, call.node.args, strict=True)
        if isinstance(node, fx.Node) and call.reach(node) is source
    )
    constant = torch.as_tensor(call.args[1] if variable is call.args[0] else call.args[0]).detach().double()
    if invert and variable is call.args[1]:
        raise NoBoundError(f"'{call.node}' divides by a value that depends on the input: no global constant.")
    factor = float((1 / constant if invert else constant).abs().max())
    return Reach(source.log_norm + log(factor) + 0.5 * log(call.value.numel() / variable.numel()))


def _divide(call: Call) -> Reach:
    return _scale(call, invert=True)


def _concatenate(call: Call) -> Reach:
    nodes = call.node.args[0]
    assert isinstance(nodes, list | tuple)
    return Reach(root_of_squares([call.reach(node) for node in nodes if isinstance(node, fx.Node)]))


def _mean(call: Call) -> Reach:
    averaged = call.args[0].numel() / call.value.numel()
    return Reach(call.source.log_norm - 0.5 * log(averaged))


def _as_module(build: Callable[..., nn.Module], *ignored: str) -> Callable[[Call], Reach]:
    """Reuse the rule of the module that a functional call is the forward of."""

    def rule(call: Call) -> Reach:
        kwargs = {
            key: value for key, value in call.kwargs.items() if key not in ("inplace", "input", "training", *ignored)
        }
        module = build(*call.args[1:], **kwargs)
        found = find_rule(module)
        assert found is not None
        gain = found(module, Layer([call.args[0]], call.value, call.source.tokens))
        norm = gain.norm if isinstance(gain, Gain) else gain
        return Reach(call.source.log_norm + log(norm))

    return rule


FUNCTION_RULES: dict[Any, Callable[[Call], Reach]] = {
    **dict.fromkeys(
        (operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_"), _sum
    ),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul"), _scale),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div"), _divide),
    **dict.fromkeys((torch.cat, torch.concat, torch.stack), _concatenate),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys(("expand", "expand_as", "repeat"), _expand),
    **dict.fromkeys(
        (operator.getitem, getattr, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze)
        + (torch.unsqueeze, "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "select"),
        _shape,
    ),
    **dict.fromkeys(("contiguous", "clone", "detach", torch.clone, "float", "to"), _same),
    **dict.fromkeys((F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"), _as_module(nn.ReLU)),
    F.gelu: _as_module(nn.GELU),
    F.silu: _as_module(nn.SiLU),
    F.hardswish: _as_module(nn.Hardswish),
    F.leaky_relu: _as_module(nn.LeakyReLU),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), _as_module(nn.Tanh)),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), _as_module(nn.Sigmoid)),
    **dict.fromkeys((F.dropout, F.dropout2d), _same),
    F.adaptive_avg_pool2d: _as_module(nn.AdaptiveAvgPool2d),
    F.avg_pool2d: _as_module(nn.AvgPool2d),
    F.max_pool2d: _as_module(nn.MaxPool2d, "return_indices"),
}


def name_of(target: Any) -> str:
    """Return what a reader would call the target of a node."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def log(value: float) -> float:
    """Return the logarithm, minus infinity for zero."""
    return CONSTANT if value == 0 else math.log(value)


def _log_sum_exp(log_values: list[float]) -> float:
    return float(torch.tensor(log_values, dtype=torch.float64).logsumexp(0))


def root_of_squares(reaches: list[Reach]) -> float:
    """Return the reach of several values side by side."""
    return 0.5 * _log_sum_exp([2 * reach.log_norm for reach in reaches])
