r"""Upper bounds of the largest eigenvalue, computed from the Lanczos recurrence of a search.

The search takes Lanczos steps with :math:`G = A A^\top`, which has the nonzero eigenvalues of F, from the unit vector

.. math:: u_1 = \sqrt{1 - \sigma^2}\, c + \sigma w ,

with a guess :math:`c` and a uniformly random unit vector :math:`w \perp c`. Let :math:`p_m` be the Lanczos polynomial,
so that :math:`u_{m+1} = p_m(G) u_1` has unit length, and :math:`\gamma` the component of :math:`u_1` along the top
eigenvector. Then :math:`|\gamma\, p_m(\lambda)| \le 1`. Let :math:`f` be the largest density of a component of
:math:`w`. If :math:`w` has four dimensions or more, :math:`P(|\gamma| < \sigma h) \le 2 h f` for every guess: if
:math:`c` has the component :math:`a` along the eigenvector, the component of :math:`w` is at most
:math:`\sqrt{1 - a^2}`, and the density of their sum at zero, :math:`f (1 - 2 a^2)^{(n-3)/2} (1 - a^2)^{-(n-2)/2}`,
grows with :math:`a` only in three dimensions. Beyond its largest root :math:`p_m` increases. Hence
:math:`\lambda \le b` with :math:`p_m(b) = 1 / (\sigma h)`, except with probability :math:`2 h f`.

For the top Ritz vector with coordinates :math:`s` and residual :math:`\rho`, and Ritz values :math:`\theta_i`, this is

.. math:: b - \theta_1 = \frac{|s_1| \rho}{\sigma h} \prod_{i > 1} \frac{\theta_1 - \theta_i}{b - \theta_i} :

the smaller the residual, the tighter the bound. If the last step has no product with :math:`A` yet, its off-diagonal
is only bounded: :math:`\beta_m^2 \le b\, \alpha_m - \|H_m\|^2`, with the last column :math:`H_m` of the projection of
G, since :math:`\|G u\|^2 \le \lambda\, u^\top G u`.

If the trace of F is known, it gives a deterministic bound. Let :math:`\kappa_i` be the norm of the component of
:math:`G y_i` outside the search space, for the i-th Ritz vector :math:`y_i`, and :math:`b` the trace minus the sum of
all Ritz values. Then

.. math:: \lambda_\max(G) \le \lambda_\max(M), \qquad
          M = \begin{pmatrix} \theta_1 & & & \kappa_1 \\ & \ddots & & \vdots \\ & & \theta_m & \kappa_m \\
                              \kappa_1 & \cdots & \kappa_m & b \end{pmatrix} .

Where :math:`\kappa_i` is not known, it is replaced by :math:`\sqrt{\theta_i b}`, an upper bound for every positive
semidefinite matrix. In a Krylov space :math:`\kappa_i = \beta_m |s_{mi}|`.

References: van Dorsselaer, Hochstenbach, van der Vorst (2000), "Computing probabilistic bounds for extreme eigenvalues
of symmetric matrices with the Lanczos method"; Hochstenbach (2013), "Probabilistic upper bounds for the matrix
two-norm"; Kuczynski, Wozniakowski (1992), "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
random start". All three start from a purely random vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_reg.printing import examples, short_repr, spread, table
from fisher_reg.solvers.linalg import cat_padded, symmetric_eigen


@dataclass(frozen=True)
class Interval:
    """``lower <= λ <= upper`` per example, except with probability ``failure_probability``; zero means certain.

    Attributes:
        lower: ``(B,)``.
        upper: ``(B,)``; infinite where there is no bound.
        failure_probability: Per example, over the draw of the random vector.
    """

    lower: Tensor
    upper: Tensor
    failure_probability: float

    def __repr__(self) -> str:
        return (
            f"Interval({examples(len(self.lower))}: lower {spread(self.lower)}; upper {spread(self.upper)}; "
            f"failure_probability={self.failure_probability:g})"
        )

    def __str__(self) -> str:
        columns = {"lower": self.lower, "upper": self.upper, "relative width": self.relative_width}
        return table("lower <= λ <= upper", columns, self.certainty)

    @property
    def certainty(self) -> str:
        """How certain ``upper`` is, in words."""
        if self.failure_probability == 0:
            return "certain up to round-off"
        return f"except with probability {self.failure_probability:g} for each example"

    @property
    def relative_width(self) -> Tensor:
        """``upper / lower - 1``, ``(B,)``: zero where both are zero, infinite where only ``lower`` is zero."""
        width = self.upper / self.lower - 1
        return torch.where(self.upper == 0, 0.0, torch.where(self.lower == 0, torch.inf, width))


@dataclass(frozen=True)
class RandomStart:
    r"""Lanczos steps from a start with a random part. All tensors are on the CPU, in double precision.

    Attributes:
        roots: ``(B, m)``, the roots of :math:`p_m`, which are the Ritz values; NaN where there are fewer.
        log_norms: ``(B,)``, :math:`\sum_j \log \beta_j` over the known off-diagonals: :math:`p_m(\lambda) =
            \prod_j (\lambda - r_j) / \beta_j`.
        open_diagonal: ``(B,)``, the last diagonal :math:`\alpha_m` if :math:`\beta_m` was not computed; else NaN.
        open_offset: ``(B,)``, then :math:`\|H_m\|^2 / \alpha_m`, at most the largest root: :math:`\beta_m^2 \le
            \alpha_m (\lambda - \text{offset})`.
        dimension: Dimension of the space from which :math:`w` was drawn, at least 4.
        share: :math:`\sigma`, the length of the random part.
    """

    roots: Tensor
    log_norms: Tensor
    open_diagonal: Tensor
    open_offset: Tensor
    dimension: int
    share: float = 1.0

    __repr__ = short_repr

    @classmethod
    def none(cls, count: int) -> RandomStart:
        """Return an empty record for ``count`` examples: the bound is infinite."""
        nothing = torch.zeros(count, 0, dtype=torch.float64)
        return cls(nothing, nothing.sum(1), nothing.sum(1) * torch.nan, nothing.sum(1), 4)

    @classmethod
    def nothing_left(cls, roots: Tensor) -> RandomStart:
        """Return the record of a search of the whole output space: the largest of ``roots`` ``(B, K)`` is the bound."""
        known = roots.detach().cpu().double()
        ended = torch.full_like(known[:, 0], -torch.inf)
        return cls(known, ended, torch.full_like(ended, torch.nan), torch.zeros_like(ended), 4)

    @property
    def is_certain(self) -> bool:
        """Whether every search covered the whole output space, so that the bound holds with certainty."""
        return self.roots.shape[1] > 0 and bool((self.log_norms == -torch.inf).all())

    @classmethod
    def joined(cls, parts: list[RandomStart]) -> RandomStart:
        """Concatenate the records of parts of a batch; all parts have the same dimension and share."""
        return cls(
            roots=cat_padded([one.roots for one in parts], torch.nan),
            log_norms=torch.cat([one.log_norms for one in parts]),
            open_diagonal=torch.cat([one.open_diagonal for one in parts]),
            open_offset=torch.cat([one.open_offset for one in parts]),
            dimension=parts[0].dimension,
            share=parts[0].share,
        )

    def part(self, index: Tensor) -> RandomStart:
        """Return the record of the examples at ``index``."""
        names = ("roots", "log_norms", "open_diagonal", "open_offset")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def scaled(self) -> tuple[RandomStart, Tensor]:
        """Return the recurrence with all numbers divided by ``s`` ``(B,)``, and ``s``, about its largest eigenvalue."""
        largest = self.roots.nan_to_num(0.0).amax(1)
        scale = torch.where(largest > 0, largest, 1.0)
        num_norms = (~self.roots.isnan()).sum(1) - (~self.open_diagonal.isnan()).long()
        return replace(
            self,
            roots=self.roots / scale[:, None],
            log_norms=self.log_norms - num_norms * scale.log(),
            open_diagonal=self.open_diagonal / scale,
            open_offset=self.open_offset / scale,
        ), scale

    def excludes(self, b: Tensor, failure_probability: float) -> Tensor:
        """Return where no eigenvalue exceeds ``b`` ``(B,)``: where :meth:`bound` is at most ``b``."""
        if self.roots.shape[1] == 0:
            return torch.zeros_like(b, dtype=torch.bool)
        unit, scale = self.scaled()
        return unit._excludes(b / scale, failure_probability)

    def _excludes(self, b: Tensor, failure_probability: float) -> Tensor:
        present = ~self.roots.isnan()
        top = self.roots.masked_fill(~present, -torch.inf).amax(1)
        # log p_m(b) = sum_j log(b - r_j) - sum_j log beta_j
        log_p = self._log_factors(b[:, None] - self.roots) - self.log_norms - self._log_open(b)
        is_large = log_p >= -self._least_component(failure_probability).log()  # p_m(b) >= 1 / (sigma h)
        return (b >= top) & (is_large | self._is_zero()) & present.any(1)

    def bound(self, failure_probability: float) -> Tensor:
        """Return :math:`b` ``(B,)``; infinite where no step was taken."""
        if self.roots.shape[1] == 0:
            return self.log_norms.new_full(self.log_norms.shape, torch.inf)
        unit, scale = self.scaled()
        return torch.where(self._is_zero(), 0.0, unit._bound(failure_probability) * scale)

    def _bound(self, failure_probability: float) -> Tensor:
        present = ~self.roots.isnan()
        count = present.sum(1)
        top = self.roots.masked_fill(~present, -torch.inf).amax(1).clamp_min(0)
        # p_m(b) = 1 / (sigma h) where log prod_j (b - r_j) = log prod_j beta_j - log(sigma h); -inf if a beta_j is 0
        target = (self.log_norms - self._least_component(failure_probability).log()).clamp_min(-1e4)

        def excess(log_step: Tensor) -> Tensor:
            # b - r_j = (theta_1 - r_j) + step: rounding b = theta_1 + step first would lose a small step
            step = log_step.exp()
            return self._log_factors(top[:, None] - self.roots + step[:, None]) - self._log_open(top, step) - target

        step = _root(excess, _largest_step(target, count, top, self._is_open(), self._log_diagonal()))
        step = torch.where(step < _NO_STEP, 0.0, step.exp())
        return torch.where(count == 0, torch.inf, top + step)

    def _log_factors(self, differences: Tensor) -> Tensor:
        present = ~self.roots.isnan()
        return torch.where(present, differences.nan_to_num(1.0).clamp_min(_TINY).log(), 0.0).sum(1)

    def _log_open(self, b: Tensor, step: Tensor | float = 0.0) -> Tensor:
        """Return the log of the largest possible ``beta_m`` for an eigenvalue ``b + step``; 0 if it is known."""
        # log beta_m <= (log(b + step - offset) + log alpha_m) / 2
        room = ((b - self.open_offset).clamp_min(0) + step).clamp_min(_TINY)
        return torch.where(self._is_open(), 0.5 * (room.log() + self._log_diagonal()), 0.0)

    def _log_diagonal(self) -> Tensor:
        return self.open_diagonal.nan_to_num(1.0).clamp_min(_TINY).log()

    def _is_open(self) -> Tensor:
        return ~self.open_diagonal.isnan()

    def _is_zero(self) -> Tensor:
        """Return where the matrix maps the random start to zero: such a matrix is zero almost surely."""
        return self._is_open() & (self.open_diagonal <= 0) & ((~self.roots.isnan()).sum(1) == 1)

    def _least_component(self, failure_probability: float) -> Tensor:
        return self.share * least_component(failure_probability, self.dimension)  # sigma h


_TINY = 1e-290
_NO_STEP = -590.0  # logarithm of a step that is taken as zero


def least_component(failure_probability: float, dimension: int) -> Tensor:
    r"""Return ``h`` with :math:`P(|\gamma - g| < h) \le` ``failure_probability`` for every number ``g``.

    :math:`\gamma` is a component of a uniformly random unit vector. Its density is largest at zero, where it is
    :math:`\Gamma(n/2) / (\sqrt\pi\, \Gamma((n-1)/2))`, from ``n = 3`` dimensions on.

    Args:
        failure_probability: Between 0 and 1.
        dimension: ``n``, at least 3; with fewer the density has no bound.

    Returns:
        A number in double precision.
    """
    n = dimension
    log_density = math.lgamma(n / 2) - math.lgamma((n - 1) / 2) - 0.5 * math.log(math.pi)  # log f
    # h = failure_probability / (2 f)
    return torch.tensor(0.5 * failure_probability / math.exp(log_density), dtype=torch.float64).clamp_max(1.0)


def majorant(values: Tensor, couplings: Tensor, beyond: Tensor) -> Tensor:
    r"""Return :math:`\lambda_\max(M)` ``(B,)`` of the arrowhead matrix above, in double precision.

    Args:
        values: :math:`\theta_i`, ``(B, m)``, descending.
        couplings: :math:`\kappa_i`, ``(B, m)``; infinite where not known.
        beyond: :math:`b`, ``(B,)``; infinite gives infinity.
    """
    theta, kappa, b = values.double(), couplings.double(), beyond.double()
    is_known = torch.isfinite(b) & torch.isfinite(theta).all(1)
    scale = torch.maximum(theta[:, 0], b).clamp_min(_TINY)
    theta, b = torch.where(is_known[:, None], theta / scale[:, None], 0.0), torch.where(is_known, b / scale, 0.0)
    kappa = torch.minimum(kappa / scale[:, None], (theta * b[:, None]).sqrt())  # kappa_i <= sqrt(theta_i b)
    size = theta.shape[1]
    # M
    arrow = torch.diag_embed(torch.cat([theta, b[:, None]], 1))
    arrow[:, :size, size] = arrow[:, size, :size] = kappa
    top = symmetric_eigen(arrow)[0][:, -1]
    return torch.where(is_known, torch.maximum(top, theta[:, 0]) * scale, torch.inf)


def check_probability(name: str, probability: float) -> None:
    """Raise an error if a failure probability is out of range.

    Raises:
        ValueError: If it does not lie strictly between 0 and 1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {probability}.")


def _largest_step(target: Tensor, count: Tensor, top: Tensor, is_open: Tensor, log_alpha: Tensor) -> Tensor:
    """Return the logarithm of a step beyond the largest root that is not below the root of the equation."""
    num_roots = count.clamp_min(1)
    # prod (b - r_j) >= step^q, and sqrt(b alpha) <= sqrt(top alpha) + sqrt(step alpha); each summand is at most half
    from_top = (target + math.log(2) + 0.5 * (top.clamp_min(_TINY).log() + log_alpha)) / num_roots
    from_step = (target + math.log(2) + 0.5 * log_alpha) / (num_roots - 0.5)
    closed = target / num_roots
    return torch.where(is_open, torch.maximum(from_top, from_step), closed).clamp(-600.0, 600.0)


def _root(increasing: Callable[[Tensor], Tensor], upper: Tensor) -> Tensor:
    """Find the root by bisection between ``upper - 80`` and ``upper``; the returned value is never below the root."""
    lower = upper - 80.0
    for _ in range(60):
        middle = 0.5 * (lower + upper)
        is_above = increasing(middle) >= 0
        lower, upper = torch.where(is_above, lower, middle), torch.where(is_above, middle, upper)
    return upper
