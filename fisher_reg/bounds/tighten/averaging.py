r"""Two layers and the activation between them, bounded together.

An activation with slopes in :math:`[\alpha, \beta]` has a Jacobian :math:`D = c I + r E` with
:math:`c = (\beta + \alpha) / 2`, :math:`r = (\beta - \alpha) / 2` and a diagonal :math:`\|E\| \le 1`. A residual block
with the shortcut S is therefore at most

.. math:: \|S + W_2 D W_1\| \le \|S + c\, W_2 W_1\| + r\, \|W_2\| \|W_1\| ,

where the plain bound is :math:`\|S\| + \beta \|W_2\| \|W_1\|`; without a shortcut S = 0. The matrix
:math:`S + c\, W_2 W_1` is formed by applying the layers to the unit vectors.

Reference: Combettes, Pesquet (2020), "Lipschitz certificates for layered network structures driven by averaged
activation operators", SIAM Journal on Mathematics of Data Science 2(2), arXiv 1903.01014.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisher_reg.bounds.rules.activations import activation_module, slope_range
from fisher_reg.bounds.rules.arithmetic import adds
from fisher_reg.bounds.rules.identity import passes
from fisher_reg.bounds.rules.linear import conv_rule, linear_rule
from fisher_reg.bounds.rules.normalization import batch_norm_rule
from fisher_reg.bounds.rules.registry import find_rule
from fisher_reg.bounds.rules.shapes import moves
from fisher_reg.bounds.tracing import Trace

_MAX_SIDE = 4096
"""Largest number of columns of a matrix that is formed."""
_MAX_NUMBERS = 2**25
"""Largest number of its entries (256 MiB)."""


@dataclass(frozen=True)
class Average:
    """The part ``S + c W_2 W_1`` of a block.

    Attributes:
        source: The node whose value is the input of the block.
        share: ``r / beta``: the factor of the plain bound of the branch.
        branch: The nodes after the activation up to the end of the branch, in order; without a shortcut the last node
            is the end of the block.
        matrix: ``(*S_out, *S_in)`` flattened: one row per output.
    """

    source: fx.Node
    share: float
    branch: tuple[fx.Node, ...]
    matrix: Tensor


def average(trace: Trace, node: fx.Node) -> Average | None:
    """Return the averaged part of the block that ends at ``node``, or None if there is no such block."""
    found = _block(trace, node)
    if found is None:
        return None
    source, activation, branch = found
    if not (node in trace.batched and source in trace.batched):
        return None
    value, start = trace.values[node][:1], trace.values[source][:1]
    module = _activation(trace, activation)
    bounds = None if module is None else slope_range(module)
    if (
        bounds is None
        or bounds[0] <= -bounds[1]
        or start.numel() > _MAX_SIDE
        or start.numel() * value.numel() > _MAX_NUMBERS
    ):
        return None
    lowest, highest = bounds
    # columns of S + c W_2 W_1, with c = (beta + alpha) / 2
    rows = _responses(trace, source, node, activation, (highest + lowest) / 2)
    if rows is None:
        return None
    path = _path(trace, activation, branch)
    return Average(source, (highest - lowest) / (2 * highest), path, rows.flatten(1).mT)  # r / beta


def _block(trace: Trace, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return the source, the activation and the end of the branch of the block that ends at ``node``."""
    if _is_sum(trace, node):
        first, second = _operands(trace, node)
        for branch, shortcut in ((first, second), (second, first)):
            activation = _root(trace, branch)
            if _activation(trace, activation) is not None:
                (before,) = _operands(trace, activation)
                source = _root(trace, shortcut)
                if _root(trace, before) is source and before is not source and branch is not activation:
                    return source, activation, branch
        return None
    if not _is_layer(trace, node):
        return None
    activation = _root(trace, node)
    if _activation(trace, activation) is None:
        return None
    (before,) = _operands(trace, activation)
    source = _root(trace, before)
    return None if before is source else (source, activation, node)


def _responses(trace: Trace, source: fx.Node, end: fx.Node, activation: fx.Node, slope: float) -> Tensor | None:
    """Return the outputs of the block for all unit vectors of its source, ``(n, *S_out)``, with a constant slope."""
    start = trace.values[source][:1]
    basis = torch.eye(start.numel(), dtype=torch.float64, device=start.device).view(-1, *start.shape[1:])
    known: dict[fx.Node, Tensor | None] = {source: basis}

    def response(node: fx.Node) -> Tensor | None:
        if node not in known:
            inputs = [response(item) for item in _operands(trace, node)]
            known[node] = None if any(item is None for item in inputs) else apply(node, inputs)  # type: ignore[arg-type]
        return known[node]

    def apply(node: fx.Node, inputs: list[Tensor]) -> Tensor | None:
        if node is activation:
            return slope * inputs[0]
        if len(inputs) == 2:
            return inputs[0] + inputs[1] if inputs[0].shape == inputs[1].shape else None
        function = _linear_part(trace, node)
        try:
            made = function(inputs[0])
        except RuntimeError:  # a reshape with a fixed batch size
            return None
        expected = trace.values[node].shape[1:]
        return made if made.shape == (len(basis), *expected) else None

    return response(end)


def _linear_part(trace: Trace, node: fx.Node) -> Callable[[Tensor], Tensor]:
    """Return the node as a linear function of a batch, in double precision."""
    if node.op == "call_module":
        module = trace.modules[str(node.target)]  # in float64 and in evaluation
        return lambda batch: module(batch) - module(torch.zeros_like(batch[:1]))
    arguments = node.args[1:]
    return lambda batch: _call(node, batch, arguments)


def _call(node: fx.Node, batch: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    target = node.target
    function = getattr(type(batch), target) if isinstance(target, str) else target
    result: Tensor = function(batch, *arguments, **node.kwargs)
    return result


def _root(trace: Trace, node: fx.Node) -> fx.Node:
    """Return the node from which ``node`` follows by linear functions only: the first that is not linear itself."""
    while _is_linear(trace, node):
        (node,) = _operands(trace, node)
    return node


def _path(trace: Trace, start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """Return the linear nodes after ``start`` up to ``end``."""
    nodes = []
    while end is not start:
        nodes.append(end)
        (end,) = _operands(trace, end)
    return tuple(reversed(nodes))


def _operands(trace: Trace, node: fx.Node) -> list[fx.Node]:
    return [item for item in node.all_input_nodes if isinstance(trace.values[item], Tensor) and item.op != "get_attr"]


def _is_linear(trace: Trace, node: fx.Node) -> bool:
    if len(_operands(trace, node)) != 1 or not isinstance(trace.values[node], Tensor):
        return False
    if node.op == "call_module":
        return find_rule(trace.modules[str(node.target)]) in (conv_rule, linear_rule, batch_norm_rule, passes)
    return moves(node) and not any(isinstance(item, fx.Node) for item in (*node.args[1:], *node.kwargs.values()))


def _is_layer(trace: Trace, node: fx.Node) -> bool:
    return node.op == "call_module" and find_rule(trace.modules[str(node.target)]) in (conv_rule, linear_rule)


def _is_sum(trace: Trace, node: fx.Node) -> bool:
    return adds(node) and len(_operands(trace, node)) == 2 and "sub" not in str(node.target)


def _activation(trace: Trace, node: fx.Node) -> nn.Module | None:
    """Return the activation that the node applies, as a module."""
    if len(_operands(trace, node)) != 1:
        return None
    if node.op == "call_module":
        return trace.modules[str(node.target)]
    return activation_module(node.target) if node.op in ("call_function", "call_method") else None
