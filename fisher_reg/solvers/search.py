r"""Lanczos iteration with :math:`G = A A^\top` from the sum of a guess :math:`c` and a random vector :math:`w`.

All solvers work in the output space, which is small: :math:`G` has the nonzero eigenvalues of F. For orthonormal
:math:`u_1 \dots u_m`, the rows of :math:`W`, the VJPs :math:`r_i = A^\top u_i` give the projection
:math:`H_{ij} = r_i^\top r_j` of :math:`G` on the search space, with :math:`H s_i = \theta_i s_i`. The JVP
:math:`A v_m`, :math:`v_m = r_m / \|r_m\|`, gives only the next direction and the residual, so that it may be a
difference quotient: its component inside the search space is known exactly from the VJPs, which measures its error.

The guess makes the search fast. The random part makes the interval valid: it has a component along every eigenvector,
also one orthogonal to the guess (see :mod:`fisher_reg.solvers.interval`).

The vectors stay on the device. The projected matrix H is solved on the CPU in double precision. A step synchronises
with the device twice: after the product with A and after the product with its transpose.
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
    """The stopping rule of a search.

    Attributes:
        solver: The solver to name in the result.
        num_steps: Largest number of vectors that are added to the start.
        rtol: Residual, relative to the eigenvalue, at which an example may stop.
        tolerance: Relative width of the interval at which it may stop.
        failure_probability: That of the interval.
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
        """Relative error of a difference quotient above which it is replaced by the exact derivative."""
        return 0.0 if self.is_exact or self.rtol < _LEAST_QUOTIENT_RTOL else _TRUSTED


def search(
    operator: FactoredOperator, guess: Tensor, plan: Plan, generator: torch.Generator | None = None
) -> EigenResult:
    """Return the largest eigenpair of each operator, starting from a ``guess`` ``(B, K)``.

    With fewer outputs than the bound of the interval needs, :class:`Exact` is used, which takes no more passes.
    """
    if guess.shape[1] < _LEAST_OUTPUTS:
        return replace(Exact().solve(operator), solver=plan.solver)
    return _Search(operator, _start(guess, generator), plan).run()


def random_source(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator, or a new fixed one. Consecutive searches must share it, to draw different vectors."""
    return fixed_generator(_SEED) if generator is None else generator


def _start(guess: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the sum of the guess and a random vector orthogonal to it, as unit vectors ``(B, K)``."""
    c = unit(guess)
    # the same random vector for all examples, so that no result depends on the other examples of the batch
    w = normal(guess[0], random_source(generator)).expand_as(c)
    return unit(c + unit(outside(w, c[:, None])))  # u_1 = sqrt(1 - sigma^2) c + sigma w, w orthogonal to c


class _Search:
    """State of the search: the examples of a batch that have not stopped.

    ``left`` W ``(B, m, K)`` and ``rows`` ``W A`` ``(B, m, d)`` are on the device, everything else on the CPU.
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
        """Alternate products with the transpose of A and with A until all examples have stopped."""
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
        row = self.operator.adjoint(u)  # r_m = A^T u_m
        self.num_matvecs += 1
        self.left = torch.cat([self.left, u[:, None]], 1)
        self.rows = torch.cat([self.rows, row[:, None]], 1) if self.rows.shape[1] else row[:, None]
        column = products(self.rows, row[:, None]).cpu()  # H_{im} = r_i^T r_m; synchronises after the backward pass
        if not bool(column.isfinite().all()):
            check_finite(row)
        self.gram = torch.cat([torch.cat([self.gram, column[:, :-1]], 2), column.mT], 1)
        values, vectors = symmetric_eigen(self.gram)  # H s_i = theta_i s_i
        self.theta, self.s = values.flip(1).clamp_min(0), vectors.flip(2)

    def _multiply(self) -> None:
        """Apply A to the last row: it gives the last off-diagonal and the next direction."""
        u, row = self.left[:, -1], self.rows[:, -1]
        v = unit(row)
        length = self.gram[:, -1, -1].clamp_min(0).sqrt()  # ||r_m|| = sqrt(H_mm)
        inside = self.gram[:, -1] / length.clamp_min(_TINY)[:, None]  # W A v_m = W A A^T u_m / ||r_m|| = H_m / ||r_m||
        trusted = self.plan.trusted
        image = self.operator.apply(v, exact=trusted == 0, slope=self.operator.slope_along(u, row))
        self.num_matvecs += 1
        rest, distance, error = self._compared(image, inside)
        # the squares of smaller numbers underflow
        size = inside.norm(dim=1).clamp_min(10 * torch.finfo(row.dtype).tiny ** 0.5)
        is_exact = torch.full_like(self.is_done, trusted == 0)
        wrong = ~is_exact & ~self.is_done & ~(error <= trusted * size)
        if bool(wrong.any()):
            rest, distance, error = self._compared(self._replaced(image, v, wrong), inside)
            is_exact = is_exact | wrong
        self._check_transposes(u, row, v, inside, (error > 2 * _TRUSTED * size) & ~self.is_done)
        # the error inside the m-dimensional space, scaled to K dimensions, times a safety factor
        norm = 4 * error * (self.num_outputs / self.left.shape[1]) ** 0.5
        self.disagreement = torch.maximum(self.disagreement, norm)
        self.rounding = torch.where(is_exact, torch.maximum(self.rounding, norm), self.rounding)
        distance = distance + error
        # beta_m = ||r_m|| ||(1 - W^T W) A v_m||
        self.beta = length * distance
        self.is_exhausted = distance <= 100 * torch.finfo(row.dtype).eps * length  # only rounding is left
        self.log_norms = self.log_norms + self.beta.log()
        self.following = rest

    def _compared(self, image: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the component outside the space ``(B, K)``, its norm, and the error inside, both ``(B,)``."""
        rest = outside(image, self.left)  # (1 - W^T W) A v_m
        coordinates = (self.left @ image[:, :, None]).squeeze(2).double()
        numbers = torch.cat([coordinates, rest.double().norm(dim=1, keepdim=True)], 1).cpu()  # synchronises
        if not bool(numbers.isfinite().all()):
            check_finite(image)
        return rest, numbers[:, -1], (numbers[:, :-1] - inside).norm(dim=1)

    def _replaced(self, image: Tensor, v: Tensor, wrong: Tensor) -> Tensor:
        """Replace the products of the examples in ``wrong`` by exact derivatives."""
        self.num_matvecs += 1
        index = wrong.nonzero().squeeze(1).to(v.device)
        some = None if bool(wrong.all()) else self.operator.restrict(index)
        if some is None:
            exact = self.operator.apply(v, exact=True)
            return torch.where(wrong.to(v.device)[:, None], exact, image)
        return image.index_copy(0, index, some.apply(v[index], exact=True))

    def _check_transposes(self, u: Tensor, row: Tensor, v: Tensor, inside: Tensor, suspicious: Tensor) -> None:
        """Raise an error if ``apply`` is not the transpose of ``adjoint`` and rounding does not explain the difference.

        Products with twice the vector have the same rounding errors and show whether ``apply`` is linear. Products with
        odd multiples have other rounding errors and show their size.

        Raises:
            ValueError: If ``apply`` is not the transpose.
        """
        if not bool(suspicious.any()):
            return
        once, twice = (self.operator.apply(c * v, exact=True) / c for c in (1, 2))
        # recompute the rows, since stopped examples have been dropped: in a smaller batch an input of ReLU near zero
        # may be rounded to the other sign
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
        """Store the results of examples with a narrow interval and a small residual, or of all if ``is_last``."""
        # ||G y_1 - theta_1 y_1|| = beta_m |s_{m1}| for the Ritz vector y_1 = W^T s_1
        residual = self._last_norm(is_open) * self.s[:, -1, 0].abs()
        value = self.theta[:, 0]
        small = (residual <= self.plan.rtol * value) | (self.is_exhausted & (not is_open))
        start = self._random_start(is_open)
        # the largest t with (sqrt(t) + eta)^2 <= (1 + tolerance) (sqrt(theta_1) - eta)^2
        eta = self._eta()
        limit = ((1 + self.plan.tolerance) ** 0.5 * (value.sqrt() - eta) - eta).clamp_min(0).square()
        narrow = start.excludes(limit, self.plan.failure_probability)
        done = ~self.is_done & ((small & narrow) | is_last)
        if bool(done.any()):
            self._keep(done, residual, small & narrow, start, is_open)
            self.is_done = self.is_done | done
            self._drop_done()

    def _last_norm(self, is_open: bool) -> Tensor:
        """Return ``beta_m``; before it is computed, its upper bound for an eigenvalue at the end of the interval."""
        if not is_open:
            return self.beta
        end = (1 + self.plan.tolerance) * self.theta[:, 0]
        # beta_m^2 <= b alpha_m - ||H_m||^2
        return (end * self.gram[:, -1, -1] - self.gram[:, -1].square().sum(1)).clamp_min(0).sqrt()

    def _random_start(self, is_open: bool) -> RandomStart:
        last = self.gram[:, -1, -1].clamp_min(0)
        offset = self.gram[:, -1].square().sum(1) / last.clamp_min(_TINY)  # ||H_m||^2 / alpha_m
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
        """Store the results of the examples in ``done``."""
        index = done.nonzero().squeeze(1)
        everything = len(index) == len(done)
        left, rows = (x if everything else x[index.to(x.device)] for x in (self.left, self.rows))

        def here(values: Tensor, dtype: torch.dtype = left.dtype) -> Tensor:
            return values[index].to(dtype).to(left.device)

        y = here(self.s[:, None, :, 0])
        value = here(self.theta[:, 0])
        # false for a positive eigenvalue that underflows or overflows in the precision of the result
        wide, narrow = self.theta[:, 0], self.theta[:, 0].to(left.dtype)
        in_range = narrow.isfinite() & ((narrow > 0) | (wide == 0))
        is_zero = here(wide == 0, torch.bool)
        kappa = self.beta[:, None] * self.s[:, -1].abs()  # kappa_i = beta_m |s_{mi}|
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
_SEED = 7919_2026_0001  # large, so that a model seeded with a small number draws other numbers
_SHARE = 0.5**0.5  # sigma, for the normalised sum of two orthogonal unit vectors
_LEAST_OUTPUTS = 5  # w has four dimensions: then no guess makes a small component of u_1 more likely

_WORTH_A_FORWARD = 1 / 2
"""If at most this share of the batch is left, a new forward of it costs less than one more step of the whole batch."""

_TRUSTED = 0.05
_LEAST_QUOTIENT_RTOL = 1e-2  # below it the error of a difference quotient, about 1e-3, is no longer small
_TINY = 1e-290

_NO_TRANSPOSES = (
    "apply and adjoint are not transposes of each other. This happens if the forward is random, if a part of the model "
    "runs under torch.no_grad(), which forward-mode passes do not respect (use detach() there), or if a custom "
    "autograd.Function has a wrong derivative or none of second order (@once_differentiable)."
)
