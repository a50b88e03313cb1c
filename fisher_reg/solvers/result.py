r"""The result of a solver: eigenpairs of :math:`F = A^\top A` with residuals, convergence flags and an interval."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fisher_reg.printing import examples, spread, table
from fisher_reg.solvers.interval import Interval, RandomStart, check_probability, majorant
from fisher_reg.solvers.linalg import cat_padded
from fisher_reg.solvers.protocols import FactoredOperator


@dataclass(frozen=True)
class EigenResult:
    r"""Largest eigenvalue of a batch of matrices :math:`F = A^\top A`, with its eigenvector and error estimates.

    In a result of :func:`fisher_reg.fisher_eigenpairs` the first five fields have an axis of eigenpairs after ``B``.
    The fields from ``residual_is_exact`` on are optional for a user-defined solver; without them only a trace bounds
    the eigenvalue from above.

    Attributes:
        eigenvalue: ``(B,)``. :math:`\theta = \|A^\top u\|^2`, a Rayleigh quotient by backward passes alone: never above
            the true value beyond round-off.
        eigenvector: ``(B, *S)``. :math:`v = A^\top u / \sqrt\theta`; zero where the matrix is zero.
        left_singular_vector: ``(B, K)``. :math:`u`, of unit length: the direction in which the outputs move along
            ``v``.
        residual: ``(B,)``. :math:`\|A A^\top u - \theta u\|`, or an upper bound of it where the search stopped before
            the pass that measures it. :math:`A A^\top` has the nonzero eigenvalues of F, so that one of them lies
            within ``residual`` of ``eigenvalue``; this one need not be the largest.
        converged: ``(B,)``, boolean. Both of these hold: the residual is at most ``rtol`` times the eigenvalue, and no
            eigenvalue of F exceeds ``eigenvalue`` by more than the solver's ``tolerance``, except with its
            ``failure_probability`` (see :meth:`interval`).
        ritz_values: ``(B, m)``, descending: the Ritz values of the search space, padded with zeros.
        num_steps: ``(B,)``. Number of vectors added to the start vectors of each example.
        num_matvecs: Number of products with ``A`` and with its transpose; each product covers all examples that have
            not stopped yet.
        solver: The solver that was used.
        residual_is_exact: Whether the residual and the Lanczos steps come from exact derivatives.
        couplings: ``(B, m)``. :math:`\kappa_i`, the norm of the component of :math:`A A^\top y_i` outside the search
            space, for each Ritz vector :math:`y_i`; infinite where it is not known.
        rounding: ``(B,)``. Estimated norm of the errors of products with ``A``, in the unit of :math:`\sqrt\lambda`:
            the disagreement of forward and backward derivatives in the search space, scaled up for the rest of the
            output space.
        random_start: The Lanczos recurrence, whose start has a random part, on the CPU.
        search_space: ``(B, n, K)``, orthonormal rows, padded with zeros. Empty if the whole output space was used.
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
    residual_is_exact: bool = False
    couplings: Tensor = None  # type: ignore[assignment]
    rounding: Tensor = None  # type: ignore[assignment]
    random_start: RandomStart = None  # type: ignore[assignment]
    search_space: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Fill in the fields that a solver left out: couplings and bound are infinite."""
        value, u = self.ritz_values, self.left_singular_vector
        defaults: dict[str, Callable[[], Any]] = {
            "couplings": lambda: torch.full_like(value, torch.inf),
            "rounding": lambda: 4 * torch.finfo(value.dtype).eps * value[:, 0].sqrt(),
            "random_start": lambda: RandomStart.none(len(value)),
            "search_space": lambda: u.reshape(len(value), -1, u.shape[-1]),
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default())

    def __repr__(self) -> str:
        is_one = self.eigenvalue.ndim == 1
        count = examples(len(self.eigenvalue)) + ("" if is_one else f" with {self.eigenvalue.shape[1]} eigenpairs")
        top = self.eigenvalue if is_one else self.eigenvalue[:, 0]
        return (
            f"EigenResult({count}: eigenvalue {spread(top)}; {int((~self.converged).sum())} not converged; "
            f"{self.num_matvecs} matvecs by {type(self.solver).__name__})"
        )

    def __str__(self) -> str:
        by = f"{self.num_matvecs} matrix-vector products by {type(self.solver).__name__}"
        if self.eigenvalue.ndim > 1:
            values = {f"λ_{i + 1}": value for i, value in enumerate(self.eigenvalue.unbind(1))}
            columns = values | {"largest residual": self.residual.amax(1), "converged": self.converged.all(1)}
            return table(f"Largest eigenvalues of F, {by}", columns)
        columns, footer = {"λ": self.eigenvalue}, "λ is an estimate from below"
        if self.residual_is_exact:
            found = self.interval()
            columns |= {"lower": found.lower, "upper": found.upper}
            footer = f"lower <= λ <= upper, {found.certainty}"
        return table(
            f"Largest eigenvalue λ of F, {by}",
            columns | {"residual": self.residual, "converged": self.converged},
            footer,
        )

    @property
    def known_trace(self) -> Tensor:
        """Sum of the Ritz values, ``(B,)``: the trace of F on the search space, between the eigenvalue and tr F."""
        return self.ritz_values.sum(1)

    def interval(self, failure_probability: float | None = None, *, trace: Tensor | None = None) -> Interval:
        r"""Enclose the largest eigenvalue: ``lower <= λ <= upper`` per example, without a further pass.

        *Certain*, up to rounding: ``lower``, since no Rayleigh quotient exceeds :math:`\lambda`; and ``upper`` if an
        exact ``trace`` is given, since the trace minus the Ritz values bounds every eigenvalue outside the search
        space.

        *With probability* ``1 - failure_probability``, per example: ``upper`` without a trace. The randomness is that
        of the vector that the solver drew from its ``generator`` (by default a fixed one). Nothing is assumed about the
        network or the input. All examples of a batch share the vector, so that their failures are not independent. The
        formulas are in :mod:`fisher_reg.solvers.interval`.

        *Rounding* is added on both sides as an estimate, not a proof: the disagreement of forward and backward
        derivatives in the search space (``rounding``). The interval of a network in float32 is that of the function as
        computed in float32. A *sampled* trace makes ``upper`` as uncertain as that trace; it is never below ``lower``.

        Args:
            failure_probability: Strictly between 0 and 1; by default that of the solver. A smaller one than the
                solver's gives a wide interval: solve with it instead.
            trace: Trace of F ``(B,)``, as of :func:`fisher_reg.fisher_trace` with ``estimator=Exact()``. Without a
                ``failure_probability`` the interval is then certain; with one, the smaller upper end is taken.

        Returns:
            Fields ``(B,)`` in the unit of ``eigenvalue``.

        Raises:
            ValueError: If the failure probability is out of range, if ``trace`` is not ``(B,)``, if the residual does
                not come from exact derivatives and no trace is given, or for a result of
                :func:`fisher_reg.fisher_eigenpairs`.

        Example:
            >>> from fisher_reg import Lanczos, fisher_spectral_norm
            >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
            >>> solver = Lanczos(is_exact=True, failure_probability=1e-6)
            >>> found = fisher_spectral_norm(lambda x: x @ weight.T, torch.zeros(1, 2), solver=solver).interval()
            >>> bool(found.lower <= 2 / 3), bool(found.upper >= 2 / 3), bool(found.relative_width < 1e-5)
            (True, True, True)
        """
        if self.eigenvalue.ndim != 1:
            raise ValueError("interval() encloses the largest eigenvalue only; use the result of fisher_spectral_norm.")
        if failure_probability is None and trace is None:
            failure_probability = getattr(self.solver, "failure_probability", 1e-3)
        if failure_probability is not None:
            check_probability("failure_probability", failure_probability)
            self._check_exact(failure_probability)
        upper = torch.full((len(self.eigenvalue),), torch.inf, dtype=torch.float64)
        if failure_probability is not None:
            upper = self.random_start.bound(failure_probability)
        if trace is not None:
            upper = torch.minimum(upper, self._upper_by_trace(trace))
        is_certain = failure_probability is None or self.random_start.is_certain
        return self._enclose(upper, 0.0 if is_certain else failure_probability)

    def upper_bound(self, trace: Tensor) -> Tensor:
        """Deprecated: :meth:`interval` with ``trace`` gives the same upper end, and the lower one.

        Returns:
            ``(B,)``.
        """
        warnings.warn(
            "EigenResult.upper_bound(trace) is now interval(trace=trace).upper.", DeprecationWarning, stacklevel=2
        )
        return self.interval(trace=trace).upper

    def _enclose(self, upper: Tensor, failure_probability: float | None) -> Interval:
        dtype, device = self.eigenvalue.dtype, self.eigenvalue.device
        eta, lower = self.rounding.cpu().double(), self.eigenvalue.cpu().double()
        upper = torch.maximum(upper, lower)
        # |sigma(A + E) - sigma(A)| <= |E| (Weyl)
        lower, upper = (lower.sqrt() - eta).clamp_min(0).square(), (upper.sqrt() + eta).square()
        up, down = torch.tensor(torch.inf, dtype=dtype), torch.tensor(0.0, dtype=dtype)
        return Interval(
            lower=torch.nextafter(lower.to(dtype), down).to(device),
            upper=torch.where(upper == 0, 0.0, torch.nextafter(upper.to(dtype), up)).to(device),
            failure_probability=failure_probability or 0.0,
        )

    def _upper_by_trace(self, trace: Tensor) -> Tensor:
        """Bound the eigenvalue by the trace minus the Ritz values."""
        if not isinstance(trace, Tensor) or trace.shape != self.eigenvalue.shape:
            found = tuple(trace.shape) if isinstance(trace, Tensor) else type(trace).__name__
            shape = tuple(self.eigenvalue.shape)
            raise ValueError(f"trace must be a tensor of shape {shape}, one number per example; got {found}.")
        total, values = trace.cpu().double(), self.ritz_values.cpu().double()
        known = values.sum(1)
        # b = tr F - sum_i theta_i, and the rounding of both
        left = (total - known).clamp_min(0) + 4 * torch.finfo(trace.dtype).eps * (total + known)
        kappa = self.couplings.cpu() if self.residual_is_exact else torch.full_like(values, torch.inf)
        return majorant(values, kappa, left)

    def _check_exact(self, failure_probability: float) -> None:
        if not self.residual_is_exact:
            raise ValueError(
                "The residual of this result comes from difference quotients, which give no guarantee. Solve with "
                f"solver=Lanczos(is_exact=True, failure_probability={failure_probability:g}) or solver=Exact(), or "
                "give an exact trace: interval(trace=fisher_trace(model, inputs, estimator=Exact()))."
            )


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
_PER_EXAMPLE = (*_PER_PAIR, "num_steps", "rounding")
_PADDED = ("ritz_values", "couplings", "search_space")


def leading(result: EigenResult) -> EigenResult:
    """Keep the first eigenpair and drop the axis of eigenpairs."""
    return replace(result, **{name: getattr(result, name)[:, 0] for name in _PER_PAIR})


def part(result: EigenResult, index: Tensor) -> EigenResult:
    """Select or reorder examples by an ``index`` on the CPU."""
    there = index.to(result.eigenvalue.device)
    chosen = {name: getattr(result, name)[there] for name in (*_PER_EXAMPLE, *_PADDED)}
    return replace(result, **chosen, random_start=result.random_start.part(index))


def concatenate(results: list[EigenResult]) -> EigenResult:
    """Concatenate the results of parts of one batch; ``num_matvecs`` is their sum."""
    if len(results) == 1:
        return results[0]
    joined: dict[str, Any] = {name: torch.cat([getattr(one, name) for one in results]) for name in _PER_EXAMPLE}
    joined |= {name: cat_padded([getattr(one, name) for one in results], 0.0) for name in _PADDED}
    joined["random_start"] = RandomStart.joined([result.random_start for result in results])
    return replace(results[0], **joined, num_matvecs=sum(result.num_matvecs for result in results))
