"""The trace of a module: the graph of its calls with the value of each call at an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisher_reg.bounds.rules.registry import find_rule
from fisher_reg.bounds.tracing.capture import calls_unknown_functions, captured_by_export, captured_by_fx
from fisher_reg.bounds.tracing.compare import answer, check_independence, first_difference, takes_other_sizes
from fisher_reg.bounds.tracing.functional import Run, made_functional
from fisher_reg.errors import NoBoundError, NonFiniteWeightsError


@dataclass(frozen=True)
class Trace:
    """A traced module in exact arithmetic.

    Attributes:
        module: The graph of its calls, without in-place calls and dead code.
        modules: The modules that are called, by the targets of their nodes.
        values: The result of each call at the example, in float64.
        batched: The nodes of tensors whose first axis is that of the examples.
        takes_other_sizes: Whether the graph has been compared with the module at other batch sizes too.
    """

    module: fx.GraphModule
    modules: dict[str, nn.Module]
    values: dict[fx.Node, Any]
    batched: frozenset[fx.Node]
    takes_other_sizes: bool = False

    @property
    def graph(self) -> fx.Graph:
        """The calls in order."""
        return self.module.graph

    @property
    def input(self) -> fx.Node:
        """The node of the network's input."""
        node: fx.Node = next(node for node in self.graph.nodes if node.op == "placeholder")
        return node

    @property
    def output(self) -> fx.Node:
        """The last node."""
        node: fx.Node = next(node for node in self.graph.nodes if node.op == "output")
        return node

    @property
    def result(self) -> Any:
        """The output of the module."""
        return self.values[self.output]


def trace(model: nn.Module, inputs: Tensor, check: Callable[[Any, int], None] = lambda logits, size: None) -> Trace:
    """Trace ``model``, whose weights are float64, in evaluation mode, and run it on ``inputs``.

    Args:
        model: The module.
        inputs: ``(B, *S)`` in float64.
        check: Called with the output of the module at the inputs, and B, before tracing.

    Returns:
        A trace whose graph gives the logits of the module at the inputs, at other values, and at another batch size.
        Cost: about ten forward passes.

    Raises:
        NoBoundError: If no tracer gives a correct graph; the message names the first operation that differs.
        NonFiniteWeightsError: For weights that are not finite.
        ValueError: For inputs of a size that the model does not accept.
    """
    _check_weights(model)
    logits = answer(model, inputs)
    check(logits, len(inputs))
    check_independence(model, inputs)
    module, is_flexible = _read(model, inputs)
    run = Run(module)
    run(inputs)
    batched = frozenset(_batched(module, inputs, run.values))
    return Trace(module, dict(module.named_modules()), run.values, batched, is_flexible)


def _read(model: nn.Module, inputs: Tensor) -> tuple[fx.GraphModule, bool]:
    """Return the first graph that agrees with the model, and whether it does at other batch sizes."""
    tracers: Sequence[tuple[str, Callable[[], fx.GraphModule], bool]] = (
        ("torch.fx", lambda: captured_by_fx(model), True),
        ("torch.export", lambda: captured_by_export(model, inputs), False),
    )
    failures = []
    whole: fx.GraphModule | None = None
    cause: BaseException | None = None
    for name, capture, sizes in tracers:
        try:
            module = capture()
            made_functional(module, inputs)
            difference = first_difference(model, module, inputs, sizes)
        except Exception as error:  # the user's forward may raise any error for placeholders
            failures.append(f"{name}: {_first_line(error)}{_line_of(error)}")
            cause = cause or error
            continue
        if difference is None and calls_unknown_functions(module) and not name.endswith("export"):
            whole = module  # the other tracer may trace into the function
            continue
        if difference is None:
            return module, sizes and takes_other_sizes(model, inputs)
        failures.append(f"the graph of {name} differs from the module: {_first_line(difference)}.")
    if whole is not None:
        return whole, takes_other_sizes(model, inputs)
    raise NoBoundError(
        f"{type(model).__name__} cannot be traced. {' '.join(failures)}\n"
        "Make its control flow independent of the data and avoid in-place changes, or put the part in a "
        "separate module and register a bound rule for it (fisher_reg.register_bound_rule). If the logits come "
        "from a part of the model, wrap it: fisher_reg.LogitsOf(model, logits_fn)."
    ) from cause


def _check_weights(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if find_rule(module) is None:
            continue  # buffers may be infinite, such as a mask
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not torch.isfinite(tensor).all():
                raise NonFiniteWeightsError(
                    f"'{name or 'the model itself'}' ({type(module).__name__}) has NaN or infinite values in {key}."
                )


def _first_line(error: BaseException | str) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _line_of(error: BaseException) -> str:
    """Return the position in the user's code: the last frame outside torch."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if "/torch/" not in filename and "fisher_reg/bounds" not in filename and not filename.startswith("<"):
            place = f" ({filename}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


def _batched(module: fx.GraphModule, inputs: Tensor, values: dict[fx.Node, Any]) -> set[fx.Node]:
    """Return the nodes whose first axis is that of the examples: reversing the examples reverses this axis.

    Random inputs are used, since equal examples would give the same values in any order.
    """
    found = {
        node for node, value in values.items() if isinstance(value, Tensor) and value.shape[:1] == inputs.shape[:1]
    }
    if len(inputs) == 1:
        return found
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(inputs.shape, generator=generator, dtype=torch.float64).to(inputs)
    there, back = Run(module), Run(module)
    there(noise)
    back(noise.flip(0))
    return {node for node in found if _agree(back.values[node].flip(0), there.values[node])}


def _agree(first: Tensor, second: Tensor) -> bool:
    if not second.is_floating_point():
        return torch.equal(first, second)
    size = second.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()
    return torch.allclose(first, second, rtol=1e-6, atol=1e-8 * float(size))
