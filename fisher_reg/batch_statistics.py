r"""Batch norm in training: the function that is being trained, made per-example.

In training mode batch norm computes :math:`(h - \mu(H)) / \sigma(H)` with the statistics of the whole batch of
activations :math:`H`. The trained function therefore couples the examples, and no per-example Fisher matrix exists.
Holding :math:`\mu, \sigma` fixed *with respect to the inputs* uncouples them; keeping them differentiable *with
respect to the parameters* keeps the gradient of a penalty true to the trained function: it cannot lower the penalty
by shrinking a weight that the normalisation rescales anyway.

So a pass is first recorded (a forward on the same batch: the training step's own, or one without input gradient) and
then replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from fisher_reg.forward import LogitsFunction, batch_norm_affine

Statistics = tuple[Tensor, Tensor]
Recording = dict[_BatchNorm, list[Statistics]]


def training_batch_norms(model: object) -> list[_BatchNorm]:
    """Return the batch norms of ``model`` that would normalise with batch statistics now."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, _BatchNorm) and module.training]
    if found:
        refuse_synchronised(model)
    return found


def refuse_synchronised(model: object) -> None:
    """Refuse batch norm that is synchronised across processes, whose statistics no single process knows.

    Raises:
        ValueError: With the remedy.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in modules)
    if synchronised and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError(
            "The penalty cannot differentiate SyncBatchNorm in training mode. Use BatchNorm (each process its own "
            "statistics: Trainer(sync_batchnorm=False)) or a normalisation without batch statistics, such as GroupNorm."
        )


@contextmanager
def record(model: object) -> Generator[Recording, None, None]:
    """Collect the statistics that every training batch norm uses during the block, in the order of its calls.

    Means and variances (biased, float32 at least) have shape ``(C,)`` and stay attached to the autograd graph.
    """
    recording: Recording = {}
    with ExitStack() as stack:
        for module in training_batch_norms(model):
            handle = module.register_forward_pre_hook(partial(_observe, recording), with_kwargs=True)
            stack.callback(handle.remove)
        yield recording


@contextmanager
def replay(recording: Recording) -> Generator[None, None, None]:
    """Let every recorded batch norm normalise with its recorded statistics instead of computing new ones.

    Running statistics are not moved. A batch norm called more often than recorded starts over with its first ones.
    """
    replaced = {module: vars(module).get("forward") for module in recording}
    try:
        for module, statistics in recording.items():
            module.training = False
            module.forward = _Replayed(module, statistics)  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in replaced.items():
            module.training = True
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]


@contextmanager
def untracked(model: object) -> Generator[None, None, None]:
    """Let no running statistics and no counter of a normalisation in training move during the block."""
    batch_norms = training_batch_norms(model)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    instance_norms = [module for module in modules if isinstance(module, _InstanceNorm) and module.training]
    tracked = [module.track_running_stats for module in batch_norms]
    momenta = [module.momentum for module in instance_norms]
    try:
        for batch_norm in batch_norms:
            batch_norm.track_running_stats = False
        for instance_norm in instance_norms:
            instance_norm.momentum = 0.0
        yield
    finally:
        for batch_norm, flag in zip(batch_norms, tracked, strict=True):
            batch_norm.track_running_stats = flag
        for instance_norm, momentum in zip(instance_norms, momenta, strict=True):
            instance_norm.momentum = momentum


@contextmanager
def frozen(model: object, function: LogitsFunction, inputs: Tensor) -> Generator[None, None, None]:
    """Make ``model`` per-example with the statistics of ``inputs``: one call of ``function``, none without batch norm.

    Running statistics and batch counters are not moved.
    """
    with untracked(model):
        with record(model) as recording:
            if training_batch_norms(model):
                function(inputs)
        with replay(recording):
            yield


@contextmanager
def of_step(
    model: object, recording: Recording, function: LogitsFunction, inputs: Tensor
) -> Generator[None, None, None]:
    """Replay the statistics of a training step that was recorded, where it is clear which they are.

    It is clear where every batch norm was called once with gradient. A step with several forwards, or with a forward
    that hooks do not see (compiled, checkpointed), says nothing of ``inputs`` for sure; then they are computed anew.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(replay(recording) if is_clear(model, recording) else frozen(model, function, inputs))
        yield


def is_clear(model: object, recording: Recording) -> bool:
    """Whether every training batch norm of ``model`` was recorded once."""
    return all(len(recording.get(module, ())) == 1 for module in training_batch_norms(model))


def _observe(recording: Recording, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.is_grad_enabled() or not isinstance(module, _BatchNorm):
        return
    hidden: Tensor = args[0] if args else kwargs["input"]
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    recording.setdefault(module, []).append(_Moments.apply(hidden))


class _Moments(torch.autograd.Function):
    r"""Mean and biased variance over all axes but the second, with one pass in each direction.

    The gradient is :math:`(\bar\mu + 2 (h - \mu)\,\bar v) / N`, an affine function of each channel.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Statistics:
        axes = [axis for axis in range(hidden.ndim) if axis != 1]
        mean = hidden.mean(axes, keepdim=True)
        variance = (hidden - mean).square_().mean(axes)  # torch.var_mean takes twenty times as long on a CPU
        mean = mean.flatten()
        ctx.save_for_backward(hidden, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, variance_gradient: Tensor) -> Tensor:
        hidden, mean = ctx.saved_tensors
        count = hidden.numel() // len(mean)
        slope, shift = 2 / count * variance_gradient, mean_gradient / count
        return torch.nn.functional.batch_norm(hidden, mean, torch.zeros_like(mean), slope, shift, training=False, eps=1)


class _Replayed:
    """The forward of a batch norm with recorded statistics, those of the next call each time.

    A subclass runs its own forward (an activation after the normalisation, perhaps), whose call of
    :func:`torch.nn.functional.batch_norm` is answered.
    """

    def __init__(self, module: _BatchNorm, statistics: list[Statistics]) -> None:
        self.module = module
        self.statistics = statistics
        self.calls = 0

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002, as in torch
        mean, variance = self.statistics[self.calls % len(self.statistics)]
        self.calls += 1
        if type(self.module).forward is _BatchNorm.forward:
            return _normalize(self.module, input, mean, variance)
        with _Answering(partial(_normalize, self.module, mean=mean, variance=variance)):
            answer: Tensor = type(self.module).forward(self.module, input)
            return answer


class _Answering(TorchFunctionMode):
    """Answers the calls of batch norm in a block."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.batch_norm:
            return self.answer(args[0] if args else (kwargs or {})["input"])
        return function(*args, **(kwargs or {}))


def _normalize(module: _BatchNorm, hidden: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    # The fused kernel has no gradient for the statistics. It gets their values, and a weight and a bias that take on
    # the derivatives of what it leaves constant.
    scale, shift = batch_norm_affine(module, mean, variance)
    fixed_mean, fixed_variance = mean.detach(), variance.detach()
    deviation = (fixed_variance + module.eps).sqrt()
    weight, bias = scale * deviation, shift + scale * fixed_mean
    return torch.nn.functional.batch_norm(
        hidden, fixed_mean, fixed_variance, weight, bias, training=False, eps=module.eps
    )


def replayed_variance(module: nn.Module) -> Tensor | None:
    """Return the variance ``(C,)`` that a batch norm normalises with in a replay; None outside of one.

    Raises:
        ValueError: If it has several.
    """
    forward = vars(module).get("forward")
    if not isinstance(forward, _Replayed):
        return None
    if len(forward.statistics) != 1:
        raise ValueError(f"{module} was called {len(forward.statistics)} times and has no one scale.")
    return forward.statistics[0][1]
