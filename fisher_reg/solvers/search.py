r"""Rayleigh-Ritz on a growing space of outputs, followed by a random probe of what the space leaves out.

All solvers search on the output side, which is small: :math:`G = A A^\top` has the eigenvalues of F. For orthonormal
:math:`u_1 \dots u_m` the rows :math:`r_i = A^\top u_i` are backward passes; :math:`r_i^\top r_j` is the projection of
:math:`G` on the search space, and needs no derivative but these. A forward-mode pass only says where to search next and
how large the residual is, so that it may be a difference quotient: the component of its result inside the search space
is known exactly from the rows, which measures its error.

Each example goes through two phases. It *settles*: the space grows by the residual of the best Ritz vector until the
residual is small. Then it *probes*: Lanczos steps from a random vector outside the space bound what may be there (see
:mod:`fisher_reg.solvers.interval`). If the probe finds a larger Ritz value, or has nothing left to search without an
answer, the example settles again from the best vector of all, and gets a new random vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_reg.sampling import fixed_generator, normal
from fisher_reg.solvers.interval import RandomProbe, largest_allowed
from fisher_reg.solvers.linalg import (
    beyond_rank,
    check_finite,
    outside,
    symmetric_eigen,
    unit,
)
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.result import EigenResult, Solver, concatenate, part
from fisher_reg.solvers.space import Ritz, Space


@dataclass(frozen=True)
class Plan:
    """When a search stops.

    Attributes:
        solver: Whose search it is.
        num_steps: Largest number of vectors that are added to the starts.
        rtol: Residual, relative to the eigenvalue, at which an example has settled.
        tolerance: Relative width of the interval at which it has converged.
        failure_probability: Of that interval.
        is_exact: Whether every product is an exact derivative.
        num_eigenpairs: How many eigenpairs.
        grows: Whether an example that has not settled may grow its space.
    """

    solver: Solver
    num_steps: int
    rtol: float
    tolerance: float
    failure_probability: float
    is_exact: bool = False
    num_eigenpairs: int = 1
    grows: bool = True

    @property
    def trusted(self) -> float:
        """Error of a difference quotient, relative to the result, above which the exact derivative is taken."""
        return 0.0 if self.is_exact or self.rtol < _LEAST_QUOTIENT_RTOL else min(_TRUSTED, self.rtol / 4)


def search(
    operator: FactoredOperator, starts: Tensor, plan: Plan, generator: torch.Generator | None = None
) -> EigenResult:
    """Search from ``starts`` ``(B, n, K)``; the fields of the result have an axis of eigenpairs."""
    return _Search(operator, starts, plan, generator).run()


class _Search:
    """The examples of a batch that are still searched."""

    def __init__(
        self, operator: FactoredOperator, starts: Tensor, plan: Plan, generator: torch.Generator | None
    ) -> None:
        if generator is None:
            generator = fixed_generator(starts.device, _SEED)
        self.operator, self.plan = operator, plan
        # the same random vectors for all examples, so that none depends on the others in the batch
        self.random = normal(starts.new_empty(_MAX_PROBES, starts.shape[2]), generator)
        nothing = starts.new_empty(len(starts), 0, 0)
        self.space = Space(starts[:, :0], nothing, nothing.double()).extended(operator, starts)
        self.num_matvecs = starts.shape[1]
        self.num_steps = 0
        self.index = torch.arange(len(starts), device=starts.device)
        self.is_done = torch.zeros_like(self.index, dtype=torch.bool)
        self.begin = torch.full_like(self.index, _SETTLING)  # number of columns before those of the probe
        self.num_probes = torch.zeros_like(self.index)
        self.log_norms = starts.double().new_zeros(len(starts))  # sum_j log beta_j
        self.rounding = torch.zeros_like(self.log_norms)  # of exact derivatives
        self.disagreement = torch.zeros_like(self.log_norms)  # of all products with A
        self.residual = torch.zeros_like(self.log_norms)[:, None].expand(-1, plan.num_eigenpairs)
        self.is_krylov = torch.full_like(self.is_done, starts.shape[1] == 1)
        self.settled = self.space.ritz(plan.num_eigenpairs)  # of the search space, without the columns of the probe
        self.roots = self._probe_roots()
        self.found: list[tuple[Tensor, EigenResult]] = []

    def run(self) -> EigenResult:
        """Alternate products with ``A`` and with its transpose until every example has stopped."""
        while not self._all_done():
            vectors = self._apply()
            if not self._all_done():
                self.space = self.space.extended(self.operator, vectors)
                self.num_matvecs += vectors.shape[1]
                self.num_steps += 1
                self.roots = self._probe_roots()
                self._finish(self._is_certified(is_open=True), is_open=True, is_certified=True)
                self._drop_done()
        order = torch.cat([indices for indices, _ in self.found]).argsort()
        joined = part(concatenate([result for _, result in self.found]), order)
        return replace(joined, num_matvecs=self.num_matvecs)

    def _apply(self) -> Tensor:
        """Apply ``A`` once per pair; return the vectors to add, ``(B, k, K)``."""
        settles, count = self.begin == _SETTLING, self.plan.num_eigenpairs
        ritz = self.space.ritz(count)
        last = torch.zeros_like(ritz.left), torch.zeros_like(ritz.row)
        last[0][:, 0], last[1][:, 0] = self.space.left[:, -count], self.space.rows[:, -count]
        left = torch.where(settles[:, None, None], ritz.left, last[0])
        rows = torch.where(settles[:, None, None], ritz.row, last[1])
        beyond, distance = self._products(left, rows)
        length = rows.double().norm(dim=2)
        # |G u - theta u| = sqrt(theta) |(1 - W W') A v|, and beta_q = sqrt(alpha_q) |(1 - W W') A v_q|
        norms = length * distance
        exhausted = distance <= 100 * torch.finfo(left.dtype).eps * length
        self._settle(settles, ritz, norms, exhausted)
        vectors = torch.where((self.begin == self.space.left.shape[1])[:, None, None], self._drawn(beyond), beyond)
        return self._probe(~settles, ritz, norms[:, 0], exhausted[:, 0], vectors)

    def _settle(self, settles: Tensor, ritz: Ritz, residual: Tensor, exhausted: Tensor) -> None:
        """Keep the Ritz vectors of those that settle; where their residuals are small, a probe begins."""
        self.settled = ritz.where(settles, self.settled)
        self.residual = torch.where(settles[:, None], residual, self.residual)
        is_zero = beyond_rank(self.settled.value, self._eta(), self.space.left.shape[2])
        small = settles & ((residual <= self.plan.rtol * ritz.value) | exhausted | is_zero).all(1)
        draws = small & (self.num_probes < _MAX_PROBES) & (not self._is_last())
        may_grow = (self.num_probes > 0) | self.plan.grows
        self._finish(settles & ~draws & (small | self._is_last() | ~may_grow))
        self.begin = torch.where(draws, self.space.left.shape[1], self.begin)
        self.log_norms = torch.where(draws, 0.0, self.log_norms)
        self.num_probes = self.num_probes + draws

    def _drawn(self, like: Tensor) -> Tensor:
        """Return the random vector of the probe of each example, ``(B, k, K)``."""
        drawn = torch.zeros_like(like)
        drawn[:, 0] = self.random[(self.num_probes - 1).clamp(0, _MAX_PROBES - 1)]
        return drawn

    def _probe(self, probes: Tensor, ritz: Ritz, beta: Tensor, exhausted: Tensor, vectors: Tensor) -> Tensor:
        """Take in the last off-diagonal of those that probe; stop, go on, or settle again."""
        self.log_norms = torch.where(probes, self.log_norms + beta.clamp_min(_TINY).log(), self.log_norms)
        self._finish(probes & self._is_certified(is_open=False), is_certified=True)
        value = self.settled.value
        is_larger = (ritz.value > (1 + 0.5 * self.plan.tolerance) * value + _NEGLIGIBLE * value[:, :1]).any(1)
        if self._is_last():
            self._take_best(probes & is_larger & ~self.is_done, ritz)
            self._finish(probes)
        again = probes & (is_larger | exhausted) & ~self.is_done
        self.begin = torch.where(again, _SETTLING, self.begin)
        if self.plan.num_eigenpairs > 1:  # all vectors become the search space
            return vectors
        self.is_krylov = self.is_krylov | again
        self.space = self.space.cleared(again)
        return torch.where(again[:, None, None], ritz.left, vectors)

    def _take_best(self, better: Tensor, ritz: Ritz) -> None:
        """Take the best vectors of space and probe together where there is no pass left for their residuals."""
        self.settled = ritz.where(better, self.settled)
        self.residual = torch.where(better[:, None], torch.inf, self.residual)
        self.begin = torch.where(better, _SETTLING, self.begin)

    def _products(self, left: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parts of ``A v`` outside the space ``(B, k, K)``, and their lengths with the error ``(B, k)``."""
        beyond, distances = [], []
        for u, row in zip(left.unbind(1), rows.unbind(1), strict=True):
            image, error = self._image(u, row)
            rest = outside(image, self.space.left)
            beyond.append(rest)
            distances.append(rest.double().norm(dim=1) + error)
        return torch.stack(beyond, 1), torch.stack(distances, 1)

    def _image(self, u: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``A v`` for ``v = Aᵀ u / |Aᵀ u|`` and its error in the space ``(B,)``.

        It is a difference quotient where its error is small enough.
        """
        v, trusted = unit(row), self.plan.trusted
        known = (self.space.rows @ v[:, :, None]).squeeze(2)
        # squares below the square root of the smallest number underflow
        length = known.norm(dim=1).clamp_min(10 * torch.finfo(known.dtype).tiny ** 0.5)
        image = self.operator.apply(v, exact=trusted == 0, slope=self.operator.slope_along(u, row))
        self.num_matvecs += 1
        is_exact = torch.full_like(self.is_done, trusted == 0)
        wrong = ~is_exact & ~self.is_done & ~(_disagreement(self.space, image, known) <= trusted * length)
        if bool(wrong.any()):
            image = self._replaced(image, v, wrong)
            is_exact = is_exact | wrong
        check_finite(image)
        error = _disagreement(self.space, image, known)
        self._check_transposes(u, row, v, image, (error > 2 * _TRUSTED * length) & ~self.is_done)
        num_outputs, num_vectors = self.space.left.shape[2], self.space.left.shape[1]
        norm = (4 * error * (num_outputs / num_vectors) ** 0.5).double()
        self.disagreement = torch.maximum(self.disagreement, norm)
        self.rounding = torch.where(is_exact, torch.maximum(self.rounding, norm), self.rounding)
        return image, error.double()

    def _replaced(self, image: Tensor, v: Tensor, wrong: Tensor) -> Tensor:
        """Take the exact derivative where ``wrong``."""
        some = self.operator.restrict(wrong)
        self.num_matvecs += 1
        if some is None:
            return torch.where(wrong[:, None], self.operator.apply(v, exact=True), image)
        return image.index_put((wrong,), some.apply(v[wrong], exact=True))

    def _check_transposes(self, u: Tensor, row: Tensor, v: Tensor, image: Tensor, suspicious: Tensor) -> None:
        """Refuse an ``apply`` that is not the transpose of ``adjoint``, unless rounding explains the difference.

        Products of twice the vector round alike and tell whether ``apply`` is linear; those of odd multiples round
        differently and show the rounding.

        Raises:
            ValueError: If it is not.
        """
        if not bool(suspicious.any()):
            return
        once, twice = (self.operator.apply(c * v, exact=True) / c for c in (1, 2))
        noise = torch.zeros_like(once[:, 0])
        for c in _FACTORS:
            by_adjoint = (self.operator.adjoint(c * u) / c - row).norm(dim=1)
            noise = torch.maximum(noise, by_adjoint + (self.operator.apply(c * v, exact=True) / c - once).norm(dim=1))
        self.num_matvecs += 2 + 2 * len(_FACTORS)
        is_linear = (twice - once).norm(dim=1) <= 1e-3 * once.norm(dim=1)
        error = _disagreement(self.space, image, (self.space.rows @ v[:, :, None]).squeeze(2))
        if bool((suspicious & ~(is_linear & (error <= 100 * noise))).any()):
            raise ValueError(_NO_TRANSPOSES)

    def _couplings(self) -> Tensor:
        """Return how far ``G`` takes each Ritz vector out of the search space ``(B, m)``, infinite where not known."""
        last = self.settled.along_last
        # all of it goes along one vector: kappa_i / kappa_1 = |s_mi| / |s_m1|
        krylov = self.residual[:, :1] * last / last[:, :1].clamp_min(_TINY)
        unknown = torch.full_like(krylov, torch.inf)
        kappa = torch.where(self.is_krylov[:, None] & krylov.isfinite(), krylov, unknown)
        return torch.cat([self.residual, kappa[:, self.residual.shape[1] :]], 1)

    def _probe_roots(self) -> Tensor:
        """Return the Ritz values of the columns of the probe ``(B, m)``; NaN where there are fewer."""
        columns = torch.arange(self.space.left.shape[1], device=self.begin.device)
        in_probe = (self.begin != _SETTLING)[:, None] & (columns >= self.begin[:, None])
        # an exhausted column adds no root, but the first one, which says that nothing is left
        is_zero = (self.space.left == 0).all(2) & (columns != self.begin[:, None])
        in_probe = in_probe & ~is_zero
        chosen = self.space.gram * in_probe[:, :, None] * in_probe[:, None]
        scale = chosen.diagonal(dim1=1, dim2=2).amax(1).clamp_min(_TINY)[:, None]
        outside_probe = torch.diag_embed((~in_probe).to(chosen))  # eigenvalues of -1 mark them
        roots = symmetric_eigen(chosen / scale[:, :, None] - outside_probe)[0].flip(1)
        return torch.where(roots < -0.5, torch.nan, roots.clamp_min(0) * scale)

    def _random_probe(self, is_open: bool) -> RandomProbe:
        last = self.space.gram[:, -self.plan.num_eigenpairs, -self.plan.num_eigenpairs]
        return RandomProbe(
            roots=torch.where((self.begin == _SETTLING)[:, None], torch.nan, self.roots),
            log_norms=self.log_norms,
            open_diagonal=last if is_open else torch.full_like(last, torch.nan),
            num_outputs=self.space.left.shape[2],
        )

    def _is_certified(self, is_open: bool) -> Tensor:
        """Say whose interval is narrow enough, among those that probe."""
        plan, value = self.plan, self.settled.value
        if plan.num_eigenpairs == 1:
            eta, lower = self._eta(), value[:, 0].sqrt()
            # the largest upper end, of which (sqrt(t) + eta)^2 is at most 1 + tolerance times the lower end
            limit = ((1 + plan.tolerance) ** 0.5 * (lower - eta) - eta).clamp_min(0).square()
            allowed = largest_allowed(self.settled.all_values, self._couplings(), limit)
        else:  # nothing outside the space is larger than the last pair
            allowed = (1 + plan.tolerance) * value.amin(1) + _NEGLIGIBLE * value[:, 0]
        narrow = self._random_probe(is_open).excludes(
            allowed, plan.failure_probability * 0.5 ** self.num_probes.double()
        )
        return narrow & (self.begin != _SETTLING) & ~self.is_done

    def _eta(self) -> Tensor:
        return self.rounding + 4 * torch.finfo(self.space.rows.dtype).eps * self.settled.value[:, 0].sqrt()

    def _is_last(self) -> bool:
        return self.num_steps >= self.plan.num_steps

    def _all_done(self) -> bool:
        return bool(self.is_done.all())

    def _finish(self, done: Tensor, *, is_open: bool = False, is_certified: bool = False) -> None:
        """Keep the results of ``done``; they have converged if their intervals are narrow enough."""
        done = done & ~self.is_done
        if not bool(done.any()):
            return
        best, dtype = self.settled, self.space.rows.dtype
        is_zero = beyond_rank(best.value, self._eta(), self.space.left.shape[2])
        small = (self.residual <= self.plan.rtol * best.value) | (self.residual == 0) | is_zero
        value = best.value.masked_fill(is_zero, 0.0).to(dtype)
        # a positive eigenvalue that the precision cannot hold
        in_range = torch.isfinite(value) & ((value > 0) | is_zero)
        probe = self._random_probe(is_open)
        result = EigenResult(
            eigenvalue=value,
            eigenvector=unit(best.row).masked_fill(is_zero[:, :, None], 0.0),
            left_singular_vector=best.left,
            residual=self.residual.to(dtype),
            converged=small & in_range & is_certified,
            ritz_values=best.all_values.to(dtype),
            couplings=self._couplings().to(dtype),
            num_steps=torch.full_like(self.index, self.num_steps),
            num_matvecs=0,
            solver=self.plan.solver,
            residual_is_exact=self.plan.trusted == 0,
            rounding=torch.maximum(self._eta(), self.disagreement).to(dtype),
            probe=probe,
            num_probes=self.num_probes,
            search_space=self.space.left,
        )
        self.found.append((self.index[done], part(result, done)))
        self.is_done = self.is_done | done

    def _drop_done(self) -> None:
        keep = ~self.is_done
        share = float(keep.float().mean())
        if not 0 < share <= _WORTH_A_FORWARD or (smaller := self.operator.restrict(keep)) is None:
            return
        self.operator, self.space, self.settled = smaller, self.space.part(keep), self.settled.part(keep)
        for name in (
            "index",
            "is_done",
            "begin",
            "num_probes",
            "log_norms",
            "rounding",
            "disagreement",
            "residual",
            "is_krylov",
            "roots",
        ):
            setattr(self, name, getattr(self, name)[keep])


def _disagreement(space: Space, image: Tensor, known: Tensor) -> Tensor:
    error: Tensor = ((space.left @ image[:, :, None]).squeeze(2) - known).norm(dim=1)
    return error


_SETTLING = -1
_FACTORS = (3, 5, 7, 11)
_SEED = 7919_2026_0001  # a network that was seeded with a small number has other random numbers
_MAX_PROBES = 4
"""Random vectors that an example may use before it gives up."""

_WORTH_A_FORWARD = 2 / 3
"""Share of the batch up to which a new forward on it costs less than passing the rest through one more step."""

_TRUSTED = 0.05
_LEAST_QUOTIENT_RTOL = 1e-2  # below it the error of a difference quotient, about 1e-3, is no longer small
_NEGLIGIBLE = 1e-6
_TINY = 1e-290

_NO_TRANSPOSES = (
    "apply and adjoint are not transposes of each other. A model does that if its forward is random, if a part of it "
    "runs under torch.no_grad(), which forward-mode passes do not respect (use detach() there), or if a custom "
    "autograd.Function has a wrong derivative or none of second order (@once_differentiable)."
)
