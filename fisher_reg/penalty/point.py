"""Where a penalty is taken: the function that is being trained, at a batch."""

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
        inputs: ``(B, *S)``, with a gradient of their own.
        logits: ``(B, K)``, of ``inputs``, with a graph to them and to the parameters.
        leaf: The same numbers as a leaf, where the caller takes the gradient there by itself and sends it through the
            graph of ``logits`` later. A penalty that differentiates no further than to the logits may use it for
            them; one that does not is as right, and costs a backward pass more.
        is_used_once: Whether the graph of ``logits`` has been made for the derivative in the inputs alone, and the term
            in the loss is that of ``leaf``, so that its memory can be freed with the first use.
    """

    function: LogitsFunction
    inputs: Tensor
    logits: Tensor
    leaf: Tensor | None = None
    is_used_once: bool = False

    @property
    def outputs(self) -> Tensor:
        """The logits for a term in the loss: the leaf if there is one."""
        return self.logits if self.leaf is None else self.leaf

    def fisher(
        self, likelihood: Likelihood, input_std: InputStd | None, linearize: Linearization = vjp_only
    ) -> InputFisher:
        """Return the operator here."""
        return InputFisher(self.function, self.inputs, likelihood, input_std, linearize, logits=self.logits)


class PointPenalty(ABC):
    """A penalty that needs a function only around the point where the training step has evaluated it anyway.

    Attributes:
        differentiates_twice: Whether it needs the second derivatives of the graph from the inputs to the logits. Such
            a graph must be per-example: not one through batch norm in training, nor through a fused attention.
        needs_labels: Whether it is a function of the labels too.
    """

    differentiates_twice: ClassVar[bool]
    needs_labels: ClassVar[bool] = False

    @property
    def default_weight(self) -> float:
        """The weight that :class:`fisher_reg.FisherRegularizer` takes if it is given none."""
        return 0.1

    def tolerates(self, inputs: Tensor, dtype: torch.dtype) -> bool:
        """Whether the round-off of a half precision is small beside what this penalty looks at.

        A penalty with derivatives of the logits at a point needs full precision, and says no.

        Args:
            inputs: ``(B, *S)``.
            dtype: In which the network computes.

        Returns:
            Whether it may be taken where the network computes in that precision.
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
            model: Maps ``(B, *S)`` to logits ``(B, K)``. Taken as it is found; see :func:`training_point`.
            inputs: ``(B, *S)``, floating point; not modified, and receives no gradient.
            labels: Class indices ``(B,)``, for a penalty of labels.
            side_inputs: More arguments of the model, as in :func:`fisher_reg.fisher_spectral_norm`.
            generator: Source of what is random; by default torch's global one.

        Returns:
            Scalar in nats per squared input unit, unless the class says otherwise.

        Raises:
            ValueError: As in :func:`fisher_reg.fisher_spectral_norm`, and for labels that are missing or do not fit.
        """
        with training_point(model, inputs, self.differentiates_twice, side_inputs) as point:
            return self.at(point, labels=labels, generator=generator)

    @abstractmethod
    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty at a point whose function has perhaps been evaluated already."""


@contextmanager
def training_point(
    model: LogitsFunction, inputs: Tensor, differentiates_twice: bool = True, side_inputs: SideInputs = None
) -> Generator[TrainingPoint, None, None]:
    """Open the function that is being trained.

    A module is taken in the modes in which it is found, and only read. In training mode the penalty therefore sees the
    function that is being trained: batch norm uses the statistics of ``inputs``, constant with respect to the inputs
    and differentiable with respect to the parameters (see :mod:`fisher_reg.evaluation.batch_norm`), and its running
    statistics do not move.

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
    """Keep a forward to the kernels with second derivatives, where these are asked for."""
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
        geometry: In whose dual norm; by default the Euclidean one.

    Returns:
        ``(B,)``. Cost: one backward pass, of which the graph is kept.
    """
    return geometry.dual_norm(fisher.pullback(cotangent)).square()
