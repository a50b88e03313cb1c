"""The function that is being trained, evaluated at a batch, and penalties at such a point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fisher_reg.evaluation import (
    InputStd,
    LogitsFunction,
    SideInputs,
    WithSideInputs,
    called,
    check_inputs,
    differentiable,
    trained,
    twice_differentiable,
)
from fisher_reg.geometry import EUCLIDEAN, Geometry
from fisher_reg.likelihood import Likelihood
from fisher_reg.operator import InputFisher, Linearization, vjp_only


class Penalty(Protocol):
    """A scalar to add to a loss."""

    def __call__(self, model: LogitsFunction, inputs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the penalty of ``inputs`` ``(B, *S)``, differentiable with respect to the parameters of ``model``."""


@dataclass(frozen=True)
class TrainingPoint:
    """A per-example function at a batch of inputs.

    Attributes:
        function: From ``(B, *S)`` to logits ``(B, K)``, with the batch statistics and the dropout masks of this point.
        inputs: ``(B, *S)``, which require a gradient.
        logits: ``(B, K)``, of ``inputs``, with a graph to them and to the parameters.
        leaf: The same numbers as a leaf tensor, if the caller propagates the gradient at the leaf through the graph of
            ``logits`` later. A penalty that differentiates only with respect to the logits may use the leaf instead
            of ``logits``, which saves a backward pass; both give the same gradient.
        is_used_once: Whether the graph of ``logits`` serves only the derivative with respect to the inputs, and the
            term in the loss uses ``leaf``, so that the memory can be freed with the first use.
    """

    function: LogitsFunction
    inputs: Tensor
    logits: Tensor
    leaf: Tensor | None = None
    is_used_once: bool = False

    @property
    def outputs(self) -> Tensor:
        """The logits to use in the loss: the leaf if there is one."""
        return self.logits if self.leaf is None else self.leaf

    def fisher(
        self, likelihood: Likelihood, input_std: InputStd | None, linearize: Linearization = vjp_only
    ) -> InputFisher:
        """Return the Fisher operator at this point."""
        return InputFisher(self.function, self.inputs, likelihood, input_std, linearize, logits=self.logits)


class PointPenalty(ABC):
    """A penalty that needs the function only near the inputs at which the training step evaluates it.

    Attributes:
        differentiates_twice: Whether it needs second derivatives of the graph from the inputs to the logits. Such a
            graph must be per-example (no batch norm in training mode) and without fused attention.
        needs_labels: Whether it also depends on the labels.
    """

    differentiates_twice: ClassVar[bool]
    needs_labels: ClassVar[bool] = False

    @property
    def default_weight(self) -> float:
        """The default weight in :class:`fisher_reg.FisherRegularizer`."""
        return 0.1

    def tolerates(self, inputs: Tensor, dtype: torch.dtype) -> bool:
        """Whether the rounding errors of a half precision are small enough for this penalty.

        False for a penalty with derivatives of the logits, which needs full precision.

        Args:
            inputs: ``(B, *S)``.
            dtype: Precision of the network.

        Returns:
            Whether the penalty may be computed in that precision.
        """
        return False

    def __call__(
        self,
        model: LogitsFunction,
        inputs: Tensor,
        *,
        labels: Tensor | None = None,
        side_inputs: SideInputs = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the penalty, a scalar, from a forward of its own (two with training batch norm).

        Args:
            model: Maps ``(B, *S)`` to logits ``(B, K)``. Evaluated in its current mode; see :func:`training_point`.
            inputs: ``(B, *S)``, floating point; not modified, and receives no gradient.
            labels: Class indices ``(B,)``, for a penalty that needs labels.
            side_inputs: More arguments of the model, as in :func:`fisher_reg.fisher_spectral_norm`.
            generator: Generator of the random numbers; by default torch's global one.

        Returns:
            Scalar in nats per squared input unit, unless the class says otherwise.

        Raises:
            ValueError: As in :func:`fisher_reg.fisher_spectral_norm`, and for missing or invalid labels.
        """
        with training_point(model, inputs, self.differentiates_twice, side_inputs) as point:
            return self.at(point, labels=labels, generator=generator)

    @abstractmethod
    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty at a point; its logits may be those of the training step."""


@contextmanager
def training_point(
    model: LogitsFunction, inputs: Tensor, differentiates_twice: bool = True, side_inputs: SideInputs = None
) -> Generator[TrainingPoint, None, None]:
    """Open the function that is being trained.

    A module is evaluated in its current modes and not modified. In training mode this is the function that is being
    trained: batch norm uses the statistics of ``inputs``, constant with respect to the inputs and differentiable with
    respect to the parameters (see :mod:`fisher_reg.evaluation.batch_norm`), and its running statistics do not change.

    Raises:
        ValueError: As in :func:`fisher_reg.fisher_spectral_norm`.
    """
    check_inputs(inputs)
    with differentiable(inputs) as safe_inputs, kernels(differentiates_twice):
        function = WithSideInputs(trained(model, safe_inputs), side_inputs, len(safe_inputs))
        safe_inputs.requires_grad_()
        yield TrainingPoint(function, safe_inputs, called(function, safe_inputs))


@contextmanager
def kernels(differentiates_twice: bool) -> Generator[None, None, None]:
    """Restrict a forward to kernels with second derivatives, if these are needed."""
    if not differentiates_twice:
        yield
        return
    with twice_differentiable():
        yield


def squared_length(fisher: InputFisher, cotangent: Tensor, geometry: Geometry = EUCLIDEAN) -> Tensor:
    r"""Return :math:`\|D J^\top w\|_*^2` in the dual norm, per example, with its gradient.

    Args:
        fisher: The operator at a point, ``point.fisher(likelihood, input_std)``.
        cotangent: :math:`w`, ``(B, K)``.
        geometry: Provides the dual norm; by default the Euclidean one.

    Returns:
        ``(B,)``. Cost: one backward pass, whose graph is kept.
    """
    return geometry.dual_norm(fisher.pullback(cotangent)).square()
