"""Reuse the forward of a training step: where a module takes its inputs in, and where its logits come out."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fisher_reg.batch_statistics import untracked
from fisher_reg.callbacks.batch import LogitsFn
from fisher_reg.forward import RandomState
from fisher_reg.penalty.point import kernels


class Flow:
    """What was seen of one training step.

    Attributes:
        source: The inputs that were looked for.
        logits_fn: Whose logits were looked for.
        differentiates_twice: Whether the step ran on kernels with second derivatives.
        inputs: What the module got instead: equal, with a gradient of their own.
        state: The random numbers when it got them.
        num_forwards: How often it got them.
        outputs: The logits that came out, each tensor once.
    """

    def __init__(self, source: Tensor, logits_fn: LogitsFn | None, differentiates_twice: bool) -> None:
        self.source = source
        self.logits_fn = logits_fn
        self.differentiates_twice = differentiates_twice
        self.inputs = source
        self.state: RandomState | None = None
        self.num_forwards = 0
        self.outputs: list[Tensor] = []
        self._versions: list[int] = []
        self._inlet: nn.Module | None = None
        self._fingerprint: Fingerprint = ()

    def enter(self, part: nn.Module) -> Tensor:
        """Return what a module shall get instead of the source."""
        self.num_forwards += 1
        self.inputs = self.source.detach().requires_grad_()
        self.state = RandomState(self.source.device)
        self._inlet, self._fingerprint = part, _fingerprint(part)
        return self.inputs.clone()  # a leaf may not be changed in place

    def add(self, output: Tensor) -> None:
        """Note logits."""
        if not any(output is known for known in self.outputs):
            self.outputs.append(output)
            self._versions.append(output._version)

    @property
    def obstacle(self) -> str | None:
        """Why the forward of this step cannot be reused; None if it can."""
        if self.source.requires_grad:
            return "the inputs carry a gradient of their own"
        if self.num_forwards == 0:
            return "the training step did not call forward, or a part of it, on the inputs of the batch themselves"
        if self.num_forwards > 1:
            return "the training step called forward on the inputs more than once"
        if len(self.outputs) != 1 or not self.outputs[0].requires_grad:
            return f"the forward of the training step gave {len(self.outputs)} logits with a gradient instead of one"
        if self.outputs[0]._version != self._versions[0]:
            return "the training step changed the logits in place"
        assert self._inlet is not None
        if _fingerprint(self._inlet) != self._fingerprint:
            return "the training step ran forward with other weights or modes than it leaves behind"
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
        given: list[tuple[nn.Module, Tensor, int]] = []

        def before(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _gets_only(probe, args, kwargs):
                inlets.append(part)

        def after(part: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if isinstance(output, Tensor):
                given.append((part, output, output._version))

        with ExitStack() as stack:
            for part in module.modules():
                if isinstance(part, torch.jit.ScriptModule):
                    continue  # has no hooks
                stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(after).remove)
            stack.enter_context(RandomState(inputs.device).restored())
            stack.enter_context(untracked(model))
            stack.enter_context(torch.no_grad())
            logits = model(probe)
        if not isinstance(logits, Tensor):
            return cls([], [])
        outlets = [
            part
            for part, output, version in given
            if output._version == version and output.shape == logits.shape and torch.equal(output, logits)
        ]
        return cls(list(dict.fromkeys(inlets)), list(dict.fromkeys(outlets)))

    @contextmanager
    def open(
        self, source: Tensor, logits_fn: LogitsFn | None = None, differentiates_twice: bool = False
    ) -> Generator[Flow, None, None]:
        """Watch for ``source`` during the block; the inlets get a copy of it that has a gradient."""
        flow = Flow(source, logits_fn, differentiates_twice)
        inside: list[nn.Module] = []

        def before(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if inside or source.requires_grad or not torch.is_grad_enabled() or not _gets_only(source, args, kwargs):
                return None
            inside.append(part)
            return (flow.enter(part),), kwargs

        def give(part: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if inside:
                flow.add(output)

        def leave(part: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if inside and inside[0] is part:
                inside.pop()

        with ExitStack() as stack:
            stack.enter_context(kernels(differentiates_twice))
            for part in self.outlets:
                stack.callback(part.register_forward_hook(give).remove)
            for part in self.inlets:
                stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(leave).remove)
            yield flow


Fingerprint = tuple[tuple[int, int] | bool, ...]


def _fingerprint(module: nn.Module) -> Fingerprint:
    """Tell weights and modes apart without reading a number."""
    weights = tuple((id(parameter), parameter._version) for parameter in module.parameters())
    return (*weights, *(part.training for part in module.modules()))


def _gets_only(tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(args) == 1 and args[0] is tensor and not kwargs


def standing_obstacle(module: pl.LightningModule) -> str | None:
    """Why no forward of this module can be reused now, whatever the step does; None if one can."""
    if torch.is_autocast_enabled(module.device.type):
        return "the training step is under autocast, whose round-off would drown the penalty"
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters()):
        return "the module computes in half precision, whose round-off would drown the penalty"
    parts = list(module.modules())
    compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)
    if compiled or getattr(module, "_compiler_ctx", None) is not None:
        return "the training step is compiled"
    return None
