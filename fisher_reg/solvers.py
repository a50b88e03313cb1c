r"""Largest eigenvalues of :math:`F = A^\top A`, for a batch of operators at once.

The solvers know only ``apply`` (A), ``adjoint`` (its transpose) and start vectors, never a network. Each is an
immutable value that holds its tolerances.

They all search on the output side, which is small: :math:`A A^\top` has the eigenvalues of F. For orthonormal
:math:`u_1 \dots u_m` the rows :math:`r_i = A^\top u_i` are backward passes; :math:`r_i^\top r_j` is the projection of
:math:`A A^\top` on the search space, and needs no derivative but these. A forward-mode pass only says where to search
next and how far the result may be off, so that it may be a difference quotient: the component of its result inside the
search space is known from the rows, which replaces it and measures its error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_reg.eigen import (
    EigenResult,
    FactoredOperator,
    Solver,
    check_finite,
    check_positive,
    concatenate,
    dense_rows,
    leading,
    part,
    unit,
)
from fisher_reg.sampling import fixed_generator, normal
from fisher_reg.trace import Probe, StandardNormal


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
        return leading(self.eigenpairs(operator, 1))

    def eigenpairs(
        self, operator: FactoredOperator, num_eigenpairs: int, generator: torch.Generator | None = None
    ) -> EigenResult:
        """Return the largest eigenpairs, the fields with axes ``(B, num_eigenpairs)``; those of rank above K are zero.

        A repeated eigenvalue comes as often as it is.
        """
        rows = dense_rows(operator)
        num_matvecs = rows.shape[1]
        left = torch.eye(num_matvecs, dtype=rows.dtype, device=rows.device).expand(len(rows), -1, -1)
        ritz = _Space(left, rows).ritz(num_eigenpairs)
        product = (ritz.left @ rows) @ rows.mT
        residual = (product - ritz.value[:, :, None] * ritz.left).norm(dim=2)
        return EigenResult(
            eigenvalue=ritz.value,
            eigenvector=unit(ritz.row),
            left_singular_vector=ritz.left,
            residual=residual,
            converged=residual <= self.rtol * ritz.value,
            ritz_values=ritz.all_values,
            num_steps=torch.zeros(len(rows), dtype=torch.long, device=rows.device),
            num_matvecs=num_matvecs,
            solver=self,
        )

    def trace(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> Tensor:
        """Sum the squares of ``A``: ``(B,)``."""
        return dense_rows(operator).square().sum((1, 2))


@dataclass(frozen=True)
class Lanczos:
    r"""Rayleigh-Ritz on a growing subspace of outputs; for one start this is Golub-Kahan bidiagonalisation of ``A``.

    The space begins with ``num_starts`` vectors, the whitened indicators of the likeliest classes, and grows by the
    residual of its best vector. Costs ``num_starts + num_steps`` backward and ``num_steps + 1`` forward-mode passes at
    most, whatever ``K``. An example that has reached ``rtol``, or whose space is exhausted (``num_steps`` beyond the
    rank of ``A``), keeps its result and drops out of the batch; ``num_steps`` of the result says when.

    Each start has a small random part, the same for all examples, so that no eigenvector is orthogonal to the space. A
    spectrum whose largest eigenvalues nearly coincide may still stop at the second: ``residual`` bounds the distance to
    some eigenvalue, and :meth:`fisher_reg.EigenResult.upper_bound` the distance to the largest.

    References: Golub, Kahan (1965), "Calculating the singular values and pseudo-inverse of a matrix"; Morgan, Scott
    (1986), "Generalizations of Davidson's method", for spaces that grow by residuals.

    Args:
        num_steps: Largest number of vectors that are added to the starts; at least 1.
        num_starts: Vectors to begin with, at most ``K`` of them are used.
        rtol: Residual, relative to the eigenvalue, at which an example stops and counts as converged. The error of the
            eigenvalue is of the order of its square.
    """

    num_steps: int = 5
    num_starts: int = 3
    rtol: float = 5e-2

    def __post_init__(self) -> None:
        check_positive(self, num_steps=self.num_steps, num_starts=self.num_starts)

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Return the largest eigenpair of each operator."""
        return leading(self.eigenpairs(operator, 1, generator))

    def eigenpairs(
        self, operator: FactoredOperator, num_eigenpairs: int, generator: torch.Generator | None = None
    ) -> EigenResult:
        """Return the largest eigenpairs, the fields with axes ``(B, num_eigenpairs)``.

        Each step costs one pass per eigenpair, forward and backward; an example stops when all of its pairs have
        reached ``rtol``.
        """
        starts = operator.starts(max(self.num_starts, num_eigenpairs))
        return _search(
            operator,
            _tilted(starts, generator),
            num_eigenpairs,
            num_steps=self.num_steps,
            rtol=self.rtol,
            solver=self,
        )


@dataclass(frozen=True)
class PowerIteration:
    """Repeated multiplication with ``A Aᵀ``; the paper's white-box method without its ``K x K`` matrix, to compare.

    :class:`Lanczos` needs fewer passes.

    Args:
        max_iterations: Upper limit of the number of multiplications.
        rtol: Residual, relative to the eigenvalue, at which an example stops and counts as converged.
    """

    max_iterations: int = 100
    rtol: float = 5e-2

    def __post_init__(self) -> None:
        check_positive(self, max_iterations=self.max_iterations)

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Iterate until all examples have converged or the limit is reached."""
        starts = _tilted(operator.starts(1), generator)
        result = _search(
            operator, starts, 1, num_steps=self.max_iterations, rtol=self.rtol, solver=self, remembers=False
        )
        return leading(result)


@dataclass(frozen=True)
class HutchinsonMax:
    r"""The largest of ``num_samples`` random Rayleigh quotients of :math:`A A^\top`: what the paper's code computes.

    Biased low, the more the larger ``K``: a random direction meets the top eigenvector by :math:`1/K` on average. Kept
    to compare with; :class:`Lanczos` is right at a fraction of the passes.

    Args:
        num_samples: Random directions per example, each one backward pass.
        probe: :class:`fisher_reg.StandardNormal` as in the paper, or another.
        rtol: Residual, relative to the eigenvalue, up to which a result counts as converged.
    """

    num_samples: int = 100
    probe: Probe = StandardNormal()
    rtol: float = 5e-2

    def __post_init__(self) -> None:
        check_positive(self, num_samples=self.num_samples)

    def solve(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> EigenResult:
        """Return the best of the random directions, with its residual."""
        if generator is None:
            generator = fixed_generator(operator.starts(1).device)
        best = torch.zeros_like(operator.starts(1)[:, 0])
        value = best.new_full((len(best), 1), -1.0)
        for _ in range(self.num_samples):
            direction = unit(self.probe.draw(operator, generator))
            quotient = operator.adjoint(direction).square().sum(1, keepdim=True)
            best = torch.where(quotient > value, direction, best)
            value = torch.maximum(quotient, value)
        result = _search(operator, best[:, None], 1, num_steps=0, rtol=self.rtol, solver=self)
        return leading(replace(result, num_matvecs=result.num_matvecs + self.num_samples))


@dataclass(frozen=True)
class _Space:
    """Search spaces: orthonormal ``left`` ``(B, m, K)``, zero where exhausted, and ``rows = left A`` ``(B, m, d)``."""

    left: Tensor
    rows: Tensor

    def extended(self, operator: FactoredOperator, vectors: Tensor) -> _Space:
        """Add ``vectors`` ``(B, n, K)``, each orthonormalised and at the cost of one backward pass."""
        left, rows = list(self.left.unbind(1)), list(self.rows.unbind(1))
        for vector in vectors.unbind(1):
            left.append(_orthonormalise(vector, left))
            rows.append(operator.adjoint(left[-1]))
        return _Space(torch.stack(left, 1), torch.stack(rows, 1))

    def part(self, keep: Tensor) -> _Space:
        """Return the spaces of some examples."""
        return _Space(self.left[keep], self.rows[keep])

    def forgotten(self) -> _Space:
        """Return empty spaces."""
        return _Space(self.left[:, :0], self.rows[:, :0])

    def ritz(self, num_eigenpairs: int) -> _Ritz:
        """Project ``A Aᵀ`` on the spaces and return the best vectors in them."""
        gram = self.rows @ self.rows.mT
        check_finite(gram)
        scale = gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(gram.dtype).tiny)[:, None]
        values, vectors = torch.linalg.eigh(gram / scale[:, :, None])
        top = vectors[:, :, -num_eigenpairs:].flip(2).mT
        row = top @ self.rows
        values = (values.flip(1) * scale).clamp_min(0)
        return _Ritz(row.square().sum(2), top @ self.left, row, values)


@dataclass(frozen=True)
class _Ritz:
    """Values ``(B, k)``, ``left`` ``(B, k, K)``, ``row = left A`` ``(B, k, d)``; all values of the space ``(B, m)``."""

    value: Tensor
    left: Tensor
    row: Tensor
    all_values: Tensor


def _search(
    operator: FactoredOperator,
    starts: Tensor,
    num_eigenpairs: int,
    *,
    num_steps: int,
    rtol: float,
    solver: Solver,
    remembers: bool = True,
) -> EigenResult:
    """Rayleigh-Ritz, residual, growth, until each example has stopped; the stopped ones drop out."""
    space = _Space(starts[:, :0], starts[:, :0]).extended(operator, starts)
    num_matvecs = starts.shape[1]
    remaining = torch.arange(len(starts), device=starts.device)
    stopped = torch.zeros_like(remaining, dtype=torch.bool)
    found: list[tuple[Tensor, EigenResult]] = []
    for step in range(num_steps + 1):
        ritz = space.ritz(num_eigenpairs)
        images, distance, num_passes = _images(operator, space, ritz)
        num_matvecs += num_passes
        root = ritz.value.sqrt()
        residual = root * distance
        exhausted = distance <= 100 * torch.finfo(distance.dtype).eps * root
        done = ((residual <= rtol * ritz.value) | exhausted).all(1) | (step == num_steps)
        result = EigenResult(
            eigenvalue=ritz.value,
            eigenvector=unit(ritz.row),
            left_singular_vector=ritz.left,
            residual=residual,
            converged=residual <= rtol * ritz.value,
            ritz_values=ritz.all_values,
            num_steps=torch.full_like(remaining, step),
            num_matvecs=0,
            solver=solver,
        )
        new = done & ~stopped
        found.append((remaining[new], part(result, new)))
        stopped = stopped | done
        if bool(stopped.all()):
            break
        keep = ~stopped
        if float(keep.float().mean()) <= _WORTH_A_FORWARD and (smaller := operator.restrict(keep)) is not None:
            operator, space, images = smaller, space.part(keep), images[keep]
            remaining, stopped = remaining[keep], stopped[keep]
        space = (space if remembers else space.forgotten()).extended(operator, images)
        num_matvecs += num_eigenpairs
    order = torch.cat([indices for indices, _ in found]).argsort()
    width = space.left.shape[1]
    padded = [
        replace(
            result, ritz_values=torch.nn.functional.pad(result.ritz_values, (0, width - result.ritz_values.shape[1]))
        )
        for _, result in found
    ]
    return replace(part(concatenate(padded), order), num_matvecs=num_matvecs)


_WORTH_A_FORWARD = 2 / 3
"""Share of the batch up to which a new forward on it costs less than passing the rest through one more step."""

_TRUSTED = 0.05
"""Error of a difference quotient, relative to the result, above which the exact derivative is taken instead."""

_TILT = 0.03  # random part of a start vector: small against the rest, large against round-off


def _images(operator: FactoredOperator, space: _Space, ritz: _Ritz) -> tuple[Tensor, Tensor, int]:
    """``A v`` for the Ritz vectors ``v`` ``(B, k, d)``, and how far it leaves the space.

    Its component inside the space is known exactly from the rows, which replaces what the pass gave.

    Returns:
        Images ``(B, k, K)``; the length of their part outside the space and their error added up, ``(B, k)``; and the
        number of passes.

    Raises:
        ValueError: If ``apply`` and ``adjoint`` are not transposes of each other.
    """
    images, distances, num_passes = [], [], 0
    for u, row in zip(ritz.left.unbind(1), ritz.row.unbind(1), strict=True):
        v = unit(row)
        known = (space.rows @ v[:, :, None]).squeeze(2)
        image = operator.apply(v, slope=operator.slope_along(u, row))
        length = known.norm(dim=1).clamp_min(10 * torch.finfo(known.dtype).tiny ** 0.5)  # squares below underflow
        wrong = ~(_disagreement(space, image, known) <= _TRUSTED * length)
        num_passes += 1
        if bool(wrong.any()):
            some = operator.restrict(wrong)
            if some is None:
                image = operator.apply(v, exact=True)
            else:
                image = image.index_put((wrong,), some.apply(v[wrong], exact=True))
            num_passes += 1
        check_finite(image)
        error = _disagreement(space, image, known)
        if bool((error > 2 * _TRUSTED * length).any()):
            raise ValueError(
                "apply and adjoint are not transposes of each other. A model does that if its forward is random, or if "
                "a part of it runs under torch.no_grad(), which forward-mode passes do not respect; use detach() there."
            )
        inside = (space.left * (space.left @ image[:, :, None])).sum(1)
        outside = image - inside
        images.append((space.left * known[:, :, None]).sum(1) + outside)
        distances.append(outside.norm(dim=1) + error)
    return torch.stack(images, 1), torch.stack(distances, 1), num_passes


def _disagreement(space: _Space, image: Tensor, known: Tensor) -> Tensor:
    error: Tensor = ((space.left @ image[:, :, None]).squeeze(2) - known).norm(dim=1)
    return error


def _tilted(starts: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        generator = fixed_generator(starts.device)
    return unit(starts) + _TILT * unit(normal(starts[0], generator))


def _orthonormalise(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """Return the unit component of ``vector`` outside ``basis``; zero where only round-off is left."""
    rest = unit(vector)
    for _ in range(2):  # twice is enough (Giraud, Langou, Rozloznik 2005)
        for direction in basis:
            rest = rest - direction * (direction * rest).sum(1, keepdim=True)
    exhausted = rest.norm(dim=1, keepdim=True) <= 100 * torch.finfo(vector.dtype).eps
    return torch.where(exhausted, 0.0, unit(rest))
