r"""Lanczos steps of :math:`G = A A^\top` from a start that is a guess in one half and random in the other.

All solvers search on the output side, which is small: :math:`G` has the eigenvalues of F. For orthonormal
:math:`u_1 \dots u_m` the rows :math:`r_i = A^\top u_i` are backward passes; :math:`H_{ij} = r_i^\top r_j` is the
projection of :math:`G` on the search space, and needs no derivative but these. A forward-mode pass only says where to
search next and how large the residual is, so that it may be a difference quotient: the component of its result inside
the search space is known exactly from the rows, which measures its error.

The guess makes the search fast, the random part makes it honest: an eigenvector that the guess knows nothing of is in
the random part, and the steps find it (see :mod:`fisher_reg.solvers.interval`).

The vectors stay on the device. What is decided by numbers, the projected matrix, is solved on the CPU in double
precision. A step waits for the device twice: after the product with A and after that with its transpose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_reg.sampling import fixed_generator, normal
from fisher_reg.solvers.exact import Exact
from fisher_reg.solvers.interval import RandomStart
from fisher_reg.solvers.linalg import check_finite, new_direction, outside, products, symmetric_eigen, unit
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.result import EigenResult, Solver, concatenate, part


@dataclass(frozen=True)
class Plan:
    """When a search stops.

    Attributes:
        solver: Whose search it is.
        num_steps: Largest number of vectors that are added to the start.
        rtol: Residual, relative to the eigenvalue, at which an example may stop.
        tolerance: Relative width of the interval at which it may stop.
        failure_probability: Of that interval.
        is_exact: Whether every product is an exact derivative.
    """

    solver: Solver
    num_steps: int
    rtol: float
    tolerance: float
    failure_probability: float
    is_exact: bool = False

    @property
    def trusted(self) -> float:
        """Error of a difference quotient, relative to the result, above which the exact derivative is taken."""
        return 0.0 if self.is_exact or self.rtol < _LEAST_QUOTIENT_RTOL else _TRUSTED


def search(
    operator: FactoredOperator, guess: Tensor, plan: Plan, generator: torch.Generator | None = None
) -> EigenResult:
    """Return the largest eigenpair of each operator, searched from a ``guess`` ``(B, K)``.

    With fewer outputs than a random direction can be bounded in, :class:`Exact` takes no more passes.
    """
    if guess.shape[1] < _LEAST_OUTPUTS:
        return replace(Exact().solve(operator), solver=plan.solver)
    return _Search(operator, _start(guess, generator), plan).run()


def random_source(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator, or a fixed one. Searches that follow each other need the same one, not the same numbers."""
    return fixed_generator(_SEED) if generator is None else generator


def _start(guess: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the sum of the guess and a random vector orthogonal to it, as unit vectors ``(B, K)``."""
    c = unit(guess)
    # the same random vector for all examples, so that none depends on the others in the batch
    w = normal(guess[0], random_source(generator)).expand_as(c)
    return unit(c + unit(outside(w, c[:, None])))


class _Search:
    """The examples of a batch that are still searched.

    ``left`` ``(B, m, K)`` and ``rows`` ``(B, m, d)`` are on the device, everything else on the CPU.
    """

    def __init__(self, operator: FactoredOperator, start: Tensor, plan: Plan) -> None:
        self.operator, self.plan = operator, plan
        count, self.num_outputs = start.shape
        self.left, self.rows = start[:, None, :][:, :0], start[:, None, :][:, :0]
        self.following = start  # u_{m+1}, not yet normalised
        self.index = torch.arange(count)
        self.is_done = torch.zeros(count, dtype=torch.bool)
        self.gram = torch.zeros(count, 0, 0, dtype=torch.float64)  # H
        self.log_norms = torch.zeros(count, dtype=torch.float64)  # sum_j log beta_j
        self.beta = torch.zeros_like(self.log_norms)  # beta_m
        self.is_exhausted = torch.zeros_like(self.is_done)
        self.rounding = torch.zeros_like(self.log_norms)  # of exact derivatives
        self.disagreement = torch.zeros_like(self.log_norms)  # of all products with A
        self.num_matvecs = 0
        self.found: list[tuple[Tensor, EigenResult]] = []

    def run(self) -> EigenResult:
        """Alternate products with the transpose of A and with A until every example has stopped."""
        while True:
            self._extend()
            self._finish(is_open=True)
            if self._all_done():
                break
            self._multiply()
            self._finish(is_open=False, is_last=self.left.shape[1] > self.plan.num_steps)
            if self._all_done():
                break
        order = torch.cat([indices for indices, _ in self.found]).argsort()
        joined = part(concatenate([result for _, result in self.found]), order)
        return replace(joined, num_matvecs=self.num_matvecs)

    def _extend(self) -> None:
        """Add a vector to the search space: one backward pass."""
        u = new_direction(self.following, self.left)
        row = self.operator.adjoint(u)
        self.num_matvecs += 1
        self.left = torch.cat([self.left, u[:, None]], 1)
        self.rows = torch.cat([self.rows, row[:, None]], 1) if self.rows.shape[1] else row[:, None]
        column = products(self.rows, row[:, None]).cpu()  # the wait for a backward pass
        if not bool(column.isfinite().all()):
            check_finite(row)
        self.gram = torch.cat([torch.cat([self.gram, column[:, :-1]], 2), column.mT], 1)
        values, vectors = symmetric_eigen(self.gram)
        self.theta, self.s = values.flip(1).clamp_min(0), vectors.flip(2)

    def _multiply(self) -> None:
        """Apply A to the last row: the last off-diagonal, and where to search next."""
        u, row = self.left[:, -1], self.rows[:, -1]
        v = unit(row)
        length = self.gram[:, -1, -1].clamp_min(0).sqrt()  # |r_m|
        inside = self.gram[:, -1] / length.clamp_min(_TINY)[:, None]  # W' A v = W' W A A' u_m / |r_m|
        trusted = self.plan.trusted
        image = self.operator.apply(v, exact=trusted == 0, slope=self.operator.slope_along(u, row))
        self.num_matvecs += 1
        rest, distance, error = self._compared(image, inside)
        # squares below the square root of the smallest number underflow
        size = inside.norm(dim=1).clamp_min(10 * torch.finfo(row.dtype).tiny ** 0.5)
        is_exact = torch.full_like(self.is_done, trusted == 0)
        wrong = ~is_exact & ~self.is_done & ~(error <= trusted * size)
        if bool(wrong.any()):
            rest, distance, error = self._compared(self._replaced(image, v, wrong), inside)
            is_exact = is_exact | wrong
        self._check_transposes(u, row, v, inside, (error > 2 * _TRUSTED * size) & ~self.is_done)
        norm = 4 * error * (self.num_outputs / self.left.shape[1]) ** 0.5
        self.disagreement = torch.maximum(self.disagreement, norm)
        self.rounding = torch.where(is_exact, torch.maximum(self.rounding, norm), self.rounding)
        distance = distance + error
        # beta_m = |r_m| |(1 - W W') A v|
        self.beta = length * distance
        self.is_exhausted = distance <= 100 * torch.finfo(row.dtype).eps * length  # nothing but rounding is left
        self.log_norms = self.log_norms + self.beta.log()
        self.following = rest

    def _compared(self, image: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what lies outside the space ``(B, K)``, its length, and the error inside, both ``(B,)``."""
        rest = outside(image, self.left)
        coordinates = (self.left @ image[:, :, None]).squeeze(2).double()
        numbers = torch.cat([coordinates, rest.double().norm(dim=1, keepdim=True)], 1).cpu()  # the wait for a forward
        if not bool(numbers.isfinite().all()):
            check_finite(image)
        return rest, numbers[:, -1], (numbers[:, :-1] - inside).norm(dim=1)

    def _replaced(self, image: Tensor, v: Tensor, wrong: Tensor) -> Tensor:
        """Take the exact derivative where ``wrong``."""
        self.num_matvecs += 1
        index = wrong.nonzero().squeeze(1).to(v.device)
        some = None if bool(wrong.all()) else self.operator.restrict(index)
        if some is None:
            exact = self.operator.apply(v, exact=True)
            return torch.where(wrong.to(v.device)[:, None], exact, image)
        return image.index_copy(0, index, some.apply(v[index], exact=True))

    def _check_transposes(self, u: Tensor, row: Tensor, v: Tensor, inside: Tensor, suspicious: Tensor) -> None:
        """Refuse an ``apply`` that is not the transpose of ``adjoint``, unless rounding explains the difference.

        Products of twice the vector round alike and tell whether ``apply`` is linear; those of odd multiples round
        differently and show the rounding.

        Raises:
            ValueError: If it is not.
        """
        if not bool(suspicious.any()):
            return
        once, twice = (self.operator.apply(c * v, exact=True) / c for c in (1, 2))
        # rows from before a part of the batch was dropped: a unit at its kink may round to the other side since
        again = torch.stack([self.operator.adjoint(one) for one in self.left.unbind(1)], 1)
        noise = (again - self.rows).flatten(1).norm(dim=1)
        for c in _FACTORS:
            by_adjoint = (self.operator.adjoint(c * u) / c - row).norm(dim=1)
            noise = torch.maximum(noise, by_adjoint + (self.operator.apply(c * v, exact=True) / c - once).norm(dim=1))
        self.num_matvecs += 2 + self.left.shape[1] + 2 * len(_FACTORS)
        is_linear = ((twice - once).norm(dim=1) <= 1e-3 * once.norm(dim=1)).cpu()
        error = self._compared(once, inside)[2]
        if bool((suspicious & ~(is_linear & (error <= 100 * noise.cpu()))).any()):
            raise ValueError(_NO_TRANSPOSES)

    def _finish(self, *, is_open: bool, is_last: bool = False) -> None:
        """Keep the results of those whose interval is narrow and whose residual is small, or of all."""
        # |G y - theta y| = beta_m |s_m| for a Ritz vector y
        residual = self._last_norm(is_open) * self.s[:, -1, 0].abs()
        value = self.theta[:, 0]
        small = (residual <= self.plan.rtol * value) | (self.is_exhausted & (not is_open))
        start = self._random_start(is_open)
        # of the largest upper end, (sqrt(t) + eta)^2 is at most 1 + tolerance times the lower end
        eta = self._eta()
        limit = ((1 + self.plan.tolerance) ** 0.5 * (value.sqrt() - eta) - eta).clamp_min(0).square()
        narrow = start.excludes(limit, self.plan.failure_probability)
        done = ~self.is_done & ((small & narrow) | is_last)
        if bool(done.any()):
            self._keep(done, residual, small & narrow, start, is_open)
            self.is_done = self.is_done | done
            self._drop_done()

    def _last_norm(self, is_open: bool) -> Tensor:
        """Return the last off-diagonal, or the most that it can be for an eigenvalue at the end of the interval."""
        if not is_open:
            return self.beta
        end = (1 + self.plan.tolerance) * self.theta[:, 0]
        return (end * self.gram[:, -1, -1] - self.gram[:, -1].square().sum(1)).clamp_min(0).sqrt()

    def _random_start(self, is_open: bool) -> RandomStart:
        last = self.gram[:, -1, -1].clamp_min(0)
        offset = self.gram[:, -1].square().sum(1) / last.clamp_min(_TINY)
        return RandomStart(
            roots=self.theta,
            log_norms=self.log_norms,
            open_diagonal=last if is_open else torch.full_like(last, torch.nan),
            open_offset=torch.minimum(offset, self.theta[:, 0]),
            dimension=self.num_outputs - 1,
            share=_SHARE,
        )

    def _eta(self) -> Tensor:
        return self.rounding + 4 * torch.finfo(self.rows.dtype).eps * self.theta[:, 0].sqrt()

    def _keep(self, done: Tensor, residual: Tensor, converged: Tensor, start: RandomStart, is_open: bool) -> None:
        """Note the results of ``done``."""
        index = done.nonzero().squeeze(1)
        everything = len(index) == len(done)
        left, rows = (x if everything else x[index.to(x.device)] for x in (self.left, self.rows))

        def here(values: Tensor, dtype: torch.dtype = left.dtype) -> Tensor:
            return values[index].to(dtype).to(left.device)

        y = here(self.s[:, None, :, 0])
        value = here(self.theta[:, 0])
        # a positive eigenvalue that the precision cannot hold
        wide, narrow = self.theta[:, 0], self.theta[:, 0].to(left.dtype)
        in_range = narrow.isfinite() & ((narrow > 0) | (wide == 0))
        is_zero = here(wide == 0, torch.bool)
        kappa = self.beta[:, None] * self.s[:, -1].abs()
        result = EigenResult(
            eigenvalue=value,
            eigenvector=unit((y @ rows).squeeze(1)).masked_fill(is_zero[:, None], 0.0),
            left_singular_vector=(y @ left).squeeze(1),
            residual=here(residual),
            converged=here(converged & in_range, torch.bool),
            ritz_values=here(self.theta),
            couplings=here(torch.full_like(kappa, torch.inf) if is_open else kappa),
            num_steps=here(torch.full_like(self.index, left.shape[1] - 1), torch.long),
            num_matvecs=0,
            solver=self.plan.solver,
            residual_is_exact=self.plan.trusted == 0,
            rounding=here(torch.maximum(self._eta(), self.disagreement)),
            random_start=start.part(index),
            search_space=left,
        )
        self.found.append((self.index[index], result))

    def _drop_done(self) -> None:
        keep = (~self.is_done).nonzero().squeeze(1)
        if not 0 < len(keep) <= _WORTH_A_FORWARD * len(self.is_done):
            return
        there = keep.to(self.left.device)
        if (smaller := self.operator.restrict(there)) is None:
            return
        self.operator = smaller
        for name in ("left", "rows", "following"):
            setattr(self, name, getattr(self, name)[there])
        for name in (
            "index",
            "is_done",
            "gram",
            "log_norms",
            "beta",
            "is_exhausted",
            "rounding",
            "disagreement",
            "theta",
            "s",
        ):
            setattr(self, name, getattr(self, name)[keep])

    def _all_done(self) -> bool:
        return bool(self.is_done.all())


_FACTORS = (3, 5, 7, 11)
_SEED = 7919_2026_0001  # a network that was seeded with a small number has other random numbers
_SHARE = 0.5**0.5  # sigma: of a sum of two orthogonal unit vectors
_LEAST_OUTPUTS = 5  # from four dimensions outside the guess on, no guess makes a small component likelier

_WORTH_A_FORWARD = 1 / 2
"""Share of the batch up to which a new forward on it costs less than passing the rest through one more step."""

_TRUSTED = 0.05
_LEAST_QUOTIENT_RTOL = 1e-2  # below it the error of a difference quotient, about 1e-3, is no longer small
_TINY = 1e-290

_NO_TRANSPOSES = (
    "apply and adjoint are not transposes of each other. A model does that if its forward is random, if a part of it "
    "runs under torch.no_grad(), which forward-mode passes do not respect (use detach() there), or if a custom "
    "autograd.Function has a wrong derivative or none of second order (@once_differentiable)."
)
