"""The product of the Jacobian norms of the blocks of a network, estimated at given inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisher_reg.arguments import LIKELIHOOD
from fisher_reg.bounds.compositions import traced_model
from fisher_reg.bounds.report import BoundTerm, UpperBound
from fisher_reg.bounds.tracing import Trace, asks_for_shape, where
from fisher_reg.evaluation import (
    InputStd,
    Noise,
    check_inputs,
    measured,
    standard_deviation,
    twice_differentiable,
)
from fisher_reg.likelihood import Categorical, Gaussian, Likelihood
from fisher_reg.operator import InputFisher, double_backward
from fisher_reg.solvers import Lanczos

_SOLVER = Lanczos(num_steps=30, rtol=1e-2)


def blockwise_fisher_bound(
    model: nn.Module,
    inputs: Tensor,
    *,
    num_segments: int | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
) -> UpperBound:
    r"""Multiply the largest singular values of the Jacobians of consecutive segments of the network, at the inputs.

    .. math:: \|F(x)\|_2 \le \lambda_\max(F_m(h_{m-1})) \prod_{i<m} \|\partial h_i / \partial h_{i-1}\|_2^2 ,

    where :math:`F_m` is the Fisher matrix of the last segment with respect to its own input. A segment ends at a value
    that all later values depend on only through it: after a layer of a plain network, or after a residual or dense
    block. The inequality is proven, but its right side is an estimate: each factor is computed by iteration, from
    below. With one segment the result is the estimate of :func:`fisher_reg.fisher_spectral_norm`.

    Args:
        model: The network. It is evaluated in evaluation mode and not modified.
        inputs: ``(B, *S)``.
        num_segments: Number of segments, with about the same number of layers; by default one per layer or block.
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.

    Returns:
        Values ``(B,)`` in nats per squared input unit, not certified. At most 33 backward and 31 double-backward passes
        through the network.

    Raises:
        NoBoundError: If the network cannot be traced.
        ValueError: If the network has fewer segments.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> for layer in model:
        ...     _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> blockwise_fisher_bound(model, torch.zeros(1, 2)).value  # |J_1|^2 = 2, F_2 = p (1 - p) |w0 - w1|^2 = 1
        tensor([2.], dtype=torch.float64)
    """
    check_inputs(inputs)
    LIKELIHOOD.check(likelihood, "blockwise_fisher_bound")
    whole_std = standard_deviation(input_std, inputs)
    traced = traced_model(model, inputs, likelihood)
    segments = _grouped(_segments(traced), num_segments)
    logs, names = [], []
    for segment in segments:
        is_last = segment is segments[-1]
        std = whole_std if segment is segments[0] else None
        with Noise(inputs.device).replayed():
            logs.append(_log10_norm(segment, likelihood if is_last else Gaussian(), std))
        names.append(segment.name)
    terms = tuple(
        BoundTerm(name, "segment", float((0.5 * value).median().mul(math.log(10)).exp()), float(value.mean()))
        for name, value in zip(names, logs, strict=True)
    )
    return UpperBound("blockwise", torch.stack(logs).sum(0), False, terms, "the given inputs")


@dataclass(frozen=True)
class _Segment:
    """The part of a traced network between the values of two nodes."""

    trace: Trace
    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The place in the network where it begins."""
        return where(self.nodes[0])

    def __call__(self, hidden: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {self.start: hidden.clone()}  # an in-place layer must not change a leaf

        def fetch(argument: Any) -> Any:
            return fx.map_arg(argument, lambda node: values.get(node, self.trace.values[node]))

        for node in self.nodes:
            arguments, keywords = fetch(node.args), fetch(node.kwargs)
            values[node] = _callee(self.trace, node, arguments)(*arguments[node.op == "call_method" :], **keywords)
        end: Tensor = values[self.end]
        return end.flatten(1)


def _callee(trace: Trace, node: fx.Node, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    if node.op == "call_module":
        return trace.modules[str(node.target)]
    if node.op == "call_method":
        method: Callable[..., Any] = getattr(arguments[0], str(node.target))
        return method
    assert callable(node.target)
    return node.target


def _segments(trace: Trace) -> list[_Segment]:
    """Split the graph, before layers with weights, at each value that all later values depend on."""
    nodes = [node for node in trace.graph.nodes if node.op != "output"]
    order = {node: index for index, node in enumerate(trace.graph.nodes)}
    varying: set[fx.Node] = set()
    for node in nodes:
        depends = node.op == "placeholder" or any(item in varying for item in node.all_input_nodes)
        if depends and not asks_for_shape(node):
            varying.add(node)
    last_use = {node: max((order[user] for user in node.users), default=-1) for node in varying}
    cuts = [
        node
        for node in nodes
        if node in varying
        and node in trace.batched
        and all(last_use[other] <= order[node] for other in varying if order[other] < order[node])
    ]
    (start,) = [node for node in nodes if node.op == "placeholder"]
    parts: list[_Segment] = []
    for before, after in zip(cuts, cuts[1:], strict=False):
        inside = tuple(node for node in nodes if order[before] < order[node] <= order[after] and node in varying)
        parts.append(_Segment(trace, before, after, inside))
    merged: list[_Segment] = []
    for part in parts:
        has_weights = any(_has_weights(trace, node) for node in part.nodes)
        if merged and not (has_weights and any(_has_weights(trace, node) for node in merged[-1].nodes)):
            merged[-1] = _joined([merged[-1], part])
        else:
            merged.append(part)
    assert start is cuts[0]
    return merged


def _has_weights(trace: Trace, node: fx.Node) -> bool:
    """Return whether the node is a layer with weights; a batch norm belongs to the layer before it."""
    if node.op == "call_module":
        module = trace.modules[str(node.target)]
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        return not is_norm and any(True for _ in module.parameters())
    weights = (item for item in node.all_input_nodes if item.op == "get_attr")
    return any(isinstance(trace.values[item], Tensor) and trace.values[item].ndim > 1 for item in weights)


def _joined(segments: list[_Segment]) -> _Segment:
    nodes = tuple(node for segment in segments for node in segment.nodes)
    return _Segment(segments[0].trace, segments[0].start, segments[-1].end, nodes)


def _grouped(segments: list[_Segment], num_segments: int | None) -> list[_Segment]:
    available = len(segments)
    wanted = available if num_segments is None else num_segments
    if not 1 <= wanted <= available:
        raise ValueError(
            f"This network has {available} segments; num_segments must lie in 1..{available}, got {wanted}."
        )
    edges = [round(index * available / wanted) for index in range(wanted + 1)]
    return [_joined(segments[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]


def _log10_norm(segment: _Segment, likelihood: Likelihood, input_std: Tensor | None) -> Tensor:
    with measured(segment.trace.values[segment.start]) as hidden, twice_differentiable():
        operator = InputFisher(segment, hidden, likelihood, input_std, double_backward)
        return _SOLVER.solve(operator).eigenvalue.detach().double().log10()
