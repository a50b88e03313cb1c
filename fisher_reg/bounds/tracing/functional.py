"""A graph without in-place calls: no value changes after it has been computed."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fisher_reg.bounds.tracing.capture import asks_for_shape, detaches, where
from fisher_reg.bounds.tracing.exact import ExactArithmetic, widened
from fisher_reg.errors import NoBoundError


class Run(fx.Interpreter):
    """Runs a graph in exact arithmetic and stores every value.

    Attributes:
        values: The result of each call.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False  # the messages of the rules already name the place
        self.values: dict[fx.Node, Any] = {}

    def __call__(self, inputs: Tensor) -> Any:
        """Return the output of the graph."""
        with ExactArithmetic():
            return self.run(inputs.clone())

    def run_node(self, n: fx.Node) -> Any:
        """Run one call; a detached value stays in the autograd graph, since it depends on the input."""
        if detaches(n):
            source = self.fetch_args_kwargs_from_env(n)[0][0]
            value = source.view_as(source)  # a new tensor object on the same memory
        else:
            value = widened(super().run_node(n))
        self.values[n] = value
        return value


def recomputed(target: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of a function, a module or a method given by name, in exact arithmetic."""
    with ExactArithmetic():
        return widened(
            getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
        )


class _Writes(Run):
    """Finds the calls that write to the value of an earlier call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}
        self.written: dict[fx.Node, list[fx.Node]] = {}
        self.renamed: list[tuple[fx.Node, fx.Node]] = []

    def run_node(self, n: fx.Node) -> Any:
        versions = {node: self.env[node]._version for node in n.all_input_nodes if isinstance(self.env[node], Tensor)}
        value = super().run_node(n)
        changed = [node for node, version in versions.items() if self.env[node]._version != version]
        # views share the version counter of their base, so that operands on the memory of the target are found too
        if changed:
            self.written[n] = changed
            self._follow(n, value, changed)
        return value

    def _follow(self, by: fx.Node, value: Any, changed: list[fx.Node]) -> None:
        """Find earlier nodes on the changed memory that are used again."""
        memory = {_memory(self.env[node]) for node in changed}
        for other, held in self.env.items():
            if not isinstance(held, Tensor) or other is by or _memory(held) not in memory:
                continue
            if _is_same_view(held, value):
                self.renamed.append((other, by))
            elif self._is_used_after(by, other) and (not isinstance(value, Tensor) or _overlap(held, value)):
                raise NoBoundError(
                    f"'{where(by)}' changes '{where(other)}' in place, which is used again afterwards. Write it out of "
                    "place."
                )

    def _is_used_after(self, by: fx.Node, other: fx.Node) -> bool:
        return any(self.order[user] > self.order[by] and not asks_for_shape(user) for user in other.users)


def made_functional(module: fx.GraphModule, inputs: Tensor) -> None:
    """Rewrite a graph so that no call changes the value of an earlier call, and remove dead code.

    A later use of a tensor that was changed in place is replaced by the result of that call, and the call works on a
    clone.

    Args:
        module: The graph, which is modified; the modules in it are those of the caller and are not modified.
        inputs: An example.

    Raises:
        NoBoundError: If another view of a changed tensor is used again, which a functional graph cannot express.
    """
    graph = module.graph
    run = _Writes(module)
    run(inputs)
    for other, by in run.renamed:  # in the order of the calls, so that chains of changes lead to the last one
        for user in [item for item in other.users if run.order[item] > run.order[by]]:
            user.replace_input_with(other, by)
    for by, targets in run.written.items():
        if _works_out_of_place(module, by):
            continue
        for target in targets:
            with graph.inserting_before(by):
                clone = graph.call_method("clone", (target,))
            run.order[clone] = run.order[by]
            by.replace_input_with(target, clone)
    _without_dead_code(graph)
    module.recompile()


def _works_out_of_place(module: fx.GraphModule, node: fx.Node) -> bool:
    """Replace a call by its out-of-place form, if torch has one with the same arguments."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        if getattr(called, "inplace", False) is not True:
            return False
        # a copy with the same weights: the original model, for the comparison, still works in place
        called = copy.copy(called)
        called.inplace = False  # type: ignore[assignment]
        module.set_submodule(str(node.target), called)
        return True
    if node.kwargs.get("inplace") is True:
        node.update_kwarg("inplace", False)
        return True
    form = _out_of_place(node.target)
    if form is None:
        return False
    node.target = form
    return True


def _out_of_place(target: Any) -> Any:
    """Return the out-of-place form of a target, such as ``add`` for ``add_``; None if there is none."""
    if target in _OPERATORS:
        return _OPERATORS[target]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return None
    if isinstance(target, str):
        return name[:-1] if hasattr(Tensor, name[:-1]) else None
    homes = (torch, torch.nn.functional)
    return next((getattr(home, name[:-1]) for home in homes if getattr(home, name, None) is target), None)


_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _without_dead_code(graph: fx.Graph) -> None:
    """Remove the nodes on which the output does not depend."""
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or any(user in used for user in node.users):
            used.add(node)
    for node in reversed(graph.nodes):
        if node not in used:
            graph.erase_node(node)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_same_view(first: Tensor, second: Any) -> bool:
    return (
        isinstance(second, Tensor)
        and first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Return whether two views of the same memory have an entry in common."""
    if _memory(first) != _memory(second):
        return True  # the call did not return the tensor that it changed
    places = torch.arange(first.untyped_storage().nbytes() // first.element_size())
    theirs = [set_.flatten() for set_ in (_view(places, first), _view(places, second))]
    return bool(torch.isin(theirs[0], theirs[1]).any())


def _view(places: Tensor, like: Tensor) -> Tensor:
    return places.as_strided(like.shape, like.stride(), like.storage_offset())
