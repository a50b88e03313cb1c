"""The largest eigenvalue as a penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fisher_reg.arguments import LIKELIHOOD, REDUCTION
from fisher_reg.evaluation import InputStd, check_input_std
from fisher_reg.geometry import GEOMETRY, L2, Geometry, LInf
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.operator import InputFisher, double_backward, vjp_only
from fisher_reg.penalty.point import PointPenalty, TrainingPoint, squared_length
from fisher_reg.printing import short_repr
from fisher_reg.solvers import Lanczos, SignIteration

# Any, not Tensor: jsonargparse treats a callable that returns a class as a factory and would pass on its name
Reduction = Callable[[Tensor], Any]
"""From ``(B,)`` to a scalar."""


@dataclass(frozen=True)
class SpectralPenalty(PointPenalty):
    r"""Mean largest eigenvalue of the Fisher matrix, with its gradient.

    By the envelope theorem the gradient of :math:`\lambda_\max = \max_{|u|=1} \|A^\top u\|^2` needs only the maximiser
    :math:`u`: it is computed without gradient and treated as a constant, and one quadratic form is differentiated. The
    gradient is exact up to the error of the solver. For a repeated eigenvalue it is one of the subgradients; it is zero
    where :math:`F = 0`.

    With ``num_steps=0`` there is no solver. The penalty is then the closed form
    :math:`p_1 p_2 \|\nabla_x (z_1 - z_2)\|^2` of the two most probable classes, with its full gradient: a lower bound
    of :math:`\lambda_\max`, equal to it for two classes, at the cost of one double backward pass.

    All values tend to zero where the softmax saturates, also for large input gradients of the logits; those of
    :class:`LabelContrastPenalty` do not.

    Args:
        num_steps: Number of steps of :class:`Lanczos`, each one backward and one double-backward pass without parameter
            gradient; 0 for the closed form. With :class:`LInf` it is the number of starts of :class:`SignIteration` and
            the largest number of its vertices: at most ``2 n + 1`` backward and ``n`` double-backward passes, and for
            ``K <= n`` classes at most ``K`` and 1.
        reduction: From the values ``(B,)`` to a scalar. :func:`torch.mean` by default; with :func:`mean_log1p` a few
            very sensitive examples do not dominate.
        likelihood: The output distribution. With :class:`Gaussian` the penalty is the squared spectral norm of the
            Jacobian of the logits.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        geometry: The norm in which perturbations have length 1. With :class:`LInf` the value is that of
            :func:`fisher_reg.fisher_linf_norm`, :math:`\max_{|u|=1} \|A^\top u\|_1^2`, with the gradient at the local
            maximum that is found. The closed form is :math:`p_1 p_2 \|\nabla_x (z_1 - z_2)\|_1^2`, a lower bound of it.
            A user-defined geometry has only the closed form.

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
    input_std: InputStd | None = None
    geometry: Geometry = L2()

    __repr__ = short_repr

    differentiates_twice: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_input_std(self.input_std)
        LIKELIHOOD.check(self.likelihood, self)
        REDUCTION.check(self.reduction, self)
        GEOMETRY.check(self.geometry, self)
        if self.num_steps < 0:
            raise ValueError(f"SpectralPenalty needs num_steps >= 0; got {self.num_steps}.")
        if self.num_steps > 0 and not isinstance(self.geometry, L2 | LInf):
            raise ValueError(
                f"SpectralPenalty solves with geometry=L2() or LInf(); got num_steps={self.num_steps} with "
                f"geometry={self.geometry}. Use num_steps=0, the closed form of the two most probable classes."
            )

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty at a point; ``generator`` draws the random part of the start vector."""
        fisher = point.fisher(self.likelihood, self.input_std, double_backward if self.num_steps else vjp_only)
        if self.num_steps == 0:
            direction, weight = self.likelihood.contrast(fisher.logits)
            eigenvalues = weight * squared_length(fisher, direction, self.geometry)
        else:
            top = self._maximiser(fisher, generator)
            eigenvalues = squared_length(fisher, self.likelihood.unwhiten(fisher.logits, top), self.geometry)
        reduced: Tensor = self.reduction(eigenvalues)
        return reduced

    def _maximiser(self, fisher: InputFisher, generator: torch.Generator | None) -> Tensor:
        """Return the unit vector ``(B, K)`` that maximises the dual norm of ``Aᵀ u``, without gradient."""
        if isinstance(self.geometry, LInf):
            solver = SignIteration(num_steps=self.num_steps - 1, num_starts=self.num_steps, rtol=0.0)
            return solver.maximize(fisher, generator).left_singular_vector
        return Lanczos(self.num_steps, rtol=0.0).solve(fisher, generator).left_singular_vector


def mean_log1p(values: Tensor) -> Tensor:
    """Average ``log(1 + value)``: a reduction for :class:`SpectralPenalty`."""
    return values.log1p().mean()
