"""Reuse the forward of a training step: where a module takes its inputs in, and where its logits come out.

The step is watched by torch's hooks for all modules and by rules for torch functions, both of this thread and for the
time of the step. Nothing is attached to the user's module.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fisher_reg.callbacks.batch import LogitsFn
from fisher_reg.evaluation import (
    EvaluatedModel,
    GlobalState,
    Noise,
    Recording,
    Rules,
    SharedCopy,
    Source,
    called,
    is_checkpointed,
    recording_rules,
    second_derivative_rules,
)


class Flow:
    """What was seen of one training step.

    Attributes:
        source: The inputs that were looked for.
        logits_fn: Whose logits were looked for.
        differentiates_twice: Whether the step ran on kernels with second derivatives.
        inputs: What the module got instead: equal, with a gradient of their own.
        state: The random numbers when it got them.
        autocast_dtype: The precision of autocast then; None without.
        num_forwards: How often it got them.
        outputs: The logits that came out, each tensor once.
        unusable: Why the forward that was seen is not that of the penalty; None if nothing was seen against it.
    """

    def __init__(self, source: Tensor, logits_fn: LogitsFn | None, differentiates_twice: bool) -> None:
        self.source = source
        self.logits_fn = logits_fn
        self.differentiates_twice = differentiates_twice
        self.inputs = source
        self.state: GlobalState | None = None
        self.autocast_dtype: torch.dtype | None = None
        self.num_forwards = 0
        self.outputs: list[Tensor] = []
        self.unusable: str | None = None
        self._versions: list[int] = []
        self._source_version = -1
        self._inlet: nn.Module | None = None
        self._fingerprint: Fingerprint = ()

    def enter(self, part: nn.Module) -> Tensor:
        """Return what a module shall get instead of the source."""
        self.num_forwards += 1
        self.inputs = self.source.detach().requires_grad_()
        self._source_version = self.source._version
        self.state = GlobalState.read(self.source.device)
        self._inlet, self._fingerprint = part, _fingerprint(part)
        device = self.source.device.type
        self.autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
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
        if self.source._version != self._source_version:
            return "the training step changed the inputs in place after its forward"
        assert self._inlet is not None
        if _fingerprint(self._inlet) != self._fingerprint:
            return "the training step ran forward with other weights or modes than it leaves behind"
        return self.unusable


class Tap:
    """The modules by which inputs go in, and those by which the logits of these inputs come out.

    Both are found by one forward of a copy, and only what belongs to one call is used: a module that gets the inputs
    and nothing else, and a module inside that call (perhaps itself) that gave the very logits of the whole.
    """

    def __init__(self, inlets: list[nn.Module], outlets: list[nn.Module]) -> None:
        self.inlets = inlets
        self.outlets = outlets

    @classmethod
    def find(cls, module: nn.Module, source: Source, inputs: Tensor) -> Tap:
        """Run a model once, in its own mode.

        Args:
            module: The module whose parts may be tapped.
            source: The model that gives logits; a copy of ``module`` itself or of a wrapper of it.
            inputs: ``(B, *S)``.

        Returns:
            The tap, without inlets where there is none.
        """
        own = set(module.modules())
        pairs = source.modules if isinstance(source, SharedCopy) else [(part, part) for part in own]
        original_of = {copied: original for original, copied in pairs if original in own}
        probe: list[Tensor] = []
        versions: list[int] = []
        inlets: list[nn.Module] = []
        given: list[tuple[nn.Module, Tensor, int]] = []

        def before(part: nn.Module, args: tuple[Any, ...]) -> None:
            if part is source.model:
                probe.append(args[0])
                versions.append(args[0]._version)
            if part in original_of and probe and len(args) == 1 and args[0] is probe[-1]:
                inlets.append(original_of[part])

        def after(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            if part in original_of and kwargs and original_of[part] in inlets:
                inlets.remove(original_of[part])
            if part in original_of and isinstance(output, Tensor) and output.ndim == 2:  # all others would be kept too
                given.append((original_of[part], output, output._version))

        with torch.no_grad(), _watching(before, after):
            logits = called(EvaluatedModel(source, Noise(inputs.device), is_deployed=False), inputs.detach())
        if not isinstance(logits, Tensor) or [tensor._version for tensor in probe] != versions:
            return cls([], [])  # a step may go on with inputs that its forward has changed in place
        outlets = [
            part
            for part, output, version in given
            if output._version == version and output.shape == logits.shape and torch.equal(output.to(logits), logits)
        ]
        return cls(list(dict.fromkeys(inlets)), list(dict.fromkeys(outlets)))

    @contextmanager
    def open(self, flow: Flow) -> Generator[None, None, None]:
        """Watch for the source of ``flow`` during the block; the inlets get a copy of it that has a gradient."""
        inlets, outlets = set(self.inlets), set(self.outlets)
        inside: list[nn.Module] = []

        def before(part: nn.Module, args: tuple[Any, ...]) -> Any:
            if part not in inlets or inside or flow.source.requires_grad or not torch.is_grad_enabled():
                return None
            if len(args) != 1 or args[0] is not flow.source:
                return None
            inside.append(part)
            return (flow.enter(part),)

        def after(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            if inside and part in outlets and isinstance(output, Tensor):
                flow.add(output)
            if inside and inside[0] is part:
                inside.pop()
                if kwargs:
                    flow.unusable = "the training step called forward with more arguments than the inputs"

        with _watching(before, after):
            yield


def recorded(module: nn.Module, recording: Recording, flow: Flow | None) -> AbstractContextManager[object]:
    """Note the batch statistics of a training step, and run its layers on kernels that ``flow`` can use."""
    if _is_compiled(module):
        return nullcontext()  # rules would be compiled into it
    rules = recording_rules(recording, id, moves_running_statistics=True)
    if flow is not None and flow.differentiates_twice:
        for function, by_math in second_derivative_rules().items():

            def by_rule(*args: Any, function: Any = function, by_math: Any = by_math, **kwargs: Any) -> Any:
                # what a checkpoint computes again in the backward pass would use the other kernel
                return (function if is_checkpointed() else by_math)(*args, **kwargs)

            rules[function] = by_rule
    return _OfAStep(rules, flow)


class _OfAStep(Rules):
    """Rules for a user's own training step, which notice activation checkpointing.

    A backward pass for the penalty would run the checkpointed parts of the user's forward once more.
    """

    def __init__(self, rules: dict[Any, Any], flow: Flow | None) -> None:
        super().__init__(rules)
        self.flow = flow

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.flow is not None and self.flow.unusable is None and is_checkpointed():
            self.flow.unusable = "the training step computes a part of its forward again in the backward pass"
        return super().__torch_function__(function, types, args, kwargs)


@contextmanager
def _watching(before: Any, after: Any) -> Generator[None, None, None]:
    """Call ``before(module, args)`` and ``after(module, args, kwargs, output)`` around forwards of this thread."""
    thread = threading.get_ident()

    def pre_hook(part: nn.Module, args: tuple[Any, ...]) -> Any:
        if torch.compiler.is_compiling() or threading.get_ident() != thread:
            return None
        return before(part, args)

    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if not torch.compiler.is_compiling() and threading.get_ident() == thread:
            after(part, args, kwargs, output)

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(pre_hook).remove)
        handle = register_module_forward_hook(hook, with_kwargs=True)
        # torch leaves this entry behind when the handle is removed
        stack.callback(torch.nn.modules.module._global_forward_hooks_with_kwargs.pop, handle.id, None)
        stack.callback(handle.remove)
        yield


Fingerprint = tuple[tuple[int, int] | bool, ...]


def _fingerprint(module: nn.Module) -> Fingerprint:
    """Tell weights and modes apart without reading a number."""
    weights = tuple((id(parameter), parameter._version) for parameter in module.parameters())
    return (*weights, *(getattr(part, "training", False) for part in module.modules()))


def standing_obstacle(module: pl.LightningModule) -> str | None:
    """Why no forward of this module can be reused now, whatever the step does; None if one can."""
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters()):
        return "the module computes in half precision, whose round-off would drown the penalty"
    return "the training step is compiled" if _is_compiled(module) else None


def _is_compiled(module: nn.Module) -> bool:
    parts = list(module.modules())
    compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)
    return compiled or getattr(module, "_compiler_ctx", None) is not None
