"""The constant of a traced network, with the best of several diagonal scalings, and the share of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisher_reg.bounds.operator_norms.measures import CertifiedNorms
from fisher_reg.bounds.operator_norms.schatten import SchattenNorms
from fisher_reg.bounds.propagate import Composition, compose
from fisher_reg.bounds.region import Region
from fisher_reg.bounds.report import BoundTerm
from fisher_reg.bounds.rules.call import name_of
from fisher_reg.bounds.rules.layer import Norms
from fisher_reg.bounds.rules.registry import find_rule
from fisher_reg.bounds.sensitivity import log
from fisher_reg.bounds.tangents import Tangents
from fisher_reg.bounds.tighten.balance import balanced_scales
from fisher_reg.bounds.tightening import Tightening
from fisher_reg.bounds.tracing import Trace, trace
from fisher_reg.bounds.tracing.compare import answer, check_independence
from fisher_reg.errors import NoBoundError
from fisher_reg.evaluation import Noise, check_inputs, deployed_module, differentiable
from fisher_reg.likelihood import Likelihood
from fisher_reg.outputs import check_logits

Head = Callable[[Composition, Tensor], Tensor]
"""From a composition and the logits to the logarithm of the factor of the head."""


def tightest(compositions: list[Composition], logits: Tensor, head: Head, power: int) -> tuple[Composition, Tensor]:
    """Return the best of several compositions, and its log value: ``power`` times its log constant, plus the head."""
    values = [power * item.log_norm + head(item, logits) for item in compositions]
    best = min(range(len(values)), key=lambda index: float(values[index].detach().mean()))
    return compositions[best], values[best]


def compositions_of(
    traced: Trace,
    likelihood: Likelihood,
    tightening: Tightening,
    *,
    is_local: bool = False,
    region: Region | None = None,
    norms: Norms | None = None,
    tangents: Tangents | None = None,
) -> list[Composition]:
    """Return the composition without extra scalings, and that with balanced scalings if ``balancing_steps > 0``.

    Args:
        traced: The network.
        likelihood: The output distribution.
        tightening: The certified improvements to use.
        is_local: Whether the constants are those at the examples.
        region: The inputs around the examples for which the constants hold; None for all.
        norms: Computes the norms of weights.
        tangents: The Jacobians of the values at the examples, if they are known.
    """
    scales: list[Mapping[fx.Node, Tensor] | None] = [None]
    if tightening.balancing_steps:
        with suppress(NoBoundError):  # balancing needs a constant over all inputs
            scales.append(balanced_coordinates(traced, tightening, likelihood))
    norms = CertifiedNorms(tightening.dense) if norms is None else norms
    return [
        compose(
            traced,
            norms,
            tightening=tightening,
            is_local=is_local,
            output_scales=item,
            region=region,
            tangents=tangents,
        )
        for item in scales
    ]


def balanced_coordinates(trace: Trace, tightening: Tightening, likelihood: Likelihood) -> dict[fx.Node, Tensor]:
    """Return scalings ``(C,)`` of linear layers that make the bound small, by gradient descent on Schatten norms."""
    norms = SchattenNorms()

    def log_bound(scales: Mapping[fx.Node, Tensor]) -> Tensor:
        composition = compose(trace, norms, tightening=tightening, differentiable=True, output_scales=scales)
        return 2 * composition.log_norm + log(likelihood.largest_curvature(composition.head))

    return balanced_scales(trace, tightening.balancing_steps, log_bound)


def traced_model(model: nn.Module, inputs: Tensor, likelihood: Likelihood) -> Trace:
    """Trace ``model`` in evaluation mode and in float64, after checking the arguments."""
    module = checked_module(model, inputs)
    with differentiable(inputs) as safe_inputs, torch.no_grad(), Noise(inputs.device).replayed():
        traced = trace(module, safe_inputs.double(), partial(check_logits, likelihood=likelihood))
    return without_log_softmax(traced) if likelihood.shift_invariant else traced


def checked_module(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return a copy of the model in evaluation mode and in float64 that shares its parameters.

    Raises:
        ValueError: If the inputs are not a batch of numbers, the model is not a module, or the device has no float64.
    """
    check_inputs(inputs)
    if not isinstance(model, nn.Module):
        raise ValueError(f"A bound needs the weights of an nn.Module; got {type(model).__name__}.")
    if inputs.device.type == "mps":
        raise ValueError("A bound is computed in float64, which MPS does not have. Bound model.cpu() at inputs.cpu().")
    return deployed_module(model, torch.float64)


def without_log_softmax(traced: Trace) -> Trace:
    """Return a trace without a final log-softmax over the classes, which only shifts all logits by a number."""
    last = traced.output.args[0]
    if not isinstance(last, fx.Node) or len(last.users) > 1 or not _is_log_softmax(traced, last):
        return traced
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node is not last:
            copies[node] = graph.node_copy(node, lambda item: copies[last.all_input_nodes[0] if item is last else item])
    values = {copies[node]: value for node, value in traced.values.items() if node in copies}
    values[copies[traced.output]] = traced.values[last.all_input_nodes[0]]
    batched = frozenset(copies[node] for node in traced.batched if node in copies)
    return Trace(fx.GraphModule(traced.module, graph), traced.modules, values, batched, traced.takes_other_sizes)


def _is_log_softmax(traced: Trace, node: fx.Node) -> bool:
    dim: Any
    if node.op == "call_module":
        module = traced.modules[str(node.target)]
        dim = module.dim if type(module) is nn.LogSoftmax and find_rule(module) is not None else None
    else:
        is_one = node.op != "placeholder" and name_of(node.target) in ("log_softmax", "_log_softmax")
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")) if is_one else None
    return traced.result.ndim == 2 and isinstance(dim, int) and dim % 2 == 1


def checked_logits(module: nn.Module, point: Tensor, likelihood: Likelihood) -> Tensor:
    """Return the logits of a module in float64, after checking them and that no example depends on the others."""
    logits: Tensor = answer(module, point)
    check_logits(logits, len(point), likelihood)
    check_independence(module, point)
    return logits


def traced_at_few(model: nn.Module, inputs: Tensor, likelihood: Likelihood) -> Trace:
    """Trace the model at two inputs, or at all if it needs them, for a bound that depends only on their shape."""
    check_inputs(inputs)
    if len(inputs) <= 2:
        return traced_model(model, inputs, likelihood)
    try:
        return traced_model(model, inputs[:2], likelihood)
    except (NoBoundError, ValueError):  # the model may need all inputs
        return traced_model(model, inputs, likelihood)


def shares(composition: Composition, log_value: Tensor, log_head: Tensor, power: int) -> tuple[BoundTerm, ...]:
    """Return the share of each layer in a log value, and that of the head."""
    # share_l = (d log_value / d log_norm_l) log_norm_l
    leaves = [term.log_norm for term in composition.terms]
    slopes = torch.autograd.grad(log_value.mean(), leaves, allow_unused=True, materialize_grads=True) if leaves else ()
    terms = []
    for term, slope in zip(composition.terms, slopes, strict=True):
        log_norm = term.log_norm.detach()
        decades = float((slope * log_norm).nan_to_num(0.0, 0.0, 0.0).sum()) / math.log(10)
        terms.append(BoundTerm(term.name, term.layer, float(log_norm.exp().median()), decades))
    if composition.head is not None:
        decades = float(log_head.mean()) / math.log(10)
        norm = float((log_head / power).exp().median())
        terms.append(BoundTerm(composition.head_name, "Linear, with the softmax", norm, decades))
    return tuple(terms)
