"""From a module to a graph of its calls, by ``torch.fx`` or by ``torch.export``."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from fisher_reg.bounds.rules.call import name_of
from fisher_reg.bounds.rules.registry import find_function_rule, find_rule
from fisher_reg.bounds.tracing.exact import ExactArithmetic

_TRACING = threading.RLock()  # the tracers of torch patch the whole process


def captured_by_fx(model: nn.Module) -> fx.GraphModule:
    """Return the graph of the calls that the module makes, with the modules of the user.

    The module is run on placeholders. Control flow that depends on values fails, and a forward that treats non-tensors
    differently is traced wrongly: the caller must compare.
    """
    root = _Root(model)
    with _TRACING, _leaf_parameters(root), _open_layers():
        graph = _Tracer().trace(root)
    return fx.GraphModule(root, graph)


def captured_by_export(model: nn.Module, inputs: Tensor) -> fx.GraphModule:
    """Return the graph of the ATen operators for inputs of this size, with in-place operators replaced."""
    root = _Root(model)
    with _TRACING, warnings.catch_warnings(), _leaf_parameters(root) as weights, ExactArithmetic(), _open_layers():
        warnings.simplefilter("ignore")
        program = torch.export.export(root, (inputs,), strict=False)
        exported = program.run_decompositions({}).module()
    assert isinstance(exported, fx.GraphModule)
    for path, part in exported.named_modules():
        for name in part._parameters:
            part._parameters[name] = weights[f"{path}.{name}".removeprefix(".")]
    (output,) = exported.graph.find_nodes(op="output")
    if isinstance(output.args[0], list | tuple) and len(output.args[0]) == 1:
        output.args = (output.args[0][0],)  # export's wrapper code, which is not used here, would unpack the tuple
    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # like view, but for every memory layout
    _without_copies(exported.graph)
    _with_directions(exported.graph)
    return exported


def _without_copies(graph: fx.Graph) -> None:
    """Replace a copy into another tensor by its result, since the operator has no derivative."""
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        target, source = node.args[:2]
        with graph.inserting_before(node):
            expanded = graph.call_function(aten.expand_as.default, (source, target))
            converted = graph.call_function(aten.type_as.default, (expanded, target))
        expanded.meta, converted.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(converted)
        graph.erase_node(node)


def where(node: fx.Node) -> str:
    """Return the name of a module call as the user knows it."""
    if node.op != "call_module":
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        inside = _without_root(str(stack[-1])) if stack else ""
        return f"{inside}.{node.name}" if inside else node.name
    return _without_root(str(node.target)) or "the model itself"


def asks_for_shape(node: fx.Node) -> bool:
    """Return whether the node returns a property of a tensor that does not depend on its values."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel", "is_floating_point", "stride", "element_size")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device", "is_cuda", "layout")


def detaches(node: fx.Node) -> bool:
    """Return whether the node returns its input without its autograd graph."""
    return node.op in ("call_function", "call_method") and name_of(node.target) in ("detach", "detach_")


@contextmanager
def _leaf_parameters(root: nn.Module) -> Generator[dict[str, Any], None, None]:
    """Replace the converted weights by torch parameters, and yield the weights by their names."""
    weights: dict[str, Any] = {}
    slots: list[tuple[dict[str, Any], str]] = []
    leaves: dict[int, nn.Parameter] = {}  # shared weights stay shared
    for path, part in root.named_modules(remove_duplicate=False):
        for name, weight in part._parameters.items():
            if weight is not None:
                weights[f"{path}.{name}"] = weight
                slots.append((part._parameters, name))
    kept = [(parameters, name, parameters[name]) for parameters, name in slots]
    for parameters, name, weight in kept:
        if not isinstance(weight, nn.Parameter):
            parameters[name] = leaves.setdefault(id(weight), nn.Parameter(weight.detach(), weight.is_floating_point()))
    try:
        yield weights
    finally:
        for parameters, name, weight in kept:
            parameters[name] = weight


def _without_root(path: str) -> str:
    for prefix in ("L['self'].", "L__self___", "model"):
        path = path.removeprefix(prefix)
    return path.removeprefix(".")


@contextmanager
def _open_layers() -> Generator[None, None, None]:
    """Make torch's encoder layers call their parts, instead of one fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _with_directions(graph: fx.Graph) -> None:
    """Replace ``v / |v|`` by one call of ``normalize``, since a quotient has no constant over all inputs."""
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        vectors, below = node.args
        expanded = below if _calls(below, aten.expand.default) else None
        clamped = expanded.args[0] if expanded is not None else below
        if not _calls(clamped, aten.clamp_min.default):
            continue
        length, eps = clamped.args
        settings: tuple[Any, ...] = tuple(length.args[1:]) if isinstance(length, fx.Node) else ()
        if not _calls(length, aten.linalg_vector_norm.default) or length.args[0] is not vectors:
            continue
        defaults: tuple[Any, ...] = (2, None, False)
        order, dim, keepdim = settings + defaults[len(settings) :]
        if order != 2 or not isinstance(dim, list | tuple) or len(dim) != 1 or keepdim is not True:
            continue
        with graph.inserting_before(node):
            direction = graph.call_function(F.normalize, (vectors, 2.0, dim[0], eps))
        direction.meta = dict(node.meta)
        node.replace_all_uses_with(direction)
        graph.erase_node(node)


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def calls_unknown_functions(module: fx.GraphModule) -> bool:
    """Return whether the graph contains a library function as one call, which has no rule."""
    return any(
        node.op == "call_function" and find_function_rule(node.target) is None and not _is_torchs_own(node.target)
        for node in module.graph.nodes
    )


def _is_torchs_own(target: Any) -> bool:
    home = getattr(target, "__module__", None) or "torch"
    return home.split(".")[0] in ("torch", "_operator", "builtins", "math", "operator")


class _Root(nn.Module):
    """Calls the model like its user: with its hooks and the defaults of its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs)


class _Tracer(fx.Tracer):
    """A tracer for which a module with its own rule is one layer.

    ``torch.fx`` patches the calls of all modules in the process while it traces; calls of other threads are executed
    normally.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if find_rule(m) is not None:
            return True
        return not isinstance(m, _CONTAINERS) and super().is_leaf_module(m, module_qualified_name)


_CONTAINERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules of torch whose forward is traced."""
