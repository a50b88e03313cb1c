r"""Largest eigenvalue of :math:`F = A^\top A`, for a batch of operators at once.

The solvers know only ``apply`` (A), ``adjoint`` (its transpose) and a ``start`` vector, never a network. Each is an
immutable value that holds its tolerances. Every result is certified by one rule, :func:`certify`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fisher_reg.errors import NonFiniteJacobianError


class FactoredOperator(Protocol):
    """A batch of linear maps ``A``, each ``(K, d)``."""

    @property
    def start(self) -> Tensor:
        """Start vector ``(B, K)``."""

    def apply(self, tangent: Tensor, /) -> Tensor:
        """``(B, d)`` to ``(B, K)``."""

    def adjoint(self, cotangent: Tensor, /) -> Tensor:
        """``(B, K)`` to ``(B, d)``."""


@dataclass(frozen=True)
class EigenResult:
    r"""Largest eigenvalue and eigenvector of a batch of symmetric matrices, with the evidence.

    Attributes:
        eigenvalue: ``(B,)``. The Rayleigh quotient of ``eigenvector``: never above the true value beyond round-off.
        eigenvector: ``(B, *S)``, of unit Euclidean length per example; zero where the matrix is zero.
        residual: ``(B,)``. :math:`\|F v - \theta v\|`; an eigenvalue of F lies that near.
        converged: ``(B,)``, boolean: the residual is at most ``rtol`` times the eigenvalue.
        num_matvecs: Applications of ``A`` and of its transpose, counted alike; each one covers the whole batch, or one
            chunk of it where a dense method goes in chunks.
        solver: The solver that was used.
    """

    eigenvalue: Tensor
    eigenvector: Tensor
    residual: Tensor
    converged: Tensor
    num_matvecs: int
    solver: Solver


class Solver(Protocol):
    """Finds the largest eigenvalue of a batch of operators."""

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Return one eigenpair per operator of the batch."""


class TraceEstimator(Protocol):
    """Estimates the trace of a batch of operators."""

    def trace(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Return the trace of ``F`` per operator, ``(B,)``."""


@dataclass(frozen=True)
class Exact:
    """Eigenvalues of the ``K x K`` Gram matrix ``A Aᵀ``: ``K`` backward passes, ``K d`` numbers per example.

    Right to round-off, and the cheapest for few classes.

    Args:
        rtol: Residual, relative to the eigenvalue, up to which a result counts as converged.
    """

    rtol: float = 1e-3

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Solve the dense problem; nothing is random."""
        rows = dense_rows(operator)
        gram = rows @ rows.mT
        _check_finite(gram)
        top = torch.linalg.eigh(gram).eigenvectors[:, :, -1]
        vector = (rows.mT @ top[:, :, None]).squeeze(2)
        return certify(operator, vector, rtol=self.rtol, num_matvecs=rows.shape[1], solver=self)

    def trace(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Sum the squares of ``A``: ``(B,)``."""
        return dense_rows(operator).square().sum((1, 2))


@dataclass(frozen=True)
class Lanczos:
    r"""Golub-Kahan bidiagonalisation of ``A``, fully reorthogonalised, then Rayleigh-Ritz.

    Costs ``num_steps + 1`` pairs of passes (the last one is the residual), whatever ``K``. The start vector has a small
    random part, the same for all examples, so that no eigenvector is orthogonal to it.

    Reference: Golub, Kahan (1965), "Calculating the singular values and pseudo-inverse of a matrix".

    Args:
        num_steps: Dimension of the Krylov space, at least 1. An exhausted space (``num_steps`` beyond the rank of
            ``A``) adds nothing and costs passes only.
        rtol: Residual, relative to the eigenvalue, up to which a result counts as converged.
    """

    num_steps: int = 3
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        _check_positive(self, "num_steps", self.num_steps)

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Solve by Rayleigh-Ritz on the Krylov space of F that starts from ``Aᵀ start``."""
        left: list[Tensor] = []
        right: list[Tensor] = []
        images: list[Tensor] = []
        u = _tilted(operator.start, generator)
        for _ in range(self.num_steps):
            left.append(_orthonormalise(u, left))
            right.append(_orthonormalise(operator.adjoint(left[-1]), right))
            images.append(operator.apply(right[-1]))
            u = images[-1]
        image = torch.stack(images, 1)
        gram = image @ image.mT
        _check_finite(gram)
        ritz = torch.linalg.eigh(gram).eigenvectors[:, None, :, -1]
        vector = (ritz @ torch.stack(right, 1)).squeeze(1)
        return certify(operator, vector, rtol=self.rtol, num_matvecs=2 * self.num_steps, solver=self)


@dataclass(frozen=True)
class PowerIteration:
    """Repeated multiplication with F; the textbook method, for comparison: :class:`Lanczos` needs fewer passes.

    Args:
        max_iterations: Upper limit of the number of multiplications with F.
        rtol: Stops when every example has a residual of at most ``rtol`` times its eigenvalue.
    """

    max_iterations: int = 100
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        _check_positive(self, "max_iterations", self.max_iterations)

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Iterate until all examples have converged or the limit is reached."""
        vector = operator.adjoint(_tilted(operator.start, generator))
        num_matvecs = 1
        for _ in range(self.max_iterations):
            image = _unit(vector)
            product = operator.adjoint(operator.apply(image))
            num_matvecs += 2
            theta = (image * product).sum(1)
            if bool(((product - theta[:, None] * image).norm(dim=1) <= self.rtol * theta).all()):
                break
            vector = product
        return certify(operator, vector, rtol=self.rtol, num_matvecs=num_matvecs, solver=self)


@dataclass(frozen=True)
class Hutchinson:
    r"""Trace of F as the mean of :math:`\|A^\top \epsilon\|^2` over random signs :math:`\epsilon \in \{-1, 1\}^K`.

    Unbiased, at one backward pass per sample. The relative variance is at most ``2 / num_samples``, and small for a
    confident prediction; with sampled labels instead of signs it grows without limit there, as ``1 / (1 - max p)``.

    Reference: Hutchinson (1989), "A stochastic estimator of the trace of the influence matrix".

    Args:
        num_samples: Random sign vectors per example.
    """

    num_samples: int = 16

    def __post_init__(self) -> None:
        _check_positive(self, "num_samples", self.num_samples)

    def trace(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Average over ``num_samples`` probes: ``(B,)``."""
        start = operator.start
        if generator is None:
            generator = torch.Generator(start.device).manual_seed(0)
        squares = [operator.adjoint(random_signs(start, generator)).square().sum(1) for _ in range(self.num_samples)]
        return torch.stack(squares).mean(0)


def random_signs(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return independent fair signs with the shape, type and device of ``like``, drawn where ``generator`` lives."""
    device = like.device if generator is None else generator.device
    bits = torch.randint(0, 2, like.shape, generator=generator, device=device)
    return (2 * bits - 1).to(like)


def dense_rows(operator: FactoredOperator) -> Tensor:
    """``A`` as ``(B, K, d)``, by ``K`` applications of the adjoint."""
    start = operator.start
    identity = torch.eye(start.shape[1], dtype=start.dtype, device=start.device)
    return torch.stack([operator.adjoint(unit.expand_as(start)) for unit in identity], 1)


def certify(
    operator: FactoredOperator, vector: Tensor, *, rtol: float, num_matvecs: int, solver: Solver
) -> EigenResult:
    """Turn a direction ``(B, d)`` into a result whose value and residual come from the bare operator.

    Returns:
        The result, with two more applications counted.

    Raises:
        NonFiniteJacobianError: If the operator gives NaN or infinite values.
        ValueError: If ``apply`` and ``adjoint`` are not transposes of each other.
    """
    v = _unit(vector)
    image = operator.apply(v)
    eigenvalue = image.square().sum(1)
    _check_finite(eigenvalue)
    product = operator.adjoint(image)
    if bool((((v * product).sum(1) - eigenvalue).abs() > 0.1 * eigenvalue).any()):
        raise ValueError(
            "apply and adjoint are not transposes of each other. A model does that if its forward is random, or if a "
            "part of it runs under torch.no_grad(), which forward-mode passes do not respect; use detach() there."
        )
    residual = (product - eigenvalue[:, None] * v).norm(dim=1)
    return EigenResult(eigenvalue, v, residual, residual <= rtol * eigenvalue, num_matvecs + 2, solver)


def concatenate(results: list[EigenResult]) -> EigenResult:
    """Join the results of consecutive chunks of one batch; applications are added."""
    if len(results) == 1:
        return results[0]
    return replace(
        results[0],
        eigenvalue=torch.cat([result.eigenvalue for result in results]),
        eigenvector=torch.cat([result.eigenvector for result in results]),
        residual=torch.cat([result.residual for result in results]),
        converged=torch.cat([result.converged for result in results]),
        num_matvecs=sum(result.num_matvecs for result in results),
    )


_TILT = 0.03  # random part of a start vector: small against the contrast, large against round-off


def _tilted(start: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        generator = torch.Generator(start.device).manual_seed(0)
    noise = torch.randn(start.shape[1:], dtype=start.dtype, device=generator.device, generator=generator)
    return _unit(start) + _TILT * _unit(noise.to(start.device)[None])


def _unit(vector: Tensor) -> Tensor:
    # Division by the largest entry first: the squares of a saturated network's gradients underflow.
    scaled = vector / vector.abs().amax(1, keepdim=True).clamp_min(torch.finfo(vector.dtype).tiny)
    length: Tensor = scaled.norm(dim=1, keepdim=True)
    return scaled / length.clamp_min(torch.finfo(vector.dtype).tiny)


def _orthonormalise(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """Return the unit component of ``vector`` outside ``basis``; zero where only round-off is left."""
    unit = _unit(vector)
    if not basis:
        return unit
    rows = torch.stack(basis, 1)
    rest = unit
    for _ in range(2):  # twice is enough (Giraud, Langou, Rozloznik 2005)
        rest = rest - (rows.mT @ (rows @ rest[:, :, None])).squeeze(2)
    exhausted = rest.norm(dim=1, keepdim=True) <= 100 * torch.finfo(vector.dtype).eps
    return torch.where(exhausted, 0.0, _unit(rest))


def _check_finite(values: Tensor) -> None:
    broken = ~torch.isfinite(values).flatten(1).all(1) if values.ndim > 1 else ~torch.isfinite(values)
    if bool(broken.any()):
        raise NonFiniteJacobianError(
            f"The logits of {int(broken.sum())} of {len(values)} examples are finite, but their derivatives with "
            "respect to the inputs are not. Look for a norm, root or division at zero, or for overflowing weights."
        )


def _check_positive(solver: object, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{type(solver).__name__} needs {name} >= 1; got {value}.")
