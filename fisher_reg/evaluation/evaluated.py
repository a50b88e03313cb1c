"""The function of a model as a value: the deployed one, or the one that is being trained.

The modules above this one use only a function from ``(B, *S)`` to ``(B, K)``. It is per-example and differentiable,
gives the same logits in each call, and only reads the user's model (:mod:`fisher_reg.evaluation.copying` lists what is
shared).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisher_reg.arguments import MODEL
from fisher_reg.evaluation.batch_norm import (
    Recording,
    UnrecordedError,
    recording_rules,
    replaying_rules,
    running_rules,
)
from fisher_reg.evaluation.copying import is_sharded
from fisher_reg.evaluation.inputs import LogitsFunction
from fisher_reg.evaluation.noise import GlobalState, Noise
from fisher_reg.evaluation.packed_attention import packed_attention_rules
from fisher_reg.evaluation.precision import FullPrecision
from fisher_reg.evaluation.recurrent import recurrent_rules
from fisher_reg.evaluation.rules import Rule, Rules
from fisher_reg.evaluation.shared_copy import SharedCopy
from fisher_reg.evaluation.switching import Switched


class Source(Protocol):
    """A model that runs in place of the user's model.

    Attributes:
        model: The model that is called.
        is_promoted: Whether its weights are in full precision.
    """

    model: Any
    is_promoted: bool

    @property
    def draws(self) -> bool:
        """Whether a call has drawn from a random generator that the model holds."""

    def identity_of(self, tensor: Tensor) -> int:
        """Return the identity of a tensor of the user's model, given the tensor or its copy."""

    def opened(self) -> AbstractContextManager[None]:
        """Open a context in which the model is ready for one call."""

    def with_other_noise(self) -> AbstractContextManager[None]:
        """Open a context in which the generators that the model holds give other numbers."""


class EvaluatedModel(nn.Module):
    """One function of a model: called with inputs ``(B, *S)`` it gives logits ``(B, K)`` of the same precision.

    Every call draws the same random numbers, works on a copy of the inputs, and has no side effects.

    Args:
        source: The model that runs.
        noise: The states of the global random generators.
        is_deployed: Whether batch norm uses its running statistics; otherwise those of a recording.
        recording: Batch statistics, for a function that is being trained; by default those of the inputs of the first
            call, at the cost of one more forward if there is any batch norm in training mode.
        half_precision: The precision in which it computes under autocast, as the training step does; None for full
            precision.
        with_gradient: Returns another source, whose weights require gradients. It is needed for a forward that
            differentiates with respect to its own weights.

    Attributes:
        saw_half_precision: Whether a call computed in half precision.
    """

    def __init__(
        self,
        source: Source,
        noise: Noise,
        is_deployed: bool,
        recording: Recording | None = None,
        half_precision: torch.dtype | None = None,
        with_gradient: Callable[[], Source] | None = None,
    ) -> None:
        super().__init__()
        self.training = False
        self._run_on(source)
        self.recording = recording
        self.half_precision = half_precision
        self.saw_half_precision = False
        self._noise = noise
        self._is_deployed = is_deployed
        self._deployed_rules = running_rules() | packed_attention_rules() if is_deployed else {}
        self._with_gradient = with_gradient

    def _run_on(self, source: Source) -> None:
        self.source = source
        vars(self)["model"] = source.model
        if isinstance(source.model, nn.Module) and not isinstance(source.model, torch.jit.ScriptModule):
            for name in ("_modules", "_parameters", "_buffers"):  # with the names that they have in the model
                vars(self)[name] = vars(source.model)[name]

    @property
    def draws(self) -> bool:
        """Whether a call has drawn random numbers."""
        return self._noise.has_drawn or self.source.draws

    @contextmanager
    def with_other_noise(self) -> Generator[None, None, None]:
        """Draw other random numbers during the block."""
        noise, self._noise = self._noise, Noise(self._noise.state.device, GlobalState.other(self._noise.state.device))
        try:
            with self.source.with_other_noise():
                yield
        finally:
            self._noise = noise

    def forward(self, inputs: Tensor, *side_inputs: Any, **named_side_inputs: Any) -> Tensor:
        """Return the logits ``(B, K)``."""
        if self._is_deployed:
            return self._deploy(inputs, side_inputs, named_side_inputs)
        if self.recording is None and not has_training_batch_norm(self.model):
            try:
                return self._replay(inputs, side_inputs, named_side_inputs)
            except UnrecordedError:  # it calls the function of batch norm, without a module
                pass
        if self.recording is None:
            self.recording = self.record(inputs, *side_inputs, **named_side_inputs)
        return self._replay(inputs, side_inputs, named_side_inputs)

    def record(self, inputs: Tensor, *side_inputs: Any, **named_side_inputs: Any) -> Recording:
        """Return the statistics that batch norms in training mode have at ``inputs``: one forward."""
        recording = Recording()
        rules = recording_rules(recording, self.source.identity_of, moves_running_statistics=False)
        self._run(rules, True, inputs.detach(), side_inputs, named_side_inputs)
        return recording

    def _deploy(self, inputs: Tensor, side_inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        try:
            return self._run(self._deployed_rules, True, inputs, side_inputs, named)
        except RuntimeError as error:
            if self._with_gradient is None or _NO_GRADIENT not in str(error):
                raise
        self._run_on(self._with_gradient())
        self._with_gradient = None
        return self._run(self._deployed_rules, True, inputs, side_inputs, named)

    def _replay(self, inputs: Tensor, side_inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        rules = replaying_rules(self.recording, self.source.identity_of)
        return self._run(rules, self.recording is not None, inputs, side_inputs, named)

    def _run(
        self, rules: dict[Any, Rule], needs_graph: bool, inputs: Tensor, side: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        device = inputs.device.type
        rules = rules | recurrent_rules()
        precision: Rules
        if self.half_precision is None:
            precision = FullPrecision(rules, needs_graph, device_type=device, undoes_casts=self.source.is_promoted)
        else:
            precision = Rules(rules, needs_graph)
        autocast = torch.autocast(device, self.half_precision, enabled=self.half_precision is not None)
        with self._noise.replayed(), self.source.opened(), autocast, precision:
            logits: Tensor = self.model(inputs.clone(), *side, **named)
        if isinstance(precision, FullPrecision) and precision.saw_half and not self.saw_half_precision:
            self.saw_half_precision = True
            warnings.warn(_HALF_INSIDE, stacklevel=2)
        is_real = isinstance(logits, Tensor) and logits.is_floating_point()
        return logits.to(inputs.dtype) if is_real else logits

    def __getattr__(self, name: str) -> Any:
        """Look up in the copy the attributes of the model that a user's own penalty reads."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in vars(self):
                raise
            return getattr(vars(self)["model"], name)


_NO_GRADIENT = "does not require grad"
"""Part of torch's messages for a derivative of a tensor without a graph."""

_HALF_INSIDE = (
    "The model computes in half precision inside, and derivatives of rounded values are noise. Pass the nn.Module "
    "itself instead of a function around it, so that it can be promoted to float32, or convert it with model.float()."
)


def deployed(model: LogitsFunction, inputs: Tensor) -> EvaluatedModel:
    """Return the deployed function of a model: running statistics of batch norm, no dropout.

    Every estimate uses this function. Use it also for other measurements that are compared with an estimate, such as an
    attack. The model is only read, and stays in its mode.

    A callable that is not a module is used as it is. The weights get no gradient, so the graph saves nothing for them;
    see :func:`deployed_with_gradient`.

    Args:
        model: Maps ``(B, *S)`` to logits ``(B, K)``.
        inputs: ``(B, *S)``; only their device is used.

    Returns:
        A module that maps ``(B, *S)`` to logits ``(B, K)``, differentiable in its inputs, the same in each call.
        Further arguments are passed on to ``model``. The structure of the model is copied here, without a forward.
        Parameters are shared, so later steps of an optimiser change this function, too.

    Raises:
        ValueError: For lazy layers whose weights do not exist yet.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
        >>> inputs = torch.ones(4, 2)
        >>> torch.equal(deployed(network, inputs)(inputs), network[0](inputs)), network.training
        (True, True)
    """
    source = source_of(model, is_deployed=True, has_constant_weights=True)
    with_gradient = partial(source_of, model, is_deployed=True)
    return EvaluatedModel(source, Noise(inputs.device), is_deployed=True, with_gradient=with_gradient)


def deployed_with_gradient(model: LogitsFunction, inputs: Tensor) -> EvaluatedModel:
    """Return :func:`deployed`, with gradients to the weights."""
    return EvaluatedModel(source_of(model, is_deployed=True), Noise(inputs.device), False, Recording())


def trained(model: LogitsFunction, inputs: Tensor) -> EvaluatedModel:
    """Return the function that is being trained: the modes of the model, constant batch statistics, constant noise.

    Args:
        model: The model, in its present mode.
        inputs: The inputs; only their device is used.

    Returns:
        The function; ``model`` itself where it is one already.
    """
    if isinstance(model, EvaluatedModel):
        return model
    refuse_unseen_batch_norm(model)
    return EvaluatedModel(source_of(model, is_deployed=False), Noise(inputs.device), is_deployed=False)


def deployed_module(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a module in evaluation mode that shares its parameters, for a bound.

    Args:
        model: The module.
        dtype: Precision of the copy's weights, through whose conversion gradients pass; None keeps theirs.

    Returns:
        The copy.

    Raises:
        ValueError: For weights that are divided among processes.
    """
    if is_sharded(model):
        raise ValueError(
            f"{type(model).__name__} has weights that FSDP divides among processes, and a bound needs them whole. "
            "Bound a model that has loaded its state_dict."
        )
    module: nn.Module = SharedCopy(_underlying(model), is_deployed=True, dtype=dtype).model
    return module


def trained_module(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return a copy of a module in evaluation mode, whose batch norms in training have the statistics of ``inputs``.

    They are differentiable with respect to the parameters. Cost: one forward, none without such a batch norm.

    Raises:
        ValueError: For a batch norm that is called several times.
    """
    function = trained(model, inputs)
    copied = SharedCopy(function.model, is_deployed=True)
    in_training = [
        (original, part) for original, part in copied.modules if isinstance(original, _BatchNorm) and original.training
    ]
    if in_training:
        recording = function.recording or function.record(inputs)
        for original, part in in_training:
            found = recording.of(original.weight, original.running_mean, function.source.identity_of)
            if found is not None:
                part._buffers["running_mean"], part._buffers["running_var"] = found.mean, found.variance
    module: nn.Module = copied.model
    return module


def refuse_random(function: EvaluatedModel, logits: Tensor, call: Callable[[], Tensor]) -> None:
    """Check that the logits of a deployed function do not depend on random numbers. One forward if it draws any.

    Args:
        function: The function.
        logits: Its logits.
        call: Calls it again.

    Raises:
        ValueError: With the remedy.
    """
    if not function.draws:
        return
    with torch.no_grad(), function.with_other_noise():
        again = call()
    if not torch.allclose(again, logits.detach(), rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            "The forward of the model is random, also in evaluation mode, so that there is no one prediction to "
            "measure. Draw random numbers only if self.training; to measure one network of an ensemble fix its noise."
        )


def has_training_batch_norm(model: object) -> bool:
    """Whether a module of torch in the model would normalise with the statistics of the batch."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(part, _BatchNorm) and part.training for part in modules)


def refuse_unseen_batch_norm(model: object) -> None:
    """Check that the statistics of each batch norm in training mode can be held fixed.

    Raises:
        ValueError: With the remedy.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    in_training = [part for part in modules if getattr(part, "training", False)]
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed and any(isinstance(part, nn.SyncBatchNorm) for part in in_training):
        raise ValueError(
            "The penalty cannot differentiate SyncBatchNorm in training mode. Use BatchNorm (each process its own "
            "statistics: Trainer(sync_batchnorm=False)) or a normalisation without batch statistics, such as GroupNorm."
        )
    for part in in_training:
        name = str(getattr(part, "original_name", ""))
        if isinstance(part, torch.jit.ScriptModule) and name.startswith("BatchNorm"):
            raise ValueError(
                f"The penalty cannot hold the batch statistics of {name} fixed inside a TorchScript module. Script the "
                "model after training, or put it in evaluation mode with model.eval()."
            )


def source_of(model: LogitsFunction, is_deployed: bool, has_constant_weights: bool = False) -> Source:
    """Return a copy of a model that shares the parameters, or the model itself if it cannot be copied.

    Args:
        model: The model.
        is_deployed: Whether it is run in evaluation mode.
        has_constant_weights: Whether the parameters of a copy require no gradient.

    Returns:
        The source.
    """
    MODEL.check(model)
    model = _underlying(model)
    if is_sharded(model):
        assert isinstance(model, nn.Module)
        return Switched(model, is_deployed)
    return SharedCopy(model, is_deployed, has_constant_weights=has_constant_weights)


def _underlying(model: Any) -> Any:
    return model.model if isinstance(model, EvaluatedModel) else model
