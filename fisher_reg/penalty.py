"""Differentiable penalties: the gradient of the sensitivity with respect to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fisher_reg.batch_statistics import frozen
from fisher_reg.bounds import Tightening, log_fisher_bound
from fisher_reg.forward import LogitsFunction, as_function, check_inputs, differentiable, twice_differentiable
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.operator import InputFisher, Linearization, double_backward, vjp_only
from fisher_reg.sampling import signs
from fisher_reg.solvers import Lanczos

Reduction = Callable[[Tensor], Tensor]


class Penalty(Protocol):
    """A scalar to add to a loss."""

    def __call__(self, model: LogitsFunction, inputs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the penalty of ``inputs`` ``(B, *S)``, differentiable with respect to the parameters of ``model``."""


@dataclass(frozen=True)
class SpectralPenalty:
    r"""Mean largest eigenvalue of the Fisher matrix, with its gradient.

    By the envelope theorem the gradient of :math:`\lambda_\max = \max_{|u|=1} \|A^\top u\|^2` needs only the maximiser:
    it is found without gradient, held fixed, and one quadratic form is differentiated. The gradient is exact as far as
    the solver has converged; where the top eigenvalue is repeated it is one of the subgradients, and it is zero where
    :math:`F = 0`.

    With ``num_steps=0`` nothing is solved. The penalty is then the closed form
    :math:`p_1 p_2 \|\nabla_x (z_1 - z_2)\|^2` of the two most probable classes, with its full gradient: a lower bound
    of :math:`\lambda_\max`, equal to it for two classes, at the cost of one double backward pass.

    The module is taken as it is found. In training mode the penalty therefore sees the function that is being trained:
    batch norm uses the statistics of ``inputs``, constant with respect to the inputs and differentiable with respect to
    the parameters (see :mod:`fisher_reg.batch_statistics`), and its running statistics do not move.

    Args:
        num_steps: Steps of :class:`Lanczos`, each one backward and one double-backward pass without parameter gradient;
            0 for the closed form.
        reduction: From the values ``(B,)`` to a scalar. :func:`torch.mean` by default; :func:`mean_log1p` keeps a few
            very sensitive examples from dominating.
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> penalty = SpectralPenalty()(model, torch.zeros(1, 2))  # p (1 - p) |w0 - w1|^2 = 4 / 4
        >>> round(penalty.item(), 6)
        1.0
        >>> torch.autograd.grad(penalty, model.weight)[0]
        tensor([[ 1.,  0.],
                [-1.,  0.]])
    """

    num_steps: int = 0
    reduction: Reduction = torch.mean
    likelihood: Likelihood = Categorical()
    input_std: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise ValueError(f"SpectralPenalty needs num_steps >= 0; got {self.num_steps}.")

    def __call__(self, model: LogitsFunction, inputs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the penalty, a scalar.

        Args:
            model: Maps ``(B, *S)`` to logits ``(B, K)``.
            inputs: ``(B, *S)``, floating point; not modified, and receives no gradient.
            generator: Source of the random part of the start vector.

        Returns:
            Scalar in nats per squared input unit (for ``reduction=torch.mean``).
        """
        linearize = double_backward if self.num_steps else vjp_only
        with training_operator(model, inputs, self.likelihood, self.input_std, linearize) as fisher:
            if self.num_steps == 0:
                direction, weight = self.likelihood.contrast(fisher.logits)
                return self.reduction(weight * _squared_length(fisher, direction))
            top = Lanczos(self.num_steps, rtol=0.0).solve(fisher, generator).left_singular_vector
            return self.reduction(_squared_length(fisher, self.likelihood.unwhiten(fisher.logits, top)))


@dataclass(frozen=True)
class TracePenalty:
    r"""Mean trace of the Fisher matrix by random signs: all directions at once, not only the worst.

    The mean of :math:`\|A^\top \epsilon\|^2` over :math:`\epsilon \in \{-1, 1\}^K` is the trace whatever the
    parameters are, so value and gradient are both unbiased (see :class:`fisher_reg.Hutchinson`). Cost: ``num_samples``
    double backward passes. The module is taken as it is found, as in :class:`SpectralPenalty`.

    Args:
        num_samples: Sign vectors per example.
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
    """

    num_samples: int = 1
    likelihood: Likelihood = Categorical()
    input_std: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"TracePenalty needs num_samples >= 1; got {self.num_samples}.")

    def __call__(self, model: LogitsFunction, inputs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the penalty, a scalar in nats per squared input unit.

        Args:
            model: Maps ``(B, *S)`` to logits ``(B, K)``.
            inputs: ``(B, *S)``, floating point; not modified, and receives no gradient.
            generator: Source of the signs; by default torch's global one.

        Returns:
            The mean over examples and samples.
        """
        with training_operator(model, inputs, self.likelihood, self.input_std, vjp_only) as fisher:
            lengths = [
                _squared_length(fisher, self.likelihood.unwhiten(fisher.logits, signs(fisher.logits, generator)))
                for _ in range(self.num_samples)
            ]
            return torch.stack(lengths).mean()


@dataclass(frozen=True)
class BoundPenalty:
    r"""Logarithm of the certified upper bound :func:`fisher_reg.fisher_bound`, with its gradient.

    It needs no second derivative of the network and no input but for its shape, and pushes down what the weights allow
    at any input, where :class:`SpectralPenalty` pushes down what the data meets. The value is the certified one; its
    gradient is that of the singular value at the maximising frequency of each layer, a subgradient where several are
    equal. In training mode batch norm is scaled by the statistics of the batch, which stay differentiable, so that a
    weight that is rescaled anyway brings nothing by shrinking.

    Args:
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        tightening: Which certified improvements are used; coordinates are not balanced.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> penalty = BoundPenalty()(model, torch.zeros(1, 2))  # log(|w0 - w1|^2 / 4)
        >>> round(penalty.item(), 6)
        0.0
        >>> torch.autograd.grad(penalty, model.weight)[0]
        tensor([[ 1.,  0.],
                [-1.,  0.]])
    """

    likelihood: Likelihood = Categorical()
    input_std: Tensor | None = None
    tightening: Tightening = Tightening()

    def __call__(self, model: LogitsFunction, inputs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the penalty, a scalar in double precision.

        Args:
            model: The network, an ``nn.Module``.
            inputs: ``(B, *S)``: their shape, and in training mode the statistics that they give batch norm.
            generator: Not used: nothing is random.

        Returns:
            Natural logarithm of nats per squared input unit.

        Raises:
            ValueError: For a model that is no module.
        """
        check_inputs(inputs)
        if not isinstance(model, nn.Module):
            raise ValueError(f"BoundPenalty needs the weights of an nn.Module; got {type(model).__name__}.")
        with differentiable(inputs) as safe_inputs, frozen(model, as_function(model), safe_inputs):
            return log_fisher_bound(model, safe_inputs, self.likelihood, self.input_std, self.tightening)


def mean_log1p(values: Tensor) -> Tensor:
    """Average ``log(1 + value)``: a reduction for :class:`SpectralPenalty`."""
    return values.log1p().mean()


@contextmanager
def training_operator(
    model: LogitsFunction,
    inputs: Tensor,
    likelihood: Likelihood,
    input_std: Tensor | None,
    linearize: Linearization,
) -> Generator[InputFisher, None, None]:
    """Build the operator of the function that is being trained, from one forward (two with training batch norm).

    Raises:
        ValueError: As in :func:`fisher_reg.fisher_spectral_norm`.
    """
    check_inputs(inputs)
    with differentiable(inputs) as safe_inputs, twice_differentiable():
        function = as_function(model)
        with frozen(model, function, safe_inputs):
            yield InputFisher(function, safe_inputs, likelihood, input_std, linearize)


def _squared_length(fisher: InputFisher, cotangent: Tensor) -> Tensor:
    return fisher.pullback(cotangent).square().sum(1)
