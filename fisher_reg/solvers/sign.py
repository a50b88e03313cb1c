r"""The largest value of :math:`\delta^\top F \delta` over the cube :math:`\|\delta\|_\infty \le 1`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.printing import examples, spread
from fisher_reg.sampling import fixed_generator, normal
from fisher_reg.solvers.linalg import check_finite, check_positive, new_direction, symmetric_eigen, unit
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.space import Space


@dataclass(frozen=True)
class SignResult:
    r"""Large values of :math:`\delta^\top F \delta` over the cube, for a batch of matrices :math:`F = A^\top A`.

    Attributes:
        value: ``(B,)``. :math:`\|A \delta\|^2` at ``perturbation``, by an exact derivative: a lower bound of the
            maximum, up to rounding. The gap is not known: to maximise a convex function over a cube is NP-hard.
        perturbation: ``(B, *S)``. :math:`\delta`: a vertex of the cube, with entries -1 and 1; zero where
            :math:`A \delta = 0`.
        left_singular_vector: ``(B, K)``. :math:`u = A \delta / \|A \delta\|`; zero where :math:`A \delta = 0`.
            :math:`\|A^\top u\|_1^2` lies between ``value`` and the maximum.
        is_stationary: ``(B,)``, boolean. Whether one more step would change no sign, except for entries whose share of
            :math:`\|F \delta\|_1` is at most the ``rtol`` of the solver. Necessary for a maximum, not sufficient.
        num_steps: ``(B,)``. Number of steps after the first vertex, until the example was stationary.
        num_matvecs: Number of products with ``A`` and with its transpose; each product covers the whole batch.
        solver: The solver that was used.
    """

    value: Tensor
    perturbation: Tensor
    left_singular_vector: Tensor
    is_stationary: Tensor
    num_steps: Tensor
    num_matvecs: int
    solver: SignIteration

    def __repr__(self) -> str:
        return (
            f"SignResult({examples(len(self.value))}: value {spread(self.value)}; "
            f"{int((~self.is_stationary).sum())} not stationary; {self.num_matvecs} matvecs by SignIteration)"
        )


@dataclass(frozen=True)
class SignIteration:
    r"""Search for :math:`\max_{\|\delta\|_\infty \le 1} \|A \delta\|^2 = \max_{\|u\| = 1} \|A^\top u\|_1^2`.

    The power method for this norm is :math:`\delta \leftarrow \mathrm{sign}(A^\top A \delta)`. The value never
    decreases, since a convex function lies above its tangents, and after finitely many steps no sign changes. The limit
    depends on the start. The iteration is therefore run on a growing subspace of outputs with an orthonormal basis
    ``U`` ``(m, K)``. Once :math:`U A` is known, its iterations cost no pass; they start from all left singular vectors
    of :math:`U A` and from ``num_trials`` random vectors. The first subspace is spanned by ``num_starts`` vectors
    (whitened contrasts and indicators of the likeliest classes) and, if ``K`` is larger, a random one. :math:`A \delta`
    of the best :math:`\delta` is added until :math:`\delta` is stationary for ``A``.

    Costs at most ``num_starts + num_steps + 2`` backward and ``num_steps + 1`` exact forward-mode passes. With ``K`` at
    most ``num_starts`` these are ``K`` and 1, since ``A`` is then formed.

    References: Boyd (1974), "The power method for l^p norms"; Higham (1992), "Estimating the matrix p-norm".

    Args:
        num_steps: Largest number of vertices after the first one; 0 or more.
        num_starts: Number of start vectors; at most ``K`` of them are used.
        num_trials: Number of random starts on the subspace, the same for all examples.
        rtol: An example stops once the entries of :math:`F \delta` whose sign differs from :math:`\delta` sum to at
            most this share of :math:`\|F \delta\|_1`; 0 for no change of any sign.

    Raises:
        ValueError: If a count is too small.
    """

    num_steps: int = 4
    num_starts: int = 10
    num_trials: int = 32
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(self, num_starts=self.num_starts, num_trials=self.num_trials)
        if self.num_steps < 0:
            raise ValueError(f"SignIteration needs num_steps >= 0; got {self.num_steps}.")

    def maximize(self, operator: FactoredOperator, generator: torch.Generator | None = None) -> SignResult:
        """Return the best vertex that is found for each operator; ``generator`` draws the random starts."""
        starts = operator.starts(self.num_starts)
        draws = self._draws(starts, generator)
        space = _grown(operator, _empty_space(starts), starts)
        if starts.shape[1] < starts.shape[2]:
            space = _grown(operator, space, draws[-1:, : starts.shape[2]].expand(len(starts), 1, -1))
        num_steps = torch.zeros(len(starts), dtype=torch.long, device=starts.device)
        vertex = _best_vertex(space, draws[:-1])
        for step in range(self.num_steps + 1):
            image = operator.apply(vertex, exact=True)
            check_finite(image)
            u = unit(image)
            space = _grown(operator, space, u[:, None])
            # A^T u = (U u)^T (U A), since u is in the subspace now
            along = (space.left @ u[:, :, None]).mT
            slope = (along @ space.rows).squeeze(1)
            is_stationary = _share_against(slope, vertex) <= self.rtol
            if step == self.num_steps or bool(is_stationary.all()):
                break
            num_steps = num_steps + ~is_stationary
            vertex = torch.where(is_stationary[:, None], vertex, _best_vertex(space, draws[:-1], along))
        is_zero = (image == 0).all(1, keepdim=True)
        return SignResult(
            value=image.double().square().sum(1).to(image.dtype),  # ||A delta||^2
            perturbation=vertex.masked_fill(is_zero, 0.0),
            left_singular_vector=u,
            is_stationary=is_stationary,
            num_steps=num_steps,
            num_matvecs=space.left.shape[1] + step + 1,
            solver=self,
        )

    def _draws(self, starts: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the random starts and, in the last row, a random vector of outputs."""
        width = max(starts.shape[2], self.num_starts + self.num_steps + 2)
        generator = fixed_generator() if generator is None else generator
        return normal(starts.new_empty(self.num_trials + 1, width), generator)


def _empty_space(starts: Tensor) -> Space:
    count, _, num_outputs = starts.shape
    gram = torch.zeros(count, 0, 0, dtype=torch.float64, device=starts.device)
    return Space(starts.new_zeros(count, 0, num_outputs), starts.new_zeros(count, 0, 0), gram)


def _grown(operator: FactoredOperator, space: Space, vectors: Tensor) -> Space:
    """Add the vectors ``(B, n, K)`` that are not in the space of every example; one pass each."""
    for vector in vectors.unbind(1):
        is_new = space.left.shape[1] == 0 or bool(new_direction(vector, space.left).any())
        space = space.extended(operator, vector[:, None]) if is_new else space
    return space


def _best_vertex(space: Space, draws: Tensor, along: Tensor | None = None) -> Tensor:
    """Return the best vertex ``(B, d)`` of the iteration on the space.

    Args:
        space: With rows ``W`` ``(B, m, d)``.
        draws: Random starts ``(n, m')`` with ``m' >= m``.
        along: One more start ``(B, 1, m)``.
    """
    # scaled, since products of the gradients of a saturated network underflow
    tiny = torch.finfo(space.rows.dtype).tiny
    rows = space.rows / space.rows.abs().amax((1, 2), keepdim=True).clamp_min(tiny)
    count, num_rows, num_entries = rows.shape
    singular_vectors = symmetric_eigen(space.gram)[1].mT.to(rows)
    trials = [singular_vectors, draws[:, :num_rows].expand(count, -1, -1)]
    starts = torch.cat(trials if along is None else [along, *trials], 1)
    best, largest = rows.new_ones(count, num_entries), rows.new_full((count,), -1.0, dtype=torch.float64)
    for some in starts.split(max(1, _MAX_NUMBERS // (count * num_entries)), 1):
        vertices = _climb(rows, some)
        # ||W delta||^2
        values, index = (vertices @ rows.mT).double().square().sum(2).max(1)
        chosen = vertices.take_along_dim(index[:, None, None], 1).squeeze(1)
        best = torch.where((values > largest)[:, None], chosen, best)
        largest = torch.maximum(values, largest)
    return best


def _climb(rows: Tensor, starts: Tensor) -> Tensor:
    """Iterate ``sign(Wᵀ W δ)`` from ``sign(Wᵀ c)`` for the starts ``c`` ``(B, n, m)``; returns ``(B, n, d)``."""
    vertices = _signs(starts @ rows)
    for step in range(_MAX_CLIMB):
        moved = _signs(vertices @ rows.mT @ rows)
        # each test synchronises with the device
        if step % _LOOK_EVERY == _LOOK_EVERY - 1 and torch.equal(moved, vertices):
            break
        vertices = moved
    return vertices


def _signs(slope: Tensor) -> Tensor:
    # sign(0) = 1: the mean of a convex function over both signs is at least its value at zero
    return torch.where(slope >= 0, 1.0, -1.0).to(slope.dtype)


def _share_against(slope: Tensor, vertex: Tensor) -> Tensor:
    """Return the share of the l1 norm of ``slope`` in entries of the other sign, ``(B,)``; 0 for a zero slope."""
    size = slope.double().abs()
    against = torch.where(slope * vertex < 0, size, 0.0).sum(1)
    return against / size.sum(1).clamp_min(torch.finfo(torch.float64).tiny)


_MAX_NUMBERS = 2**25
"""Largest number of entries of vertices in memory at once."""

_LOOK_EVERY = 3

_MAX_CLIMB = 50
"""Largest number of steps on a subspace, which cost no pass; about five are enough."""
