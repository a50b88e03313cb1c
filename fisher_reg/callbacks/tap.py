"""Reuse the forward of a training step: where a module takes its inputs in, and where its logits come out."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisher_reg.batch_statistics import untracked
from fisher_reg.forward import RandomState


class Flow:
    """What was seen of one training step.

    Attributes:
        source: The inputs that were looked for.
        inputs: What the module got instead: equal, with a gradient of their own.
        state: The random numbers when it got them.
        num_forwards: How often it got them.
        outputs: The logits that came out, each tensor once.
    """

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.inputs = source
        self.state: RandomState | None = None
        self.num_forwards = 0
        self.outputs: list[Tensor] = []

    @property
    def obstacle(self) -> str | None:
        """Why the forward of this step cannot be reused; None if it can."""
        if self.num_forwards == 0:
            return "the training step did not call forward, or a part of it, on the inputs of the batch themselves"
        if self.num_forwards > 1:
            return "the training step called forward on the inputs more than once"
        if len(self.outputs) != 1 or not self.outputs[0].requires_grad:
            return "the forward of the training step gave no logits with a gradient"
        if self.outputs[0].dtype in (torch.float16, torch.bfloat16):
            return "the training step computes in half precision, whose round-off would drown the penalty"
        return None


class Tap:
    """The modules by which inputs go in, and those by which the logits of these inputs come out.

    Both are found by one forward, and only what belongs to one call is used: a module that gets the inputs and nothing
    else, and a module inside that call (perhaps itself) that gave the very logits of the whole.
    """

    def __init__(self, inlets: list[nn.Module], outlets: list[nn.Module]) -> None:
        self.inlets = inlets
        self.outlets = outlets

    @classmethod
    def find(cls, module: nn.Module, model: nn.Module, inputs: Tensor) -> Tap:
        """Run ``model`` once, in its own mode, without a trace in batch statistics or random numbers.

        Args:
            module: The module whose parts may be tapped.
            model: The one that gives logits; ``module`` itself or a wrapper of it.
            inputs: ``(B, *S)``.

        Returns:
            The tap, without inlets where there is none.
        """
        probe = inputs.detach().clone()
        inlets: list[nn.Module] = []
        given: list[tuple[nn.Module, Tensor]] = []

        def before(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _gets_only(probe, args, kwargs):
                inlets.append(part)

        def after(part: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if isinstance(output, Tensor):
                given.append((part, output))

        with ExitStack() as stack:
            for part in module.modules():
                stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(after).remove)
            stack.enter_context(RandomState(inputs.device).restored())
            stack.enter_context(untracked(model))
            stack.enter_context(torch.no_grad())
            logits = model(probe)
        if not isinstance(logits, Tensor):
            return cls([], [])
        outlets = [part for part, output in given if output.shape == logits.shape and torch.equal(output, logits)]
        return cls(list(dict.fromkeys(inlets)), list(dict.fromkeys(outlets)))

    @contextmanager
    def open(self, source: Tensor) -> Generator[Flow, None, None]:
        """Watch for ``source`` during the block; the inlets get a copy of it that has a gradient."""
        flow = Flow(source)
        inside: list[nn.Module] = []

        def before(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if inside or not _gets_only(source, args, kwargs) or not torch.is_grad_enabled():
                return None
            inside.append(part)
            flow.num_forwards += 1
            flow.inputs = source.detach().requires_grad_()
            flow.state = RandomState(source.device)
            return (flow.inputs.clone(),), kwargs  # a copy, since a leaf may not be changed in place

        def give(part: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if inside and not any(output is known for known in flow.outputs):
                flow.outputs.append(output)

        def leave(part: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if inside and inside[0] is part:
                inside.pop()

        with ExitStack() as stack:
            for part in self.outlets:
                stack.callback(part.register_forward_hook(give).remove)
            for part in self.inlets:
                stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(leave).remove)
            yield flow


def _gets_only(tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(args) == 1 and args[0] is tensor and not kwargs
