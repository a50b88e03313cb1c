"""From a module to a function of its inputs that is per-example and differentiable, with everything put back after.

All that depends on how a network is run stands here: modes of batch norm and dropout, kernels, precision, grad mode.
The rooms above see only a function from ``(B, *S)`` to ``(B, K)``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

LogitsFunction = Callable[[Tensor], Tensor]

_HALF = (torch.float16, torch.bfloat16)


class LogitsOf(nn.Module):
    """A module whose forward returns the logits of another one that returns something else.

    Args:
        module: The network; its parameters, modes and batch norms stay visible to the Fisher pass.
        logits_fn: ``logits_fn(module, inputs)`` returns logits ``(B, K)``.

    Example:
        >>> wrapped = LogitsOf(nn.Linear(2, 3), lambda module, inputs: {"logits": module(inputs)}["logits"])
        >>> wrapped(torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(self, module: nn.Module, logits_fn: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.logits_fn = logits_fn
        self.training = module.training

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits ``(B, K)`` of ``inputs`` ``(B, *S)``."""
        return self.logits_fn(self.module, inputs)


def check_inputs(inputs: Tensor) -> None:
    """Refuse anything but a non-empty floating-point batch.

    Raises:
        ValueError: With what was given and what to do.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        given = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(
            f"inputs must be a floating-point tensor, since they are differentiated; got {given}. "
            "Convert images with inputs.float() / 255; for token ids pass the embeddings."
        )
    if inputs.ndim < 2 or inputs.numel() == 0:
        raise ValueError(f"inputs must be a non-empty batch (B, *S); got shape {tuple(inputs.shape)}.")


def check_input_std(input_std: Tensor) -> None:
    """Refuse a standard deviation that cannot have been divided by.

    Raises:
        ValueError: With the smallest value.
    """
    if not bool((input_std > 0).all()):
        raise ValueError(f"input_std must be positive; its smallest value is {float(input_std.min())}.")


@contextmanager
def differentiable(inputs: Tensor) -> Generator[Tensor, None, None]:
    """Open a pass that can be differentiated twice, whatever surrounds it, and yield the inputs to use in it.

    Autograd is on even under ``no_grad`` and ``inference_mode``; autocast is off and half precision is promoted to
    float32, because derivatives of rounded values are noise; compiled modules run eagerly, since compiled code has no
    double backward.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(inputs.device.type, enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        yield inputs.detach().clone().to(torch.float32 if inputs.dtype in _HALF else inputs.dtype)


def twice_differentiable() -> AbstractContextManager[None]:
    """Open a forward whose attention has second derivatives and a forward mode, which the fused kernels lack."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def evaluation_behaviour(model: LogitsFunction) -> Generator[None, None, None]:
    """Put every submodule into evaluation mode; give each its own flag back afterwards, also after an exception.

    Raises:
        ValueError: If a batch norm keeps no running statistics: it would couple the examples of the batch.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    for module in modules:
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{module} keeps no running statistics, so in evaluation each prediction depends on the whole batch "
                "and no per-example Fisher matrix exists. Use track_running_stats=True."
            )
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


@contextmanager
def affine_batch_norm(model: LogitsFunction) -> Generator[None, None, None]:
    """Apply each batch norm as the scale and shift that it is in evaluation: one pass over the activations, not three.

    A subclass or a module with a forward of its own stays as it is. The parameters get no gradient from it.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    plain = [module for module in modules if isinstance(module, _BatchNorm) and _is_plain(module)]
    try:
        for module in plain:
            module.forward = partial(_running_batch_norm, module)  # type: ignore[method-assign]
        yield
    finally:
        for module in plain:
            vars(module).pop("forward", None)


def batch_norm_affine(module: _BatchNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and shift ``(C,)`` that ``module`` is with the statistics ``(C,)``."""
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight
    return scale, -mean * scale if module.bias is None else module.bias - mean * scale


def apply_affine(hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift the channels of ``(B, C, ...)``."""
    shape = (1, -1) + (1,) * (hidden.ndim - 2)
    return torch.addcmul(shift.view(shape), hidden, scale.view(shape))


def _is_plain(module: _BatchNorm) -> bool:
    return type(module).forward is _BatchNorm.forward and "forward" not in vars(module)


def _running_batch_norm(module: _BatchNorm, hidden: Tensor) -> Tensor:
    assert module.running_mean is not None
    assert module.running_var is not None
    with torch.no_grad():  # a scale that needs a gradient would keep its argument in memory
        scale, shift = batch_norm_affine(module, module.running_mean, module.running_var)
    return apply_affine(hidden, scale, shift)


def as_function(model: LogitsFunction) -> LogitsFunction:
    """Return ``model`` as a function that neither changes its argument in place nor computes in half precision."""
    if not isinstance(model, nn.Module):
        return lambda inputs: model(inputs.clone())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    promoted = {name: tensor.float() for name, tensor in tensors.items() if tensor.dtype in _HALF}
    if not promoted:
        return lambda inputs: model(inputs.clone())
    return lambda inputs: functional_call(model, promoted, (inputs.clone(),))


class RandomState:
    """The state of torch's global random numbers on a device, to be gone back to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_cpu = torch.get_rng_state()
        self.of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Generator[None, None, None]:
        """Draw from this state during the block, which leaves no trace in the global one."""
        with torch.random.fork_rng([self.device] if self.of_device is not None else []):
            torch.set_rng_state(self.of_cpu)
            if self.of_device is not None:
                torch.cuda.set_rng_state(self.of_device, self.device)
            yield


def with_noise_of(state: RandomState, function: LogitsFunction) -> LogitsFunction:
    """Return ``function`` with the same dropout masks in every call: those that it would draw in ``state``."""

    def call(inputs: Tensor) -> Tensor:
        with state.restored():
            return function(inputs)

    return call


def in_fast_layout(function: LogitsFunction, model: LogitsFunction) -> LogitsFunction:
    """Return ``function`` with images ``(B, C, H, W)`` laid out as convolutions on a CPU like them, channels last.

    The layout is no part of a tensor's value, but a module that calls ``view`` on its activations may refuse it; that
    one gets its inputs as they were.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if not any(isinstance(module, nn.Conv2d) for module in modules):
        return function
    refused = False

    def call(inputs: Tensor) -> Tensor:
        nonlocal refused
        if refused or inputs.ndim != 4 or inputs.device.type != "cpu":
            return function(inputs)
        try:
            return function(inputs.contiguous(memory_format=torch.channels_last))
        except RuntimeError as error:
            refused = "view size is not compatible" in str(error)
            if not refused:
                raise
            return function(inputs)

    return call
