"""Largest norms of symbols, against the circular operator and fine grids."""

import math

import pytest
import torch
from torch.testing import assert_close

from fisher_reg.bounds.operator_norms import symbols
from fisher_reg.bounds.operator_norms.symbols import fine_grid, norm_everywhere, norm_on_grid

# groups, out, in, *kernel
SHAPES = [
    (1, 3, 4, 3, 3),
    (1, 6, 2, 5, 4),
    (3, 2, 3, 3, 2),
    (1, 3, 3, 4, 1),
    (2, 4, 3, 5),
    (5, 1, 1, 7, 7),
    (1, 1, 6, 3),
]
# A norm of width 1 / d in frequency falls by (pi d / 192)^2 / 2 per axis between the points of a grid of 192: 0.5 % for
# 7 taps along 2 axes.
_FINE, _FINE_ERROR = 192, 0.005


def _peaked(shape, seed):
    """A random kernel and a plane wave of rank one, whose symbol has one peak somewhere."""
    torch.manual_seed(seed)
    wave = sum(
        (6.3 * torch.rand(1) * torch.arange(width)).view(
            [-1 if axis == other else 1 for other in range(len(shape) - 3)]
        )
        for axis, width in enumerate(shape[3:])
    )
    vectors = torch.randn(shape[1], 1) * torch.randn(1, shape[2])
    kernel = 0.1 * torch.randn(shape)
    kernel[seed % shape[0]] += vectors.view(*vectors.shape, *[1] * wave.ndim) * wave.cos()
    return kernel.double()


def _norms(kernel, points):
    """The norm of the symbol by its definition, everywhere on a grid: ``(groups, *grid)``."""
    for width in kernel.shape[3:]:
        angles = torch.arange(points).double() * (2 * math.pi / points)
        waves = torch.exp(-1j * angles[:, None] * torch.arange(width))
        kernel = torch.tensordot(kernel.to(waves), waves, dims=([3], [1]))
    return torch.linalg.matrix_norm(kernel, 2, dim=(1, 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_on_a_grid_is_that_of_the_circular_operator_even_when_the_kernel_is_larger(shape):
    for points in (1, 2, 3, 8):
        kernel = _peaked(shape, points)
        exact = _norms(kernel, points).max().item()
        # by 1 + 2e-3 in the eigenvalue, twice if the estimate has to be raised
        assert exact * (1 - 1e-12) <= norm_on_grid(kernel, (points,) * len(shape[3:])).item() <= exact * 1.0021


@pytest.mark.parametrize("excess", [0.01, 0.1, 0.2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_search_loses_no_peak_however_coarse_its_grids(shape, excess, monkeypatch):
    monkeypatch.setattr(symbols, "_GRID_EXCESSES", ((excess, math.inf),))
    for seed in range(4):
        kernel = _peaked(shape, seed)
        fine = _norms(kernel, _FINE).max().item()
        # prod cos(x_a) with sum x_a^2 / 2 = excess exceeds 1 - excess
        assert fine <= norm_everywhere(kernel).item() * (1 + 1e-12)
        assert norm_everywhere(kernel).item() <= fine * 1.0021 * (1 + _FINE_ERROR) / (1 - excess)


def test_the_search_finds_a_peak_between_its_points_beside_a_lower_one_on_a_point(monkeypatch):
    # 2 cos(2 w) falls as fast as 5 taps can: it is the case of equality of the inequality that the search rests on
    monkeypatch.setattr(symbols, "_GRID_EXCESSES", ((0.01, math.inf),))
    kernel = torch.zeros(1, 2, 2, 5, dtype=torch.float64)
    kernel[0, 0, 0, 0] = kernel[0, 0, 0, 4] = 1.0  # peaks at multiples of 90 degrees
    kernel[0, 1, 1, 0], kernel[0, 1, 1, 4] = 0.97, -0.97  # peaks half way between
    assert fine_grid(kernel) == (48,)  # so that the first grid has the points 15, 45, 75, ... degrees
    assert 2.0 <= norm_everywhere(kernel).item() <= 2.0 * 1.0021 / math.cos(math.pi * 2 / 48)


def test_the_search_looks_at_few_points_of_a_peaked_symbol(monkeypatch):
    seen, at = [], symbols._Gram.at
    monkeypatch.setattr(symbols._Gram, "at", lambda gram, angles: seen.append(len(angles)) or at(gram, angles))
    kernel = _peaked((1, 64, 64, 3, 3), 0)
    norm_everywhere(kernel)
    assert math.prod(fine_grid(kernel)) == 32**2
    assert sum(seen) < 32**2 / 4


def test_the_norm_is_that_of_the_transpose_and_of_the_dilated_kernel():
    kernel = _peaked((1, 3, 5, 3, 3), 0)
    dilated = torch.zeros(1, 3, 5, 5, 7, dtype=torch.float64)
    dilated[..., ::2, ::3] = kernel
    # each is up to 0.25 % (grid) and 0.2 % (certificate) above the common supremum
    assert fine_grid(kernel) == (64, 64)
    for other in (kernel.transpose(1, 2), dilated):
        assert_close(norm_everywhere(other).item(), norm_everywhere(kernel).item(), rtol=4.5e-3, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_is_the_slope_of_the_largest_norm(shape):
    kernel = _peaked(shape, 0).requires_grad_()
    direction = torch.randn(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(norm_everywhere(kernel), kernel)
    with torch.no_grad():
        ends = [_norms(kernel + step * direction, _FINE).max().item() for step in (1e-4, -1e-4)]
    # the frequency of the gradient is up to half a spacing of the search's grid, 0.05 / d, from that of the maximum, so
    # that a tap turns by up to 0.05
    slope = (ends[0] - ends[1]) / 2e-4
    assert_close((gradient * direction).sum().item(), slope, rtol=0.05, atol=0.05 * gradient.norm().item())
    # exact at any frequency: the norm is homogeneous
    assert_close((gradient * kernel).sum().item(), norm_everywhere(kernel).item(), rtol=1e-9, atol=0)
