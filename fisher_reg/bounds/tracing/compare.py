"""Comparison of a traced graph with its module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisher_reg.bounds.tracing.capture import where
from fisher_reg.bounds.tracing.exact import ExactArithmetic, widened
from fisher_reg.bounds.tracing.functional import Run
from fisher_reg.errors import NoBoundError

_RTOL = 1e-6
"""Largest difference, relative to the largest logit, between two orders of summation in float64."""


def eager(model: nn.Module, inputs: Tensor) -> Any:
    """Return the output of the module itself, in exact arithmetic."""
    with ExactArithmetic():
        return widened(model(inputs.clone()))


def answer(model: nn.Module, inputs: Tensor) -> Any:
    """Return the result of :func:`eager`, with clear errors.

    Raises:
        NoBoundError: For a TorchScript part whose weights have a fixed precision.
        ValueError: For inputs that the model does not accept.
    """
    try:
        return eager(model, inputs)
    except NoBoundError:
        raise
    except Exception as error:  # the user's forward may raise any error
        if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
            raise NoBoundError(
                f"{type(model).__name__} has a part in TorchScript that cannot be evaluated in float64: {error}\n"
                "Bound the module before it is scripted or frozen."
            ) from error
        raise ValueError(f"{type(model).__name__} fails on inputs of shape {tuple(inputs.shape)}: {error}") from error


def check_independence(model: nn.Module, inputs: Tensor) -> None:
    """Raise an error if a prediction is random, or depends on the other examples or on their number.

    Raises:
        NoBoundError: If it does.
    """
    whole = eager(model, inputs)
    if not isinstance(whole, Tensor) or whole.ndim == 0 or len(whole) != len(inputs):
        return  # not logits: the caller raises the error
    if not _agree(eager(model, inputs), whole):
        raise NoBoundError(
            "The forward of the model is random, also in evaluation mode, or changes its own buffers, so that there is "
            "no one function to bound. Draw random numbers, and write to buffers, only if self.training; for "
            "functional dropout pass training=self.training."
        )
    for part in _other_batches(inputs):
        try:
            logits = eager(model, part)
        except Exception:  # noqa: S112  the model may need a certain batch size
            continue
        if not isinstance(logits, Tensor) or logits.ndim == 0 or len(logits) != len(part):
            continue  # for example because it drops an axis of length one
        shared = min(len(part), len(inputs))
        if not _agree(logits[:shared], whole[:shared]):
            raise NoBoundError(
                "The prediction of an example depends on the other examples of its batch, or on how many they are, so "
                "that there is no Jacobian per example."
            )


def takes_other_sizes(model: nn.Module, inputs: Tensor) -> bool:
    """Return whether a module accepts batches of other sizes than that of the inputs."""
    try:
        logits = [(eager(model, part), len(part)) for part in _other_batches(inputs)]
    except Exception:  # the user's forward may raise any error
        return False
    return all(isinstance(item, Tensor) and item.shape[:1] == (size,) for item, size in logits)


def first_difference(model: nn.Module, module: fx.GraphModule, inputs: Tensor, sizes: bool) -> str | None:
    """Return where a graph first differs from the module; None if it does not.

    They are compared at the inputs, at other values, and at other batch sizes.

    Args:
        model: The module that was traced.
        module: Its graph.
        inputs: ``(B, *S)``.
        sizes: Whether the graph is meant for other batch sizes.
    """
    points = [inputs, *_other_values(inputs), *(_other_batches(inputs) if sizes else ())]
    for number, point in enumerate(points):
        calls: list[tuple[nn.Module, Any]] = []
        try:
            with _recorded(model, calls):
                expected = eager(model, point)
        except Exception:
            if number == 0:
                raise
            continue  # the module does not accept these values or this batch size
        run = Run(module)
        try:
            found = run(point)
        except Exception as error:  # the graph is valid only for the values or sizes of the example
            return f"it fails on other inputs of the same shape: {error}" if number else str(error)
        if not _agree(found, expected):
            return _place(model, module, run, calls)
    return None


def _other_values(inputs: Tensor) -> Iterator[Tensor]:
    """Yield other inputs of the same shape: random ones in the same range, and large ones of either sign."""
    low, high = inputs.amin(), inputs.amax()
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(inputs.shape, generator=generator, dtype=torch.float64).to(inputs)
    spread = (high - low).clamp_min(1e-3)
    yield low + spread * uniform
    yield -3 * inputs
    yield (low - 10 * spread) + 20 * spread * uniform


def _other_batches(inputs: Tensor) -> Iterator[Tensor]:
    yield torch.cat([inputs, inputs[:1]])
    if len(inputs) > 1:
        yield inputs[:1]


def _agree(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return type(found) is type(expected)
    if found.shape != expected.shape:
        return False
    finite = expected[expected.isfinite()]
    size = float(finite.detach().abs().max()) if finite.numel() else 0.0
    return torch.allclose(found, expected, rtol=_RTOL, atol=_RTOL * size, equal_nan=True)


class _recorded:  # noqa: N801  a context manager
    """Records the outputs of the modules of a model, in the order of their calls."""

    def __init__(self, model: nn.Module, calls: list[tuple[nn.Module, Any]]) -> None:
        self.model, self.calls, self.handles = model, calls, []  # type: ignore[var-annotated]

    def __enter__(self) -> None:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self.calls.append((module, output.clone() if isinstance(output, Tensor) else output))

        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self.handles.append(module.register_forward_hook(keep))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _place(model: nn.Module, module: fx.GraphModule, run: Run, calls: list[tuple[nn.Module, Any]]) -> str:
    """Return the name of the first layer whose value in the graph differs from that in the module."""
    for node, value in run.values.items():
        if node.op != "call_module":
            continue
        called = module.get_submodule(str(node.target))
        # the graph may contain a copy of an in-place layer
        same = (number for number, (owner, _) in enumerate(calls) if owner._parameters is called._parameters)
        place = next(same, None)
        if place is None:
            return f"'{where(node)}' ({type(called).__name__}) is not called"
        if not _agree(value, calls[place][1]):
            return f"the input of '{where(node)}' ({type(called).__name__}) differs"
        calls = calls[place + 1 :]
    return "the operations after the last layer differ"
