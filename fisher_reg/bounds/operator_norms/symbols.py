r"""Certified largest norms of the symbol of a convolution of stride 1, on a grid of frequencies and over all of them.

The symbol of a kernel W, with a matrix per tap t, is :math:`X(\omega) = \sum_t W_t e^{-i t \cdot \omega}`. Kernels are
``(groups, out, in, *kernel)`` in float64, with entries of moderate size. Since they are real, the norms at
:math:`\omega` and :math:`-\omega` are equal, and half of the frequencies suffice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fisher_reg.bounds.operator_norms.matrix import (
    MAX_NUMBERS,
    Peak,
    carries_gradient,
    climb,
    lower_estimates,
    may_exceed,
    roundoff,
    with_gradient,
)

_EIGENVALUE_RTOL = 2e-3
"""Excess of the certificate over the estimate: 0.1 % of the norm, usually more than the error of the estimate."""
_GRID_EXCESSES = ((0.0025, 2**29), (0.01, 2**37), (0.02, 2**37), (0.04, math.inf))
"""Largest increase of the norm between grid points, and largest work: 2**37 is 15 seconds on two slow cores."""
_COARSENINGS = (4, 2)
"""Ratios of the spacings of the coarser grids of the search to that of the finest."""


@dataclass(frozen=True)
class _Summit:
    """The largest norm found: its square as an eigenvalue, its group, and its frequency."""

    eigenvalue: float = 0.0
    group: int = 0
    angles: Tensor | None = None

    def raised(self, peak: Peak, angles: Tensor, groups: int) -> _Summit:
        """Return the larger of this and a peak in the stack ``(P, groups)`` of the Gram matrices at the angles."""
        if peak.place < 0 or peak.eigenvalue <= self.eigenvalue:
            return self
        return _Summit(peak.eigenvalue, peak.place % groups, angles[peak.place // groups])


class _Gram:
    r"""The Gram matrices :math:`X X^*`, or :math:`X^* X` conjugated, whichever is smaller, at any frequency.

    They are trigonometric polynomials with coefficients :math:`C_s = \sum_t W_{t+s} W_t^\top = C_{-s}^\top`:

    .. math:: G(\omega) = C_0 + \sum_{s > 0} \cos(s \cdot \omega) (C_s + C_s^\top) - i \sin(s \cdot \omega) (C_s -
        C_s^\top)

    needs no matrix product per frequency.
    """

    def __init__(self, kernel: Tensor) -> None:
        if kernel.shape[1] > kernel.shape[2]:
            kernel = kernel.transpose(1, 2)
        self.groups, self.size, terms, *widths = kernel.shape
        axes = len(widths)
        taps = kernel.permute(*range(3, 3 + axes), 0, 1, 2).contiguous()  # else the products are 1000 times slower
        lags = taps.new_zeros(*(2 * width - 1 for width in widths), self.groups, self.size, self.size)
        for tap in product(*map(range, widths)):
            there = tuple(slice(width - 1 - t, 2 * width - 1 - t) for width, t in zip(widths, tap, strict=True))
            lags[there] += taps @ taps[tap].mT  # C_s += W_{t+s} W_t^T
        lags = lags.flatten(0, axes - 1)
        half = len(lags) // 2
        ahead = lags[half + 1 :]
        self.even = torch.cat([lags[half : half + 1], ahead + ahead.mT]).flatten(1)
        self.odd = (ahead - ahead.mT).flatten(1)
        shifts = torch.cartesian_prod(*(torch.arange(1 - width, width) for width in widths)).view(-1, axes)
        self.shifts = shifts[half:].to(self.even)
        num_taps = math.prod(widths)
        self.slack = roundoff(self.size, num_taps * (num_taps * terms + len(lags)))

    def at(self, angles: Tensor) -> Tensor:
        """Return the matrices ``(P * groups, n, n)`` at the frequencies ``(P, axes)``."""
        phases = angles @ self.shifts.mT
        # G(omega)
        real, imaginary = phases.cos() @ self.even, phases[:, 1:].sin() @ -self.odd
        return torch.complex(real, imaginary).view(-1, self.size, self.size)

    def chunks(self, angles: Tensor) -> Sequence[Tensor]:
        """Split the frequencies into parts whose matrices fit in memory."""
        chunks: Sequence[Tensor] = angles.split(max(1, MAX_NUMBERS // (self.groups * self.size**2)))
        return chunks


def norm_on_grid(kernel: Tensor, grid: tuple[int, ...]) -> Tensor:
    r"""Return the largest norm of the symbol at the frequencies :math:`2 \pi j / \mathrm{grid}`.

    This is the norm of the circular convolution on the grid, also for kernels larger than the grid.

    Args:
        kernel: ``(groups, out, in, *kernel)``.
        grid: Number of frequencies per axis.

    Returns:
        ``()``, at most 0.1 % too large. Its gradient is that of the singular value at the maximum.
    """
    angles = [torch.arange(size, dtype=torch.float64) * (2 * math.pi / size) for size in grid]
    first = _halved_axis(grid)
    angles[first] = angles[first][: grid[first] // 2 + 1]
    detached = kernel.detach()
    if min(kernel.shape[1:3]) == 1:
        return _attach(*_highest_vector(detached, angles), kernel)
    gram, summit = _Gram(detached), _Summit()
    summit = _climb(gram, _points(angles).to(detached), summit)
    return _attach(((1 + _EIGENVALUE_RTOL) * summit.eigenvalue) ** 0.5, summit, kernel)


def norm_everywhere(kernel: Tensor) -> Tensor:
    r"""Return an upper bound of the norm of the symbol over all frequencies, valid for images of any size.

    For fixed u and v, :math:`g = \mathrm{Re}(u^* X(\omega) v)` is, after the taps are centred, of exponential type
    :math:`d_a = (k_a - 1) / 2` along axis a. If S is the supremum of the norms, :math:`\arccos(g / S)` changes by at
    most :math:`d_a` per radian (Duffin and Schaeffer 1938; next to the maximum, M. Riesz 1914). Therefore:

    * axis by axis, on a grid of :math:`M_a` points the largest norm is at least :math:`\kappa S` with
      :math:`\kappa = \prod_a \cos(\pi d_a / M_a)` (Ehlich and Zeller 1964);
    * if the norm at a point is below :math:`S \cos(\arccos \kappa + \sum_a d_a r_a)`, the norms at all grid points
      within :math:`r_a` along each axis are below :math:`\kappa S`, and these points are discarded.

    References: R. J. Duffin and A. C. Schaeffer (1938), "Some properties of functions of exponential type", Bull. AMS
    44, 236-240. H. Ehlich and K. Zeller (1964), "Schwankung von Polynomen zwischen Gitterpunkten", Math. Z. 86, 41-44.

    Args:
        kernel: ``(groups, out, in, *kernel)``.

    Returns:
        ``()``, about 1 % too large; up to 4 % for many channels or axes. Its gradient is that of the singular value at
        the grid point of the largest norm.
    """
    grid, detached = fine_grid(kernel), kernel.detach()
    if math.prod(grid) == 1:
        return norm_on_grid(kernel, grid)  # the symbol is constant
    types = [(width - 1) / 2 for width in kernel.shape[3:]]  # d_a
    # kappa
    loss = math.prod(math.cos(math.pi * d / size) for d, size in zip(types, grid, strict=True))
    if min(kernel.shape[1:3]) == 1:
        value, summit = _highest_vector(detached, _centres(grid))
        return _attach(value / loss, summit, kernel)
    gram, summit = _Gram(detached), _Summit()
    points = _points(_centres(tuple(max(1, size // _COARSENINGS[0]) for size in grid))).to(detached)
    for coarsening in _COARSENINGS:
        # sum_a d_a r_a: the grid points of a cell are within (coarsening - 1) half-spacings of its centre
        reach = (coarsening - 1) * sum(math.pi * d / size for d, size in zip(types, grid, strict=True))
        # (cos(arccos kappa + sum_a d_a r_a) / kappa)^2
        share = (max(0.0, math.cos(math.acos(loss) + reach)) / loss) ** 2
        points, summit = _prune(gram, points, summit, share)
        points = _subdivide(points, tuple(max(1, 2 * size // coarsening) for size in grid))
    summit = _climb(gram, points, summit)
    return _attach(((1 + _EIGENVALUE_RTOL) * summit.eigenvalue) ** 0.5 / loss, summit, kernel)


def fine_grid(kernel: Tensor) -> tuple[int, ...]:
    """Return the grid of :func:`norm_everywhere`, finer for small matrices."""
    groups, rows, columns, *widths = kernel.shape
    size, axes = min(rows, columns), max(1, sum(width > 1 for width in widths))
    # in flops of a Cholesky factorisation; its overhead and the cost of the scalar case were measured
    work = 400 * max(rows, columns) if size == 1 else size**3 + 40_000
    for excess, limit in _GRID_EXCESSES:
        # prod cos(x) is about 1 - axes * x^2 / 2
        angle = math.sqrt(2 * excess / axes)
        # a multiple of 8, so that the coarsest grid has an even size
        grid = tuple(8 * math.ceil(math.pi * (width - 1) / 16 / angle) if width > 1 else 1 for width in widths)
        if groups * num_frequencies(grid) * work <= limit:
            break
    return grid


def num_frequencies(grid: tuple[int, ...]) -> int:
    """Return the number of frequencies of a grid that are evaluated."""
    return math.prod(grid) // 2 + 1


def _climb(gram: _Gram, points: Tensor, summit: _Summit) -> _Summit:
    """Return a summit that no point exceeds by more than the relative tolerance."""
    for chunk in gram.chunks(points):
        peak = climb(gram.at(chunk), Peak(summit.eigenvalue), _EIGENVALUE_RTOL, gram.slack)
        summit = summit.raised(peak, chunk, gram.groups)
    return summit


def _prune(gram: _Gram, points: Tensor, summit: _Summit, share: float) -> tuple[Tensor, _Summit]:
    """Return the points that may exceed a share of the certified level, and the summit, updated by estimates."""
    kept = []
    for chunk in gram.chunks(points):
        matrices = gram.at(chunk)
        estimates = lower_estimates(matrices, 12)
        top = int(estimates.argmax())
        summit = summit.raised(Peak(float(estimates[top]), top), chunk, gram.groups)
        level = share * (1 + _EIGENVALUE_RTOL) * summit.eigenvalue
        high = estimates > level
        if not high.all():
            high[~high] = may_exceed(matrices[~high], level, gram.slack)
        kept.append(chunk[high.view(len(chunk), gram.groups).any(1)])
    return torch.cat(kept), summit


def _highest_vector(kernel: Tensor, angles: list[Tensor]) -> tuple[float, _Summit]:
    """Return the largest norm on a full grid, and its place, for symbols that are a row or a column."""
    phases = [
        torch.exp(-1j * axis[:, None] * torch.arange(width)).to(kernel.device)
        for axis, width in zip(angles, kernel.shape[3:], strict=True)
    ]
    num_points = math.prod(len(axis) for axis in angles)
    summit, offset = _Summit(), 0
    for chunk in kernel.split(max(1, MAX_NUMBERS // (kernel.shape[1] * kernel.shape[2] * num_points))):
        symbol = chunk.to(torch.complex128)
        for phase in phases:
            symbol = torch.tensordot(symbol, phase, dims=([3], [1]))
        squares = symbol.flatten(3).abs().square().sum((1, 2)).flatten()
        group, point = divmod(int(squares.argmax()), num_points)
        if (square := float(squares.max())) > summit.eigenvalue:
            summit = _Summit(square, group + offset, _points(angles)[point])
        offset += len(chunk)
    num_taps = math.prod(kernel.shape[3:])
    return summit.eigenvalue**0.5 * (1 + roundoff(1, num_taps * kernel.shape[1] * kernel.shape[2])), summit


def _attach(value: float, summit: _Summit, kernel: Tensor) -> Tensor:
    """Return the value as a tensor, with the gradient of the singular value at the summit."""
    result = torch.tensor(value, dtype=torch.float64, device=kernel.device)
    if summit.angles is None or not carries_gradient(kernel):
        return result
    return with_gradient(result, _symbol(kernel[summit.group], summit.angles))


def _symbol(kernel: Tensor, angles: Tensor) -> Tensor:
    """Return the symbol ``(out, in)`` of the kernel ``(out, in, *kernel)`` at a frequency ``(axes,)``."""
    widths = kernel.shape[2:]
    taps = torch.cartesian_prod(*map(torch.arange, widths)).view(-1, len(widths)).to(kernel)
    return kernel.flatten(2).to(torch.complex128) @ torch.exp(-1j * (taps @ angles.to(kernel)))


def _centres(grid: tuple[int, ...]) -> list[Tensor]:
    """Return the centres of the cells per axis; along one axis only half of them."""
    angles = [(torch.arange(size, dtype=torch.float64) + 0.5) * (2 * math.pi / size) for size in grid]
    first = _halved_axis(grid)
    angles[first] = angles[first][: (grid[first] + 1) // 2]
    return angles


def _halved_axis(grid: tuple[int, ...]) -> int:
    """Return the longest axis."""
    return max(range(len(grid)), key=grid.__getitem__)


def _points(angles: list[Tensor]) -> Tensor:
    """Return all combinations ``(P, axes)``."""
    return torch.cartesian_prod(*angles).view(-1, len(angles))


def _subdivide(points: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return the centres of the cells after halving them along each axis with more than one cell."""
    steps = [torch.tensor([-1.0, 1.0]) * (math.pi / size) if size > 1 else torch.zeros(1) for size in sizes]
    return (points[:, None] + _points(steps).to(points)).flatten(0, 1)
