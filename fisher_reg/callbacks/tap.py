"""Observe the forward of a training step to reuse it: the modules that get the inputs and those that return the logits.

The step is observed by torch's global module hooks and by rules for torch functions, both limited to this thread and
removed after the step. The user's module gets no hook.
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
    """The observed inputs and logits of one training step.

    Attributes:
        source: The inputs of the batch.
        logits_fn: The function that returns the logits.
        differentiates_twice: Whether the step ran on kernels with second derivatives.
        inputs: The copy that the module got instead of ``source``, which requires a gradient.
        state: Snapshot of the random state at that time.
        autocast_dtype: The precision of autocast at that time; None without autocast.
        num_forwards: Number of calls with these inputs.
        outputs: The logits that were returned, each tensor once.
        unusable: Why the observed forward cannot be used for the penalty; None if it can.
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
        """Return the tensor to pass to a module instead of the source."""
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
            return "the training step changed weights or modes of the module after its forward"
        return self.unusable


class Tap:
    """The modules that get the inputs, and those that return the logits of these inputs.

    Both are found by one forward of a copy, and both must belong to one call: a module that gets only the inputs, and a
    module inside that call (or the same one) that returned the logits of the model.
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
            The tap; without inlets if no module gets the inputs alone.
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
            # only outputs of the shape of logits are kept in memory
            if part in original_of and kwargs and original_of[part] in inlets:
                inlets.remove(original_of[part])
            if part in original_of and isinstance(output, Tensor) and output.ndim == 2:
                given.append((original_of[part], output, output._version))

        with torch.no_grad(), _watching(before, after):
            logits = called(EvaluatedModel(source, Noise(inputs.device), is_deployed=False), inputs.detach())
        if not isinstance(logits, Tensor) or [tensor._version for tensor in probe] != versions:
            return cls([], [])  # the step may use the inputs after its forward has changed them in place
        outlets = [
            part
            for part, output, version in given
            if output._version == version and output.shape == logits.shape and torch.equal(output.to(logits), logits)
        ]
        return cls(list(dict.fromkeys(inlets)), list(dict.fromkeys(outlets)))

    @contextmanager
    def open(self, flow: Flow) -> Generator[None, None, None]:
        """Observe the source of ``flow`` during the block; the inlets get a copy of it that requires a gradient."""
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
    """Record the batch statistics of a training step, and run its layers on kernels that ``flow`` can use."""
    if _is_compiled(module):
        return nullcontext()  # rules would be compiled into it
    rules = recording_rules(recording, id, moves_running_statistics=True)
    if flow is not None and flow.differentiates_twice:
        for function, by_math in second_derivative_rules().items():

            def by_rule(*args: Any, function: Any = function, by_math: Any = by_math, **kwargs: Any) -> Any:
                # activation checkpointing would recompute with the other kernel in the backward pass
                return (function if is_checkpointed() else by_math)(*args, **kwargs)

            rules[function] = by_rule
    return _OfAStep(rules, flow)


class _OfAStep(Rules):
    """Rules for the user's training step that detect activation checkpointing.

    A backward pass for the penalty would run the checkpointed parts of the forward once more.
    """

    def __init__(self, rules: dict[Any, Any], flow: Flow | None) -> None:
        super().__init__(rules)
        self.flow = flow

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.flow is not None and self.flow.unusable is None and is_checkpointed():
            self.flow.unusable = "the training step recomputes a part of its forward in the backward pass"
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
        # torch does not remove this entry with the handle
        stack.callback(torch.nn.modules.module._global_forward_hooks_with_kwargs.pop, handle.id, None)
        stack.callback(handle.remove)
        yield


Fingerprint = tuple[tuple[int, int] | bool, ...]


def _fingerprint(module: nn.Module) -> Fingerprint:
    """Return a value that changes with the weights and modes, without reading the weights."""
    weights = tuple((id(parameter), parameter._version) for parameter in module.parameters())
    return (*weights, *(getattr(part, "training", False) for part in module.modules()))


def standing_obstacle(module: pl.LightningModule) -> str | None:
    """Why no forward of this module can be reused in any step; None if it can."""
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters()):
        return "the module computes in half precision, whose rounding errors would exceed the penalty"
    return "the training step is compiled" if _is_compiled(module) else None


def _is_compiled(module: nn.Module) -> bool:
    parts = list(module.modules())
    compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts)
    return compiled or getattr(module, "_compiler_ctx", None) is not None
