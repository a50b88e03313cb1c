r"""How large the largest eigenvalue can be, from what a search has computed.

Let :math:`W` be the search space, spanned by Ritz vectors :math:`u_i` with Ritz values :math:`\theta_i` of
:math:`G = A A^\top`, which has the eigenvalues of F. Let :math:`\kappa_i` be the length of the part of :math:`G u_i`
outside :math:`W`, and :math:`b` a bound of the largest eigenvalue of :math:`G` on the complement of :math:`W`. Then

.. math:: \lambda_\max(G) \le \lambda_\max(M), \qquad
          M = \begin{pmatrix} \theta_1 & & & \kappa_1 \\ & \ddots & & \vdots \\ & & \theta_m & \kappa_m \\
                              \kappa_1 & \cdots & \kappa_m & b \end{pmatrix} .

Where :math:`\kappa_i` is not known, :math:`\sqrt{\theta_i b}` takes its place, which holds for every positive
semidefinite matrix. For a search from a single start all are known from the residual :math:`\rho = \kappa_1`: the space
is a Krylov space, of which :math:`G` leaves only the last vector, so that :math:`\kappa_i` is proportional to the
component of :math:`u_i` along it.

Two ways to :math:`b`. The trace of F less all Ritz values is certain. The other takes a few Lanczos steps from a
uniformly random unit vector :math:`w` of the complement. Let :math:`p_q` be the Lanczos polynomial, so that the vector
:math:`w_{q+1} = p_q(G) w` has unit length. With the component :math:`\gamma` of :math:`w` along the top eigenvector of
the complement, :math:`|\gamma\, p_q(\lambda)| \le 1`. Beyond the largest root :math:`p_q` increases, and
:math:`|\gamma| \ge c` but for a chosen probability, so that :math:`p_q(b) = 1 / c` gives :math:`b`.

A search may need several such vectors, the next one after the one before has found something. The j-th has the
failure probability divided by :math:`2^j`, so that all together fail with the promised one at most.

References: van Dorsselaer, Hochstenbach, van der Vorst (2000), "Computing probabilistic bounds for extreme eigenvalues
of symmetric matrices with the Lanczos method"; Hochstenbach (2013), "Probabilistic upper bounds for the matrix
two-norm"; Kuczynski, Wozniakowski (1992), "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
random start".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_reg.printing import examples, short_repr, spread
from fisher_reg.solvers.linalg import symmetric_eigen


@dataclass(frozen=True)
class Interval:
    """``lower <= λ <= upper`` per example, except with probability ``failure_probability``; zero means certain.

    Attributes:
        lower: ``(B,)``.
        upper: ``(B,)``; infinite where nothing is known.
        failure_probability: For each example by itself, over the draw of the random vector.
    """

    lower: Tensor
    upper: Tensor
    failure_probability: float

    def __repr__(self) -> str:
        return (
            f"Interval({examples(len(self.lower))}: lower {spread(self.lower)}; upper {spread(self.upper)}; "
            f"failure_probability={self.failure_probability:g})"
        )

    @property
    def relative_width(self) -> Tensor:
        """``upper / lower - 1``, ``(B,)``: zero where both are zero, infinite where only ``lower`` is."""
        width = self.upper / self.lower - 1
        return torch.where(self.upper == 0, 0.0, torch.where(self.lower == 0, torch.inf, width))


@dataclass(frozen=True)
class RandomProbe:
    r"""Lanczos steps of a random unit vector in the complement of a search space.

    Attributes:
        roots: ``(B, q)``, the roots of :math:`p_q`, eigenvalues of the tridiagonal matrix; NaN where there are fewer.
        log_norms: ``(B,)``, :math:`\sum_j \log \beta_j` over the off-diagonals that are known: :math:`p_q(\lambda) =
            \prod_j (\lambda - r_j) / \beta_j`.
        open_diagonal: ``(B,)``, the last diagonal :math:`\alpha_q` where the last step was not finished, so that
            :math:`\beta_q^2 \le \lambda \alpha_q` is all that is known of its off-diagonal; NaN elsewhere.
        num_outputs: ``K``, at least the dimension of the complement.
    """

    roots: Tensor
    log_norms: Tensor
    open_diagonal: Tensor
    num_outputs: int

    __repr__ = short_repr

    @classmethod
    def none(cls, like: Tensor, num_outputs: int) -> RandomProbe:
        """Return no probe, whose bound is infinite, for a batch like ``like`` ``(B,)``."""
        unknown = torch.full_like(like, torch.nan)
        return cls(like.new_zeros(len(like), 0), torch.zeros_like(like), unknown, num_outputs)

    @classmethod
    def nothing_left(cls, like: Tensor, num_outputs: int) -> RandomProbe:
        """Return the probe of an empty complement, whose bound is zero, for a batch like ``like`` ``(B,)``."""
        return cls(
            roots=torch.zeros_like(like)[:, None],
            log_norms=torch.full_like(like, -torch.inf),
            open_diagonal=torch.full_like(like, torch.nan),
            num_outputs=num_outputs,
        )

    def scaled(self) -> tuple[RandomProbe, Tensor]:
        """Return the recurrence with all numbers divided by ``s`` ``(B,)``, and ``s``, about its largest eigenvalue."""
        diagonal = self.open_diagonal.nan_to_num(0.0)
        largest = self.roots.nan_to_num(0.0).amax(1) if self.roots.shape[1] else diagonal
        scale = torch.maximum(largest, diagonal)
        scale = torch.where(scale > 0, scale, 1.0)
        num_norms = (~self.roots.isnan()).sum(1) - (~self.open_diagonal.isnan()).long()
        return replace(
            self,
            roots=self.roots / scale[:, None],
            log_norms=self.log_norms - num_norms * scale.log(),
            open_diagonal=self.open_diagonal / scale,
        ), scale

    def excludes(self, b: Tensor, failure_probability: float | Tensor) -> Tensor:
        """Say where no eigenvalue of the complement exceeds ``b`` ``(B,)``: where :meth:`bound` is at most that."""
        if self.roots.shape[1] == 0:
            return torch.zeros_like(b, dtype=torch.bool)
        unit, scale = self.scaled()
        return unit._excludes(b / scale, failure_probability)

    def _excludes(self, b: Tensor, failure_probability: float | Tensor) -> Tensor:
        present = ~self.roots.isnan()
        top = self.roots.masked_fill(~present, -torch.inf).amax(1)
        is_open = ~self.open_diagonal.isnan()
        log_b, log_alpha = b.clamp_min(_TINY).log(), self.open_diagonal.nan_to_num(1.0).clamp_min(_TINY).log()
        # log |p_q(b)|, with beta_q = sqrt(b alpha_q) where it is not known
        factors = (b[:, None] - self.roots.nan_to_num(0.0)).clamp_min(_TINY).log() * present
        log_p = factors.sum(1) - self.log_norms - torch.where(is_open, 0.5 * (log_b + log_alpha), 0.0)
        is_large = log_p >= -least_component(failure_probability, self.num_outputs).log()
        is_empty = is_open & (self.open_diagonal <= 0) & (present.sum(1) == 1)
        return (b >= top) & (is_large | is_empty) & present.any(1)

    def bound(self, failure_probability: float | Tensor) -> Tensor:
        """Return :math:`b` ``(B,)`` in double precision; infinite where no step was taken.

        Args:
            failure_probability: One number, or one per example ``(B,)``.

        Returns:
            ``(B,)``.
        """
        if self.roots.shape[1] == 0:
            return self.log_norms.new_full(self.log_norms.shape, torch.inf)
        unit, scale = self.scaled()
        return unit._bound(failure_probability) * scale

    def _bound(self, failure_probability: float | Tensor) -> Tensor:
        present = ~self.roots.isnan()
        count = present.sum(1)
        top = self.roots.masked_fill(~present, -torch.inf).amax(1).clamp_min(0)
        # log of prod (b - r_j) at which p_q(b) = 1 / c
        target = self.log_norms - least_component(failure_probability, self.num_outputs).log()
        is_open = ~self.open_diagonal.isnan()
        log_alpha = self.open_diagonal.nan_to_num(1.0).clamp_min(_TINY).log()

        def excess(log_step: Tensor) -> Tensor:
            b = top + log_step.exp()
            factors = (b[:, None] - self.roots.nan_to_num(0.0)).clamp_min(_TINY).log()
            half = torch.where(is_open, 0.5 * (b.clamp_min(_TINY).log() + log_alpha), 0.0)
            return (factors * present).sum(1) - half - target

        target = target.clamp_min(-1e4)  # an empty complement has beta = 0
        step = _root(excess, _largest_step(target, count, top, is_open, log_alpha))
        step = torch.where(step < _NO_STEP, 0.0, step.exp())
        return torch.where(count == 0, torch.inf, top + step)


_TINY = 1e-290
_NO_STEP = -590.0  # logarithm of a step that stands for none


def least_component(failure_probability: float | Tensor, dimension: int) -> Tensor:
    r"""Return ``c`` with :math:`P(|\gamma| < c) \le` ``failure_probability`` for a component of a random unit vector.

    In double precision, of the shape of ``failure_probability``.

    The density of :math:`\gamma` is largest at zero, where it is
    :math:`\Gamma(n/2) / (\sqrt\pi\, \Gamma((n-1)/2))`, from ``n = 3`` dimensions on. With fewer the components are
    larger.
    """
    n = max(dimension, 3)
    log_density = math.lgamma(n / 2) - math.lgamma((n - 1) / 2) - 0.5 * math.log(math.pi)
    return (0.5 * torch.as_tensor(failure_probability, dtype=torch.float64) / math.exp(log_density)).clamp_max(1.0)


def largest_allowed(values: Tensor, couplings: Tensor, limit: Tensor) -> Tensor:
    r"""Return the largest :math:`b` ``(B,)`` with :math:`\lambda_\max(M) \le t`; negative where there is none.

    By the Schur complement of M, :math:`b \le t - \sum_i \kappa_i^2 / (t - \theta_i)` for :math:`t > \theta_1`.

    Args:
        values: :math:`\theta_i`, ``(B, m)``, descending.
        couplings: :math:`\kappa_i`, ``(B, m)``; infinite where not known, so that :math:`\kappa_i^2 = \theta_i b`.
        limit: :math:`t`, ``(B,)``.
    """
    room = limit[:, None] - values
    is_known = torch.isfinite(couplings)
    per_room = torch.where(is_known, couplings.square(), values) / room.clamp_min(_TINY)
    known = torch.where(is_known, per_room, 0.0).sum(1)
    unknown = torch.where(is_known, 0.0, per_room).sum(1)
    largest = (limit - known) / (1 + unknown)
    # F = 0 leaves room for nothing but zero
    return torch.where(room[:, 0] > 0, largest, torch.where(values[:, 0] == 0, 0.0, -1.0))


def majorant(values: Tensor, couplings: Tensor, beyond: Tensor) -> Tensor:
    r"""Return :math:`\lambda_\max(M)` ``(B,)`` of the module's formula, in double precision.

    Args:
        values: :math:`\theta_i`, ``(B, m)``, descending.
        couplings: :math:`\kappa_i`, ``(B, m)``; infinite where not known.
        beyond: :math:`b`, ``(B,)``; infinite gives infinity.
    """
    theta, kappa, b = values.double(), couplings.double(), beyond.double()
    is_known = torch.isfinite(b) & torch.isfinite(theta).all(1)
    scale = torch.maximum(theta[:, 0], b).clamp_min(_TINY)
    theta, b = torch.where(is_known[:, None], theta / scale[:, None], 0.0), torch.where(is_known, b / scale, 0.0)
    kappa = torch.minimum(kappa / scale[:, None], (theta * b[:, None]).sqrt())  # G is positive semidefinite
    size = theta.shape[1]
    arrow = torch.diag_embed(torch.cat([theta, b[:, None]], 1))
    arrow[:, :size, size] = arrow[:, size, :size] = kappa
    top = symmetric_eigen(arrow)[0][:, -1]
    return torch.where(is_known, torch.maximum(top, theta[:, 0]) * scale, torch.inf)


def check_probability(name: str, probability: float) -> None:
    """Refuse what is not a probability of failure.

    Raises:
        ValueError: If it does not lie strictly between 0 and 1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {probability}.")


def _largest_step(target: Tensor, count: Tensor, top: Tensor, is_open: Tensor, log_alpha: Tensor) -> Tensor:
    """Return the logarithm of a step beyond the largest root that is certainly large enough."""
    num_roots = count.clamp_min(1)
    # prod (b - r_j) >= step^q; and sqrt(b alpha) <= sqrt(top alpha) + sqrt(step alpha), each at most half of the rest
    from_top = (target + math.log(2) + 0.5 * (top.clamp_min(_TINY).log() + log_alpha)) / num_roots
    from_step = (target + math.log(2) + 0.5 * log_alpha) / (num_roots - 0.5)
    closed = target / num_roots
    return torch.where(is_open, torch.maximum(from_top, from_step), closed).clamp(-600.0, 600.0)


def _root(increasing: Callable[[Tensor], Tensor], upper: Tensor) -> Tensor:
    """Bisect on the logarithm, from far below ``upper``; what is returned is never below the root."""
    lower = upper - 80.0
    for _ in range(60):
        middle = 0.5 * (lower + upper)
        is_above = increasing(middle) >= 0
        lower, upper = torch.where(is_above, lower, middle), torch.where(is_above, middle, upper)
    return upper
