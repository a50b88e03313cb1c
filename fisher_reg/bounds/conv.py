r"""Certified operator norms of linear layers: never below the true norm.

A zero-padded convolution is a compression of a circular one on a grid that has room for every overlap, whose operator
norm is the largest norm of its symbol, one small matrix per frequency. A stride is first turned into channels
(polyphase form), which is exact. The norm of the flattened kernel is *not* an upper bound and is not used.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

_MAX_SYMBOL_NUMBERS = 2**24
"""Complex numbers held at once (256 MiB in double precision)."""


def linear_norm(weight: Tensor) -> float:
    """Return the spectral norm of a matrix, by its singular values."""
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def conv_norm(
    weight: Tensor, output_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> float:
    r"""Return an upper bound of the operator norm of a zero-padded convolution.

    Args:
        weight: ``(out_channels, in_channels / groups, *kernel)``.
        output_size: Spatial size of the output; with the kernel it fixes the grid.
        stride: Per axis.
        dilation: Per axis.
        groups: Channel groups; the operator is block-diagonal over them.

    Returns:
        A value at or above the norm. The excess is that of the circular boundary: a few per cent where the image is
        large against the kernel, several-fold where the kernel covers it (4 for 3 x 3 on a single pixel).
    """
    kernel = _polyphase(_dilate(weight.detach().double(), dilation), stride)
    # Along an axis of one tap the symbol is constant.
    grid = [size + width - 1 if width > 1 else 1 for size, width in zip(output_size, kernel.shape[2:], strict=True)]
    blocks = kernel.reshape(groups, -1, *kernel.shape[1:])
    axes = tuple(range(-len(grid), 0))
    frequencies = math.prod(grid[:-1]) * (grid[-1] // 2 + 1)
    step = max(1, _MAX_SYMBOL_NUMBERS // max(1, blocks[0].shape[0] * blocks[0].shape[1] * frequencies))
    norms = []
    for chunk in blocks.split(step):
        symbol = torch.fft.rfftn(chunk, grid, dim=axes).flatten(3).movedim(3, 1).flatten(0, 1)
        norms.append(largest_norm(symbol))
    return max(norms)


def largest_norm(matrices: Tensor, max_squarings: int = 9, rtol: float = 1e-3) -> float:
    r"""Return an upper bound of the largest spectral norm of a stack of matrices ``(M, a, b)``, by Gram iteration.

    With :math:`G_0 = X X^*` and :math:`G_{t+1} = G_t G_t^*`, for every t

    .. math:: \|G_t\|_F^2 / \operatorname{tr} G_t \le \|X\|_2^{2^{t+1}} \le \|G_t\|_F ,

    so that the bound overestimates by a factor of at most :math:`\min(a, b)^{2^{-t-2}}` after t squarings (0.3 % for
    512 channels at the default). A matrix whose upper bound lies below another's lower bound is dropped on the way, and
    the iteration ends when the two agree to ``rtol``.

    Reference: Delattre et al. (2023), "Efficient bound of Lipschitz constant for convolutional layers by Gram
    iteration", arXiv 2305.16173.
    """
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mH
    largest = float(matrices.abs().max())
    if largest == 0:
        return 0.0
    matrices = matrices / largest  # so that nothing overflows or underflows
    gram = matrices @ matrices.mH
    log_scale = gram.new_zeros(len(gram), dtype=torch.float64)
    for squaring in range(max_squarings):
        frobenius = torch.linalg.matrix_norm(gram)
        exponent = 0.5 ** (squaring + 1)
        trace = gram.diagonal(dim1=1, dim2=2).sum(1).real
        log_upper = (log_scale + frobenius.log()) * exponent
        log_lower = (log_scale + (frobenius**2 / trace.clamp_min(torch.finfo(trace.dtype).tiny)).log()) * exponent
        if bool(log_upper.max() - log_lower.max() < rtol):
            return largest * float(log_upper.max().exp())
        alive = (frobenius > 0) & (log_upper >= log_lower.max())
        gram, frobenius, log_scale = gram[alive], frobenius[alive], log_scale[alive]
        gram = gram / frobenius[:, None, None]
        gram = gram @ gram.mH
        log_scale = 2 * (log_scale + frobenius.log())
    log_upper = (log_scale + torch.linalg.matrix_norm(gram).log()) * 0.5 ** (max_squarings + 1)
    return largest * float(log_upper.max().exp())


def _dilate(weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """Put the zeros between the taps."""
    sizes = [(width - 1) * gap + 1 for width, gap in zip(weight.shape[2:], dilation, strict=True)]
    dilated = weight.new_zeros(*weight.shape[:2], *sizes)
    dilated[(slice(None), slice(None), *(slice(None, None, gap) for gap in dilation))] = weight
    return dilated


def _polyphase(weight: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the stride-1 kernel over ``prod(stride)`` times as many input channels that does the same."""
    padding = [(-width) % step for width, step in zip(weight.shape[2:], stride, strict=True)]
    padded = torch.nn.functional.pad(weight, [side for extra in reversed(padding) for side in (0, extra)])
    phases = product(*(range(step) for step in stride))
    taps = [tuple(slice(first, None, step) for first, step in zip(phase, stride, strict=True)) for phase in phases]
    return torch.cat([padded[(slice(None), slice(None), *tap)] for tap in taps], dim=1)
