r"""Batch norm as a per-example function, by rules for its calls.

In evaluation batch norm is a fixed scale and shift of each channel. In training it computes
:math:`(h - \mu(H)) / \sigma(H)` with the statistics of the whole batch of activations :math:`H`: the trained function
couples the examples, and no per-example Fisher matrix exists. If :math:`\mu, \sigma` are constant *with respect to the
inputs*, the examples are independent. They stay differentiable *with respect to the parameters*, so that the gradient
of a penalty is that of the trained function: it cannot lower the penalty by shrinking a weight that the normalisation
rescales anyway.

So the calls of a forward are recorded (those of the training step, or of a forward without input gradient) and then
replayed. With fixed statistics a perturbed input can leave the range of batch norm: in training each of :math:`n`
values is at most :math:`\sqrt{n - 1}\,\sigma` from their mean for every input, but the fixed map has no limit. In one
case, the last stage of a DenseNet with 4 small images (four values per channel), 70 layers moved a perturbed input
:math:`10^4\,\sigma` away and increased the gradient of a penalty to :math:`10^7` (also in float64, and with constant
statistics). So a replay over few values is limited to :math:`\sqrt n\,\sigma`; this changes nothing at the input
itself.

Calls are recognised by their weight or running mean: in a module of torch, a subclass of it, or a module that calls the
function itself. Running statistics are not updated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from fisher_reg.evaluation.rules import Rule, itself

IdentityOf = Callable[[Tensor], int]
_Key = tuple[int, int]

# sqrt(32) deviations: almost no value exceeds that, and for a larger layer the comparison would cost time
_FEW_VALUES = 32


class Statistics(NamedTuple):
    """The statistics of one call of batch norm in training mode.

    Attributes:
        mean: ``(C,)``, at least float32.
        variance: ``(C,)``, biased.
        num_values: Number of values per channel.
    """

    mean: Tensor
    variance: Tensor
    num_values: int


class UnrecordedError(ValueError):
    """A batch norm normalises with batch statistics that have not been recorded."""


@dataclass
class Recording:
    """The statistics that each batch norm used in training mode, in the order of its calls.

    They stay attached to the autograd graph.
    """

    calls: dict[_Key, list[Statistics]] = field(default_factory=dict)

    @property
    def is_clear(self) -> bool:
        """Whether each batch norm was called once, so that its statistics are those of a single forward."""
        return all(len(found) == 1 for found in self.calls.values())

    def add(self, call: _Call, identity_of: IdentityOf) -> Statistics:
        """Record the statistics of a call."""
        hidden = call.hidden.to(torch.promote_types(call.hidden.dtype, torch.float32))
        with torch.autograd.graph.saved_tensors_hooks(itself, itself):  # not again in the backward pass of a checkpoint
            mean, variance = _Moments.apply(hidden)
        statistics = Statistics(mean, variance, hidden.numel() // len(mean))
        self.calls.setdefault(call.key(identity_of), []).append(statistics)
        return statistics

    def of(self, weight: Tensor | None, running_mean: Tensor | None, identity_of: IdentityOf) -> Statistics | None:
        """Return the statistics of the batch norm with these tensors; None if it was not called.

        Raises:
            ValueError: If it was called several times.
        """
        found = self.calls.get(_key(weight, running_mean, identity_of), [])
        if len(found) > 1:
            raise ValueError(f"A batch norm was called {len(found)} times and has no one scale.")
        return found[0] if found else None


@dataclass(frozen=True)
class _Call:
    """One call of batch norm with its arguments."""

    hidden: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def key(self, identity_of: IdentityOf) -> _Key:
        return _key(self.weight, self.running_mean, identity_of)

    def with_statistics(self, mean: Tensor, variance: Tensor, num_values: int) -> Tensor:
        # The fused kernel has no gradient for the statistics. It gets their values as constants, and a weight and a
        # bias through which their derivatives pass.
        scale, shift = scale_and_shift(mean, variance, self.weight, self.bias, self.eps)
        fixed_mean, fixed_variance = mean.detach(), variance.detach()
        deviation = (fixed_variance + self.eps).sqrt()
        weight, bias = scale * deviation, shift + scale * fixed_mean
        hidden = self.within_range(mean, variance, num_values) if num_values < _FEW_VALUES else self.hidden
        return batch_norm(hidden, fixed_mean, fixed_variance, weight, bias, training=False, eps=self.eps)

    def within_range(self, mean: Tensor, variance: Tensor, num_values: int) -> Tensor:
        # sqrt(num_values - 1) is the limit; the slack keeps rounding from cutting off a derivative at the input itself
        radius = (num_values * (variance + self.eps)).sqrt()
        shape = (1, -1) + (1,) * (self.hidden.ndim - 2)
        lowest, highest = (mean - radius).view(shape), (mean + radius).view(shape)
        return torch.clamp(self.hidden, lowest.to(self.hidden.dtype), highest.to(self.hidden.dtype))

    def as_affine(self, known: dict[tuple[int, ...], _Affine]) -> Tensor:
        # One pass over the activations, not three. A scale that needs a gradient would keep its argument in memory.
        given = tuple(x for x in (self.running_mean, self.running_var, self.weight, self.bias) if x is not None)
        key = tuple(map(id, given))
        if key not in known or not known[key].holds_for(given, self.eps):
            known[key] = _Affine.of(self, given)
        shape = (1, -1) + (1,) * (self.hidden.ndim - 2)
        return torch.addcmul(known[key].shift.view(shape), self.hidden, known[key].scale.view(shape))


class _Affine(NamedTuple):
    """The scale and shift ``(C,)`` of a batch norm, kept while the tensors that they were computed of are unchanged."""

    scale: Tensor
    shift: Tensor
    given: tuple[Tensor, ...]  # kept alive, so that their ids are not reused
    versions: tuple[int, ...]
    eps: float

    @classmethod
    def of(cls, call: _Call, given: tuple[Tensor, ...]) -> _Affine:
        assert call.running_mean is not None
        assert call.running_var is not None
        with torch.no_grad():
            scale, shift = scale_and_shift(call.running_mean, call.running_var, call.weight, call.bias, call.eps)
        return cls(scale, shift, given, _versions(given), call.eps)

    def holds_for(self, given: tuple[Tensor, ...], eps: float) -> bool:
        return self.eps == eps and len(self.versions) > 0 and self.versions == _versions(given)


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Return the version counters of tensors; an empty tuple if one has no counter, as in inference mode."""
    return () if any(tensor.is_inference() for tensor in tensors) else tuple(tensor._version for tensor in tensors)


def scale_and_shift(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the scale and shift ``(C,)`` of batch norm with the statistics ``(C,)``."""
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


def running_rules() -> dict[Any, Rule]:
    """Rules for the deployed function: batch norm is the scale and shift of its running statistics.

    They cache both for each batch norm, for the calls of one function.

    Returns:
        The rules.
    """
    known: dict[tuple[int, ...], _Affine] = {}

    def answer(call: _Call, proceed: Callable[[], Tensor]) -> Tensor:
        if call.training or call.running_mean is None or call.running_var is None:
            raise ValueError(
                f"A batch norm over {call.hidden.shape[1]} channels keeps no running statistics, or is in training "
                "mode, so that each prediction depends on the whole batch and no per-example Fisher matrix exists. Use "
                "track_running_stats=True and evaluation mode."
            )
        return call.as_affine(known)

    return _rules(answer)


def recording_rules(recording: Recording, identity_of: IdentityOf, moves_running_statistics: bool) -> dict[Any, Rule]:
    """Rules that record the statistics of every batch norm in training mode.

    Args:
        recording: Gets the statistics.
        identity_of: Maps a tensor to an identity that is the same in a replay.
        moves_running_statistics: Whether the calls update the running statistics, as they do without the rules.

    Returns:
        The rules.
    """

    def answer(call: _Call, proceed: Callable[[], Tensor]) -> Tensor:
        if not call.training:
            return proceed()
        if moves_running_statistics:
            if torch.is_grad_enabled():  # other forwards are not part of the loss
                recording.add(call, identity_of)
            return proceed()
        return call.with_statistics(*recording.add(call, identity_of))

    return _rules(answer)


def replaying_rules(recording: Recording | None, identity_of: IdentityOf) -> dict[Any, Rule]:
    """Rules that replace each batch norm in training mode by one with its recorded statistics, call by call.

    Args:
        recording: The statistics; None if none have been recorded yet. Then an exception requests them.
        identity_of: As in the recording.

    Returns:
        The rules, for one forward.
    """
    counts: dict[_Key, int] = {}

    def answer(call: _Call, proceed: Callable[[], Tensor]) -> Tensor:
        if not call.training:
            return proceed()
        key = call.key(identity_of)
        if recording is None or key not in recording.calls:
            raise UnrecordedError(
                f"A batch norm over {call.hidden.shape[1]} channels normalises with the statistics of the batch, of "
                "which none were recorded: it keeps no running statistics. Use track_running_stats=True."
            )
        found = recording.calls[key]
        counts[key] = counts.get(key, 0) + 1
        return call.with_statistics(*found[(counts[key] - 1) % len(found)])

    return _rules(answer)


def _rules(answer: Callable[[_Call, Callable[[], Tensor]], Tensor]) -> dict[Any, Rule]:
    def of_functional(*args: Any, **kwargs: Any) -> Tensor:
        renamed = {"hidden" if name == "input" else name: value for name, value in kwargs.items()}
        return answer(_Call(*args, **renamed), lambda: batch_norm(*args, **kwargs))

    def of_builtin(hidden: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Tensor:
        call = _Call(hidden, mean, var, weight, bias, training, *rest[:2])
        return answer(call, lambda: torch.batch_norm(hidden, weight, bias, mean, var, training, *rest))

    exported = torch.ops.aten.batch_norm.default
    return {batch_norm: of_functional, torch.batch_norm: of_builtin, exported: of_builtin}


def _key(weight: Tensor | None, running_mean: Tensor | None, identity_of: IdentityOf) -> _Key:
    """The tensor that identifies a batch norm: its running mean, else its weight, else None."""
    for kind, tensor in enumerate((running_mean, weight)):
        if tensor is not None:
            return kind, identity_of(tensor)
    return 2, 0


class _Moments(torch.autograd.Function):
    r"""Mean and biased variance over all axes but the second, with one pass in each direction.

    The gradient is :math:`(\bar\mu + 2 (h - \mu)\,\bar v) / N`, an affine function of each channel.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
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
        return batch_norm(hidden, mean, torch.zeros_like(mean), slope, shift, training=False, eps=1)
