r"""Diagonal scalings of the channels that make the product of the layers' norms small.

An activation acts on each channel separately, so that its Jacobian D commutes with any positive diagonal matrix
:math:`T`. With slopes of at most 1, :math:`\|W_2 D W_1\| \le \|W_2 T^{-1}\| \|T W_1\|` for every T. A good T is found
by gradient descent on the product of Schatten norms, which are cheap and smooth; then the certified norms are computed.
The semidefinite programme LipSDP also optimises such diagonal multipliers, over all layers at once.

Reference: Fazlyab et al. (2019), "Efficient and accurate estimation of Lipschitz constants for deep neural networks",
arXiv 1906.04893.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fisher_reg.bounds.rules.activations import activation_gain
from fisher_reg.bounds.rules.arithmetic import adds
from fisher_reg.bounds.rules.identity import drop, passes, same
from fisher_reg.bounds.rules.linear import conv_rule, linear_rule
from fisher_reg.bounds.rules.normalization import batch_norm_rule
from fisher_reg.bounds.rules.pooling import POOLING_RULES
from fisher_reg.bounds.rules.registry import find_function_rule, find_rule
from fisher_reg.bounds.tracing import Trace

_LEARNING_RATE = 0.05


def balanced_scales(
    trace: Trace, num_steps: int, log_bound: Callable[[Mapping[fx.Node, Tensor]], Tensor]
) -> dict[fx.Node, Tensor]:
    """Return scalings T of the outputs of the linear layers of a traced model, one per stream.

    Args:
        trace: The model.
        num_steps: Number of optimisation steps.
        log_bound: From scalings ``(C,)`` by layer to the differentiable objective.

    Returns:
        Scalings ``(C,)`` by layer.
    """
    streams = _streams(trace)
    logs = {
        stream: torch.zeros(_width(trace, stream), dtype=torch.float64, device=trace.values[stream].device)
        for stream in dict.fromkeys(streams.values())
    }
    if not logs:
        return {}
    for value in logs.values():
        value.requires_grad_()
    optimizer = torch.optim.Adam(logs.values(), lr=_LEARNING_RATE)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(num_steps):
            # sum_l log ||T_l W_l T_{l-1}^{-1}||, in Schatten norms
            objective = log_bound({node: logs[stream].exp() for node, stream in streams.items()})
            gradients = torch.autograd.grad(objective, list(logs.values()), allow_unused=True, materialize_grads=True)
            for value, gradient in zip(logs.values(), gradients, strict=True):
                value.grad = gradient
            optimizer.step()
    return {node: logs[stream].detach().exp() for node, stream in streams.items()}


def _streams(trace: Trace) -> dict[fx.Node, fx.Node]:
    """Return for each linear layer its stream, named by the first layer of those whose outputs are added to each other.

    Summands must have the same scaling. A layer whose output is added to a value without a scaling is left out.
    """
    parent: dict[fx.Node, fx.Node] = {}
    stream: dict[fx.Node, fx.Node | None] = {}
    pinned: set[fx.Node] = set()

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in trace.graph.nodes:
        inputs = [
            stream[item]
            for item in node.all_input_nodes
            if isinstance(trace.values[item], Tensor) and item.op != "get_attr"
        ]
        stream[node] = None
        if _width(trace, node):
            parent[node] = stream[node] = node
        elif adds(node) and len(inputs) == 2:
            found = [root(item) for item in inputs if item is not None]
            if len(found) == 2:
                parent[found[1]] = stream[node] = found[0]
            pinned.update(found if len(found) == 1 else ())
        elif len(inputs) == 1 and _keeps_channels(trace, node):
            stream[node] = inputs[0]
    free = {root(node) for node in parent} - {root(node) for node in pinned}
    return {node: root(node) for node in parent if root(node) in free and not _is_output(node)}


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _width(trace: Trace, node: fx.Node) -> int:
    """Return the number of output channels of a linear layer, 0 for anything else."""
    value = trace.values[node]
    if node.op != "call_module" or not isinstance(value, Tensor):
        return 0
    rule = find_rule(trace.modules[str(node.target)])
    if rule is conv_rule:
        return value.shape[1]
    return value.shape[-1] if rule is linear_rule else 0


def _keeps_channels(trace: Trace, node: fx.Node) -> bool:
    if node.op != "call_module":
        return node.op in ("call_function", "call_method") and _passes_channels(node.target)
    rule = find_rule(trace.modules[str(node.target)])
    return rule in (activation_gain, batch_norm_rule, passes) or rule in POOLING_RULES


def _passes_channels(target: Any) -> bool:
    """Return whether the function acts on each channel separately and keeps their order."""
    rule = find_function_rule(target)
    return rule is not None and (
        rule.is_layer and rule.apply.__name__ == "rule_of_module" or rule.apply in (same, drop)
    )
