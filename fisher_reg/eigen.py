r"""What a solver is given and what it returns: operators :math:`F = A^\top A`, and eigenpairs with their evidence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from fisher_reg.errors import NonFiniteJacobianError


class FactoredOperator(Protocol):
    """A batch of linear maps ``A``, each ``(K, d)``."""

    def starts(self, count: int) -> Tensor:
        """At most ``count`` start vectors ``(B, count, K)``, the most promising one first."""

    def labels(self, generator: torch.Generator | None) -> Tensor:
        """Random ``(B, K)`` with the identity as second moment, from labels drawn under the model."""

    def apply(self, tangent: Tensor, /, *, exact: bool = False, slope: Tensor | None = None) -> Tensor:
        """``A v``, ``(B, d)`` to ``(B, K)``; with a ``slope`` and not ``exact`` perhaps by a difference quotient."""

    def slope_along(self, cotangent: Tensor, row: Tensor, /) -> Tensor:
        """How fast the logits move along ``row = Aᵀ u``, ``(B,)``: what sets the step of a difference quotient."""

    def adjoint(self, cotangent: Tensor, /) -> Tensor:
        """``(B, K)`` to ``(B, d)``, to round-off."""

    def restrict(self, keep: Tensor, /) -> Self | None:
        """Return the operators where ``keep`` ``(B,)`` is true, or None if only the whole batch can be applied."""


@dataclass(frozen=True)
class EigenResult:
    r"""Largest eigenvalue of a batch of matrices :math:`F = A^\top A`, with the evidence.

    Of :func:`fisher_reg.fisher_eigenpairs` every field but the last four has an axis of eigenpairs after ``B``.

    Attributes:
        eigenvalue: ``(B,)``. :math:`\theta = \|A^\top u\|^2`, a Rayleigh quotient by backward passes alone: never above
            the true value beyond round-off.
        eigenvector: ``(B, *S)``. :math:`v = A^\top u / \sqrt\theta`; zero where the matrix is zero.
        left_singular_vector: ``(B, K)``. :math:`u`, of unit length: what the outputs do along ``v``.
        residual: ``(B,)``. :math:`\|A A^\top u - \theta u\|`. :math:`A A^\top` has the eigenvalues of F, so that one of
            them lies within ``residual`` of ``eigenvalue``. It does not say that this one is the largest.
        converged: ``(B,)``, boolean: the residual is at most ``rtol`` times the eigenvalue.
        ritz_values: ``(B, m)``, descending: the quotients of the whole search space, zero where it was smaller.
        num_steps: ``(B,)``. Steps taken for each example; fewer than allowed where it converged or nothing was left.
        num_matvecs: Applications of ``A`` and of its transpose, counted alike; each one covers the whole batch, or what
            was left of it.
        solver: The solver that was used.
    """

    eigenvalue: Tensor
    eigenvector: Tensor
    left_singular_vector: Tensor
    residual: Tensor
    converged: Tensor
    ritz_values: Tensor
    num_steps: Tensor
    num_matvecs: int
    solver: Solver

    def upper_bound(self, trace: Tensor) -> Tensor:
        r"""Bound the largest eigenvalue from above by the trace of F ``(B,)``.

        Each Ritz value is at most the eigenvalue of its rank (Cauchy's interlacing), so that
        :math:`\lambda_1 = \mathrm{tr} F - \sum_{i>1} \lambda_i \le \mathrm{tr} F - \sum_{i>1} \theta_i`. Together with
        ``eigenvalue`` this brackets the largest eigenvalue, whatever has converged. A sampled trace makes it as
        uncertain as that.

        Returns:
            ``(B,)``.

        Example:
            >>> from fisher_reg import Lanczos, fisher_spectral_norm, fisher_trace
            >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])  # all eigenvalues are in the search space
            >>> result = fisher_spectral_norm(lambda x: x @ weight.T, torch.zeros(1, 2), solver=Lanczos())
            >>> result.upper_bound(fisher_trace(lambda x: x @ weight.T, torch.zeros(1, 2))) - result.eigenvalue < 1e-6
            tensor([True])
        """
        return trace - self.ritz_values[:, 1:].sum(1)


class Solver(Protocol):
    """Finds the largest eigenvalue of a batch of operators."""

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Return one eigenpair per operator of the batch."""


class EigenpairSolver(Protocol):
    """Finds several of the largest eigenvalues."""

    def eigenpairs(
        self, operator: FactoredOperator, num_eigenpairs: int, generator: torch.Generator | None = None
    ) -> EigenResult:
        """Return ``num_eigenpairs`` eigenpairs per operator of the batch, descending."""


class TraceEstimator(Protocol):
    """Estimates the trace of a batch of operators."""

    def trace(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Return the trace of ``F`` per operator, ``(B,)``."""


_PER_PAIR = ("eigenvalue", "eigenvector", "left_singular_vector", "residual", "converged")
_PER_EXAMPLE = (*_PER_PAIR, "ritz_values", "num_steps")


def leading(result: EigenResult) -> EigenResult:
    """Keep the first of several eigenpairs and drop their axis."""
    return replace(result, **{name: getattr(result, name)[:, 0] for name in _PER_PAIR})


def part(result: EigenResult, index: Tensor) -> EigenResult:
    """Select or reorder examples."""
    return replace(result, **{name: getattr(result, name)[index] for name in _PER_EXAMPLE})


def concatenate(results: list[EigenResult]) -> EigenResult:
    """Join the results of parts of one batch; applications are added."""
    joined: dict[str, Any] = {name: torch.cat([getattr(one, name) for one in results]) for name in _PER_EXAMPLE}
    return replace(results[0], **joined, num_matvecs=sum(result.num_matvecs for result in results))


def dense_rows(operator: FactoredOperator) -> Tensor:
    """Form ``A`` ``(B, K, d)`` by ``K`` applications of the adjoint."""
    like = operator.starts(1)[:, 0]
    identity = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return torch.stack([operator.adjoint(row.expand_as(like)) for row in identity], 1)


def unit(vector: Tensor) -> Tensor:
    """Scale ``(..., n)`` to unit length; zero stays zero."""
    # Division by the largest entry first: the squares of a saturated network's gradients underflow.
    tiny = torch.finfo(vector.dtype).tiny
    scaled = vector / vector.abs().amax(-1, keepdim=True).clamp_min(tiny)
    length: Tensor = scaled.norm(dim=-1, keepdim=True)
    return scaled / length.clamp_min(tiny)


def check_finite(values: Tensor) -> None:
    """Refuse NaN and infinite products ``(B, ...)`` of an operator.

    Raises:
        NonFiniteJacobianError: With the number of examples.
    """
    broken = ~torch.isfinite(values).flatten(1).all(1)
    if bool(broken.any()):
        raise NonFiniteJacobianError(
            f"The logits of {int(broken.sum())} of {len(values)} examples are finite, but their derivatives with "
            "respect to the inputs are not. Look for a norm, root or division at zero, or for overflowing weights."
        )


def check_positive(value: object, **counts: int) -> None:
    """Refuse counts below one.

    Raises:
        ValueError: With the name of the class and of the argument.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{type(value).__name__} needs {name} >= 1; got {count}.")
