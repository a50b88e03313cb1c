"""From a module to a graph of calls with the value of each at an example."""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisher_reg.bounds.rules.registry import find_rule
from fisher_reg.errors import NoBoundError, NonFiniteWeightsError

_TRACING = threading.RLock()  # the tracers of torch work on the whole process


@dataclass(frozen=True)
class Trace:
    """A traced module.

    Attributes:
        graph: Its calls, in order.
        modules: The modules that are called, by the targets of their nodes.
        values: What each call returned at the example, as it was before any later call changed it in place.
        stale: Pairs of a call in place and an older name of the same memory that is used again after it.
        lost: Values that were changed under another name, so that what they were is not known.
        batched: Tensors whose first axis is that of the examples.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    values: dict[fx.Node, Any]
    stale: tuple[tuple[fx.Node, fx.Node], ...]
    lost: frozenset[fx.Node]
    batched: frozenset[fx.Node]

    @property
    def output(self) -> fx.Node:
        """The last node."""
        node: fx.Node = next(node for node in self.graph.nodes if node.op == "output")
        return node

    @property
    def result(self) -> Any:
        """What the module returned."""
        return self.values[self.output]


def trace(model: nn.Module, inputs: Tensor) -> Trace:
    """Trace ``model``, which is in evaluation mode, and run it on ``inputs``.

    ``torch.fx`` keeps the modules as the user sees them; where it fails (control flow), ``torch.export`` is tried,
    whose graph holds for inputs of this size only.

    Returns:
        The trace.

    Raises:
        NoBoundError: For a model that neither can trace.
        NonFiniteWeightsError: For weights that are not finite.
        ValueError: For inputs of a size that the model does not take.
    """
    _check_weights(model)
    module = _graph_module(model, inputs)
    recorder = _Recorder(module)
    try:
        recorder.run(inputs)
    except NoBoundError:
        raise
    except Exception as error:  # the user's own forward runs here and may raise anything
        raise ValueError(f"{type(model).__name__} fails on inputs of shape {tuple(inputs.shape)}: {error}") from error
    modules = dict(module.named_modules())
    batched = frozenset(_batched(module, inputs, recorder.values))
    return Trace(module.graph, modules, recorder.values, tuple(recorder.stale), frozenset(recorder.lost), batched)


def where(node: fx.Node) -> str:
    """Return the name of a module call as the user knows it."""
    if node.op != "call_module":
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        inside = _without_root(str(stack[-1])) if stack else ""
        return f"{inside}.{node.name}" if inside else node.name
    return _without_root(str(node.target)) or "the model itself"


def asks_for_shape(node: fx.Node) -> bool:
    """Say whether the node asks a tensor for what does not depend on its values."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel", "is_floating_point")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def _without_root(path: str) -> str:
    for prefix in ("L['self'].", "L__self___", "model"):
        path = path.removeprefix(prefix)
    return path.removeprefix(".")


def _check_weights(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if find_rule(module) is None:
            continue  # its buffers may well be infinite, such as a mask
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not torch.isfinite(tensor).all():
                raise NonFiniteWeightsError(
                    f"'{name or 'the model itself'}' ({type(module).__name__}) has NaN or infinite values in {key}."
                )


class _Root(nn.Module):
    """Calls the model as its user does: with its hooks and the defaults of its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs)


class _Tracer(fx.Tracer):
    """A module with a rule of its own is one layer.

    ``torch.fx`` patches the calls of all modules in the process while it traces; those of other threads go on as they
    are.
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
        return find_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _graph_module(model: nn.Module, inputs: Tensor) -> fx.GraphModule:
    root = _Root(model)
    try:
        with _TRACING:
            graph = _Tracer().trace(root)
        return fx.GraphModule(root, graph)
    except Exception as error:  # the user's own forward meets placeholders here and may raise anything
        try:
            with _TRACING, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(root, (inputs,), strict=False).module()
        except Exception as second:
            raise NoBoundError(
                f"{type(model).__name__} cannot be traced. torch.fx: {_first_line(error)}{_line_of(error)} "
                f"torch.export: {_first_line(second)}\nMake its control flow independent of the data, or put the part "
                "in a module of its own and register a bound rule for that (fisher_reg.register_bound_rule). If the "
                "logits come from a part of it, wrap that: fisher_reg.LogitsOf(model, logits_fn)."
            ) from error
        assert isinstance(exported, fx.GraphModule)
        _check_independence(root, inputs)
        (output,) = exported.graph.find_nodes(op="output")
        if isinstance(output.args[0], list | tuple) and len(output.args[0]) == 1:
            output.args = (output.args[0][0],)  # what the code that export wraps around the graph would unpack
        return exported


def _check_independence(model: nn.Module, inputs: Tensor) -> None:
    """Refuse a model whose prediction depends on the size of the batch, which an exported graph has for a constant."""
    alone = model(inputs)
    try:
        together = model(torch.cat([inputs, inputs]))
    except RuntimeError:  # it takes batches of one size only
        return
    if isinstance(alone, Tensor) and not torch.allclose(together[: len(inputs)], alone, rtol=1e-3, atol=1e-5):
        raise NoBoundError("The prediction of an example depends on the size of its batch.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _batched(module: fx.GraphModule, inputs: Tensor, values: dict[fx.Node, Any]) -> set[fx.Node]:
    """Return the nodes whose first axis is that of the examples: it is reversed when they are.

    The graph is the same at all inputs, and random ones have no symmetry that hides the order, as equal examples have.
    """
    found = {
        node for node, value in values.items() if isinstance(value, Tensor) and value.shape[:1] == inputs.shape[:1]
    }
    if len(inputs) == 1:
        return found
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(inputs.shape, generator=generator, dtype=torch.float64).to(inputs)
    there, back = _Recorder(module), _Recorder(module)
    there.run(noise.clone())
    back.run(noise.flip(0))
    return {node for node in found if _agree(back.values[node].flip(0), there.values[node])}


def _agree(first: Tensor, second: Tensor) -> bool:
    if not second.is_floating_point():
        return torch.equal(first, second)
    size = second.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(size))


def _line_of(error: BaseException) -> str:
    """Return the place in the user's code: the last frame outside torch."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if "/torch/" not in filename and "fisher_reg/bounds" not in filename and not filename.startswith("<"):
            place = f" ({filename}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps every value as it was when it was made."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False  # the messages of the rules name the place
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}
        self.values: dict[fx.Node, Any] = {}
        self.stale: list[tuple[fx.Node, fx.Node]] = []
        self.lost: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        inputs = [node for node in n.all_input_nodes if isinstance(self.env[node], Tensor)]
        before = {node: self.env[node]._version for node in inputs}
        copies = {node: self.env[node].clone() for node in inputs} if _may_change_inputs(self.module, n) else {}
        value = super().run_node(n)
        self.values[n] = value
        for node, version in before.items():
            if self.env[node]._version != version:
                self._changed(n, node, copies.get(node))
        return value

    def _changed(self, by: fx.Node, node: fx.Node, copy: Tensor | None) -> None:
        storage = self.env[node].untyped_storage().data_ptr()
        for other, value in self.env.items():
            if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() != storage or other is by:
                continue
            if any(self.order[user] > self.order[by] for user in other.users):
                self.stale.append((by, other))
            if other is node and copy is not None and other not in self.lost:
                self.values[other] = copy
            else:
                self.lost.add(other)


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def _may_change_inputs(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (
        node.target in _IN_PLACE
        or bool(node.kwargs.get("inplace"))
        or name.split(".")[0].endswith("_")
        or (any(argument is True for argument in node.args))
    )
