r"""The gradient of a penalty, computed separately, checked, limited, and added to that of the loss.

A backward pass of loss and penalty together gives only the sum of their gradients. The gradient of the penalty is
therefore computed first, and a scalar with the value of the penalty and this gradient is added to the loss. The tensors
of the training step that the penalty uses (logits, batch statistics) are passed to it as leaves. The gradients at these
leaves are propagated through the forward of the step in the backward pass of the loss. Nothing is differentiated twice,
except the forward of a step that is reused for a penalty with second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from fisher_reg.evaluation import Recording, Statistics, is_sharded

Gradients = Sequence[Tensor | None]

_WARN_ABOVE = 10.0


class Cut:
    """The place where the graph of a penalty is separated from that of the training step.

    Args:
        parameters: The parameters that are trained.
        obstacle: Why the gradient of the penalty cannot be computed separately; None if it can. With an obstacle
            nothing is cut.
    """

    def __init__(
        self, parameters: Sequence[Tensor] = (), obstacle: str | None = "the gradient is not requested"
    ) -> None:
        self.parameters = parameters
        self.obstacle = obstacle
        self.originals: list[Tensor] = []
        self.leaves: list[Tensor] = []

    @classmethod
    def of(cls, trainer: pl.Trainer, module: nn.Module) -> Cut:
        """Return the cut for the parameters that a trainer trains."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        found = [*module.parameters(), *(parameter for group in groups for parameter in group["params"])]
        parameters = list({id(parameter): parameter for parameter in found if parameter.requires_grad}.values())
        if is_sharded(module):
            return cls(parameters, "its weights are divided among processes")
        if any(parameter._backward_hooks for parameter in parameters):
            return cls(parameters, "a hook changes the gradient of a weight, and would do so twice")
        return cls(parameters, None)

    @property
    def nothing(self) -> Gradients:
        """The result for a penalty that is skipped: no gradient at any parameter."""
        return [None] * len(self.parameters)

    def leaf(self, tensor: Tensor) -> Tensor:
        """Return the leaf that the penalty uses instead of a tensor of the step."""
        if self.obstacle is not None or not tensor.requires_grad:
            return tensor
        self.originals.append(tensor)
        self.leaves.append(tensor.detach().requires_grad_())
        return self.leaves[-1]

    def recording(self, recording: Recording) -> Recording:
        """Return a recording whose batch statistics are leaves."""
        return Recording(
            {
                key: [Statistics(self.leaf(one.mean), self.leaf(one.variance), one.num_values) for one in found]
                for key, found in recording.calls.items()
            }
        )


@dataclass(frozen=True)
class SeparateGradient:
    """The gradient of a scalar at the parameters and at the originals of a cut.

    Attributes:
        value: The scalar, without a graph.
        tensors: The tensors at which it has a gradient.
        gradients: Their gradients, of the same shapes.
    """

    value: Tensor
    tensors: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    @classmethod
    def take(cls, scalar: Tensor, cut: Cut, scale: float = 1.0) -> SeparateGradient:
        """Differentiate down to a cut: one backward pass, which does not change ``.grad``.

        Args:
            scalar: The scalar to differentiate.
            cut: Where the gradient stops.
            scale: Factor of the scalar during the pass, since small gradients underflow in half precision.

        Returns:
            The gradient, divided by the scale. If the scaled gradient overflows, that of a second pass without scale.
        """
        if not scalar.requires_grad:
            return cls(scalar, (), ())
        targets = [*cut.parameters, *cut.originals]
        # the graph is kept, since the penalty may use more tensors of the step than those that were cut
        at = [*cut.parameters, *cut.leaves]
        found = torch.autograd.grad(scale * scalar, at, retain_graph=True, allow_unused=True)
        pairs = [(target, _divided(one, scale)) for target, one in zip(targets, found, strict=True) if one is not None]
        taken = cls(scalar.detach(), tuple(target for target, _ in pairs), tuple(one for _, one in pairs))
        return taken if scale == 1 or taken.is_finite else cls.take(scalar, cut)

    @property
    def is_finite(self) -> bool:
        """Whether all gradients are finite."""
        return math.isfinite(norm(self.gradients).item())

    def at_parameters(self, cut: Cut, scale: float) -> Gradients:
        """Return the whole gradient: one backward pass through the forward of the step, if that was cut.

        Args:
            cut: The cut of :meth:`take`.
            scale: Factor during the pass, since small gradients underflow in half precision.

        Returns:
            One gradient for each parameter; None for a parameter without one.
        """
        own = {id(tensor): one for tensor, one in zip(self.tensors, self.gradients, strict=True)}
        inside = [tensor for tensor in cut.originals if id(tensor) in own]
        through = cut.nothing
        if inside:
            scaled = [scale * own[id(tensor)] for tensor in inside]
            through = torch.autograd.grad(inside, cut.parameters, scaled, retain_graph=True, allow_unused=True)
        direct = [own.get(id(parameter)) for parameter in cut.parameters]
        return [one if other is None else _sum(other / scale, one) for one, other in zip(direct, through, strict=True)]

    def attached(self, factor: Tensor | None = None) -> Tensor:
        """Return the value with this gradient, times a factor if one is given."""
        gradients = self.gradients if factor is None else tuple(factor.to(one.device) * one for one in self.gradients)
        attached: Tensor = _Attached.apply(self.value, len(gradients), *gradients, *self.tensors)
        return attached


class _Attached(torch.autograd.Function):
    """A value with a given gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *gradients_and_tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_tensors[:count])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        scaled = [cotangent.to(one.device) * one for one in gradients]
        return (None, None, *(None for _ in gradients), *scaled)


@dataclass(frozen=True)
class Guarded:
    """A penalty whose gradient has been checked.

    Attributes:
        penalty: The term to add to the loss; None if its gradient is not finite.
        ratio: Norm of its gradient, before limiting, divided by that of the loss; None if it was not measured.
    """

    penalty: Tensor | None
    ratio: Tensor | None = None


@dataclass
class GradientGuard:
    """Checks, measures and limits the gradient of a penalty.

    Args:
        max_ratio: Largest norm of the gradient of the added term, divided by that of the loss; None for no limit.
        measure_every: Number of penalised steps between two measurements of the ratio; None for no measurement.

    Attributes:
        is_measuring: Whether the ratio is measured at this penalised step.
        num_penalised: Number of penalised steps so far.
    """

    max_ratio: float | None = None
    measure_every: int | None = 50
    is_measuring: bool = field(default=False, init=False)
    num_penalised: int = field(default=0, init=False)
    _warned: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if self.max_ratio is not None and not 0 < self.max_ratio < math.inf:
            raise ValueError(f"FisherRegularizer needs a finite max_gradient_ratio > 0; got {self.max_ratio}.")
        if self.measure_every is not None and self.measure_every < 1:
            raise ValueError(f"FisherRegularizer needs gradient_ratio_every >= 1 or None; got {self.measure_every}.")

    def reset(self) -> None:
        """Reset the count of penalised steps."""
        self.num_penalised = 0
        self._warned.clear()

    def count(self) -> None:
        """Count a penalised step, also a skipped one, so that all processes measure at the same step."""
        is_due = self.measure_every is not None and self.num_penalised % self.measure_every == 0
        self.is_measuring = is_due or self.max_ratio is not None
        self.num_penalised += 1

    def taken(self, trainer: pl.Trainer, penalty: Tensor | None, cut: Cut) -> SeparateGradient | Tensor | None:
        """Return the gradient of a penalty, without a reference to its graph.

        Args:
            trainer: Provides the loss scale for float16.
            penalty: A finite scalar; None if this process skips it.
            cut: The cut between penalty and training step.

        Returns:
            The gradient, or the penalty itself if its gradient cannot be computed separately.
        """
        if penalty is None or cut.obstacle is not None:
            return penalty
        return SeparateGradient.take(penalty, cut, _scale_of(trainer))

    def applied(
        self,
        module: pl.LightningModule,
        loss: Tensor,
        taken: SeparateGradient | Tensor | None,
        cut: Cut,
        coefficient: float,
    ) -> Guarded:
        """Return the term to add to the loss, with its gradient checked and limited.

        Args:
            module: The module that is trained.
            loss: The loss of the user's step.
            taken: The result of :meth:`taken`.
            cut: The cut between penalty and training step.
            coefficient: Factor of the penalty in the loss.

        Returns:
            The penalty, or None in place of one whose gradient is not finite.
        """
        if cut.obstacle is not None:
            if self.max_ratio is not None:
                self.warn_once(
                    "obstacle", f"max_gradient_ratio has no effect on {type(module).__name__}: {cut.obstacle}."
                )
            assert not isinstance(taken, SeparateGradient)
            return Guarded(taken)
        gradient = taken if isinstance(taken, SeparateGradient) and taken.is_finite else None
        # the mean of the gradients is a collective operation of all processes
        is_alone = module.trainer.world_size == 1
        measures = self.is_measuring and (gradient is not None or not is_alone)
        ratio = self.ratio(module, loss, gradient, cut, coefficient) if measures else None
        if ratio is not None:
            self.report(ratio.item())
        return Guarded(None if gradient is None else self.limited(gradient, ratio), ratio)

    def ratio(
        self, module: pl.LightningModule, loss: Tensor, gradient: SeparateGradient | None, cut: Cut, coefficient: float
    ) -> Tensor | None:
        """Return the gradient norm of ``coefficient * penalty`` divided by that of the loss, for means over processes.

        Costs two backward passes through the step. None if the ratio is NaN or the step allows no earlier pass.
        """
        scale = _scale_of(module.trainer)
        of_loss, of_penalty = cut.nothing, cut.nothing
        try:
            with _unmoved_buffers(module):
                scaled = scale * loss.to(torch.promote_types(loss.dtype, torch.float32))
                of_loss = torch.autograd.grad(scaled, cut.parameters, retain_graph=True, allow_unused=True)
                of_penalty = cut.nothing if gradient is None else gradient.at_parameters(cut, scale)
        except RuntimeError as error:
            self.warn_once("obstacle", f"The gradients of loss and penalty cannot be compared: {error}")
        norms = [_norm_of_mean(module.trainer, gradients, cut.parameters) for gradients in (of_penalty, of_loss)]
        ratio = coefficient * norms[0] / (norms[1] / scale)
        return None if math.isnan(ratio.item()) else ratio

    def limited(self, gradient: SeparateGradient, ratio: Tensor | None) -> Tensor:
        """Return the penalty with its gradient, scaled down if the ratio is above the limit."""
        if ratio is None or self.max_ratio is None or ratio <= self.max_ratio:
            return gradient.attached()
        return gradient.attached(self.max_ratio / ratio)

    def report(self, ratio: float) -> None:
        """Warn once if the gradient is much larger than that of the loss."""
        if ratio > _WARN_ABOVE:
            self.warn_once(
                "ratio", _DWARFED.format(ratio=ratio) + (_LIMITED if self.max_ratio is not None else _REMEDIES)
            )

    def warn_once(self, what: str, message: str) -> None:
        """Warn once per fit."""
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(message)


def _scale_of(trainer: pl.Trainer) -> float:
    """Return the loss scale of float16; 1 if there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _divided(gradient: Tensor, scale: float) -> Tensor:
    return gradient if scale == 1 else gradient / scale


def _sum(gradient: Tensor, other: Tensor | None) -> Tensor:
    """Return the sum; the sparse tensor must be the second operand of torch's addition."""
    if other is None:
        return gradient
    return other + gradient if gradient.is_sparse else gradient + other


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together, a scalar in at least float32."""
    if not gradients:
        return torch.zeros(())
    values = [one.coalesce().values() if one.is_sparse else one for one in gradients]
    norms = [torch.linalg.vector_norm(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in values]
    total: Tensor = torch.linalg.vector_norm(torch.stack([one.to(norms[0]) for one in norms]))
    return total


def _norm_of_mean(trainer: pl.Trainer, gradients: Gradients, parameters: Sequence[Tensor]) -> Tensor:
    """Return the norm of the gradients averaged over the processes, as the optimiser will use them."""
    if trainer.world_size == 1:
        return norm([one for one in gradients if one is not None])
    filled = [torch.zeros_like(at) if one is None else one for one, at in zip(gradients, parameters, strict=True)]
    flat = torch.cat([(one.to_dense() if one.is_sparse else one).flatten().float() for one in filled])
    mean = trainer.strategy.reduce(flat, reduce_op="mean")
    assert isinstance(mean, Tensor)
    return norm([mean])


@contextmanager
def _unmoved_buffers(module: nn.Module) -> Generator[None, None, None]:
    """Restore buffers that a backward pass changes: activation checkpointing runs batch norm again."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in before:
                if not torch.equal(buffer, kept):  # writing unchanged values would invalidate tensors saved by autograd
                    buffer.copy_(kept)


_DWARFED = (
    "The gradient of the penalty, with its weight, is {ratio:.3g} times that of the loss (logged as "
    "fisher/penalty_gradient_ratio)"
)
_LIMITED = ", and is scaled down to max_gradient_ratio times it."
_REMEDIES = (
    ", so that the penalty dominates the training, which may diverge. Lower the weight, increase it with warmup_steps, "
    "or limit the gradient with FisherRegularizer(max_gradient_ratio=1.0). Where batch norm has few values per channel "
    "(small batches of small images): larger batches, use_running_statistics=True, or GroupNorm."
)
