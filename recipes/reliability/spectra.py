"""Failure rates of the interval of the largest eigenvalue on synthetic spectra, and accuracy of Ritz values.

A search uses a matrix only through products, so that diagonal matrices represent all matrices with their eigenvalues.
Each batch has its own random vector, and the order of the eigenvalues differs between examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_reg import Exact, Lanczos

Spectra = Callable[[int, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Diagonal:
    """Diagonal matrices ``A = diag(roots)`` ``(B, K)``; the search starts at the vector ``start`` ``(B, K)``."""

    roots: Tensor
    start: Tensor

    def starts(self, count: int) -> Tensor:
        """Return the start vector."""
        return self.start[:, None]

    def labels(self, generator: torch.Generator | None) -> Tensor:
        """Raise an error, since there is no model.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("Spectra have no labels.")

    def apply(self, tangent: Tensor, *, exact: bool = False, slope: Tensor | None = None) -> Tensor:
        """``A v``."""
        return self.roots * tangent

    def slope_along(self, cotangent: Tensor, row: Tensor) -> Tensor:
        """Return the length of ``row``."""
        result: Tensor = row.norm(dim=1)
        return result

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """``Aᵀ u``."""
        return self.roots * cotangent

    def restrict(self, keep: Tensor) -> Diagonal:
        """Return the matrices at ``keep``."""
        return Diagonal(self.roots[keep], self.start[keep])


def _decaying(count: int, size: int, generator: torch.Generator) -> Tensor:
    rate = 0.3 + 0.69 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return rate ** torch.arange(size)


def _power_law(count: int, size: int, generator: torch.Generator) -> Tensor:
    exponent = 0.2 + 2 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return torch.arange(1, size + 1, dtype=torch.float64) ** -exponent


def _repeated(count: int, size: int, generator: torch.Generator) -> Tensor:
    spectra = _decaying(count, size, generator)
    return torch.cat([spectra[:, :1], spectra[:, :-1]], 1)


def _tiny_gap(count: int, size: int, generator: torch.Generator) -> Tensor:
    spectra = _decaying(count, size, generator)
    gap = 10 ** (-4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1)
    return torch.cat([spectra[:, :1] * (1 + gap), spectra[:, :-1]], 1)


def _flat_with_one_larger(count: int, size: int, generator: torch.Generator) -> Tensor:
    spectra = 0.5 + 0.5 * torch.rand(count, size, generator=generator, dtype=torch.float64)
    spectra[:, 0] = 1 + 3 * torch.rand(count, generator=generator, dtype=torch.float64)
    return spectra


KINDS: dict[str, Spectra] = {
    "geometric": _decaying,
    "power law": _power_law,
    "top twice": _repeated,
    "gap of 1e-1 to 1e-5": _tiny_gap,
    "flat with one larger": _flat_with_one_larger,
}
"""Each also with a start that is orthogonal to the largest eigenvector."""


def interval_rows(
    num_spectra: int, size: int, num_batches: int, probabilities: list[float], seed: int
) -> list[dict[str, Any]]:
    """Count the failures of the interval of the largest eigenvalue, and measure its width, by failure probability.

    Args:
        num_spectra: Number of spectra per failure probability, over all kinds.
        size: ``K``.
        num_batches: Number of random vectors per kind.
        probabilities: Failure probabilities of the intervals.
        seed: Seed of all random numbers.

    Returns:
        A row per failure probability, kind and start.
    """
    rows = []
    cases = [(kind, orthogonal) for kind in KINDS for orthogonal in (False, True)]
    per_batch = math.ceil(num_spectra / len(cases) / num_batches)
    for promised in probabilities:
        solver = Lanczos(num_steps=20, is_exact=True, failure_probability=promised)
        for kind, is_orthogonal in cases:
            generator = torch.Generator().manual_seed(seed)
            failed, above, converged, widths = 0, 0, 0, []
            for batch in range(num_batches):
                operator, top = _batch(KINDS[kind], per_batch, size, is_orthogonal, generator)
                result = solver.solve(operator, torch.Generator().manual_seed(seed + 1 + batch))
                found = result.interval(promised)
                failed += int((found.upper < top).sum())
                above += int((found.lower > top).sum())
                converged += int(result.converged.sum())
                widths.append(found.upper / top - 1)
            width, count = torch.cat(widths), num_batches * per_batch
            rows.append(
                {
                    "spectra": kind,
                    "start orthogonal to the top": is_orthogonal,
                    "number": count,
                    "promised": promised,
                    "observed": failed / count,
                    "lower end above": above,
                    "converged": converged / count,
                    "gap, median": float(width.quantile(0.5)),
                    "gap, 95 %": float(width.quantile(0.95)),
                }
            )
    return rows


def ritz_rows(num_values: int, seed: int) -> list[dict[str, Any]]:
    """Compare Ritz values, and lower ends of intervals, with exact eigenvalues of random matrices.

    Args:
        num_values: Number of Ritz values.
        seed: Seed of the matrices.

    Returns:
        A row per precision.
    """
    rows = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(seed)
        excess, below = [], 0
        for _ in range(10):
            spectra = _power_law(num_values // 10, 30, generator)
            operator, top = _batch(lambda *_, s=spectra: s, num_values // 10, 30, False, generator)
            single = Diagonal(operator.roots.to(dtype), operator.start.to(dtype))
            true = single.roots.double().square().amax(1)
            for solver in (Lanczos(num_steps=3, rtol=0.0), Exact()):
                result = solver.solve(single)
                excess.append(result.eigenvalue.double() / true - 1)
                below += int((result.interval(trace=single.roots.double().square().sum(1)).lower > true).sum())
        worst = torch.cat(excess)
        rows.append(
            {
                "precision": str(dtype).removeprefix("torch."),
                "Ritz values": len(worst),
                "above λ by more than 10 roundings": int((worst > 10 * torch.finfo(dtype).eps).sum()),
                "largest excess": float(worst.amax()),
                "lower ends above λ": below,
            }
        )
    return rows


def _batch(
    kind: Spectra, count: int, size: int, is_orthogonal: bool, generator: torch.Generator
) -> tuple[Diagonal, Tensor]:
    """Return matrices with eigenvalues in random order, and the largest eigenvalue of each."""
    spectra = kind(count, size, generator)
    order = torch.rand(count, size, generator=generator).argsort(1)
    roots = torch.empty_like(spectra).scatter_(1, order, spectra.sqrt())
    start = torch.randn(count, size, generator=generator, dtype=torch.float64)
    if is_orthogonal:
        start = torch.where(roots == roots.amax(1, keepdim=True), 0.0, start)
    return Diagonal(roots, start / start.norm(dim=1, keepdim=True)), roots.square().amax(1)
