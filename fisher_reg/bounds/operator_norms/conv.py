r"""Certified operator norms of convolutions: upper bounds of the true norms.

A stride is first converted to channels (polyphase form), which is exact. The resulting convolution of stride 1 is a
compression of a circular convolution on any grid that is large enough to avoid overlap. The norm of the latter is the
largest norm of its symbol

.. math:: X(\omega) = \sum_t W_t e^{-i t \cdot \omega},

one small matrix per frequency of the grid, and at most the supremum over all frequencies. The norm of the flattened
kernel is *not* an upper bound and is not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fisher_reg.bounds.operator_norms.matrix import (
    is_settled,
    largest_entry,
    largest_norm,
    vanishing,
)
from fisher_reg.bounds.operator_norms.symbols import fine_grid, norm_everywhere, norm_on_grid, num_frequencies
from fisher_reg.errors import NoBoundError

_MAX_DENSE_SIDE = 1024
"""The dense operator is formed if its shorter side per group is at most this, ..."""
_MAX_DENSE_NUMBERS = 2**24
"""... and if it has at most this number of entries (128 MiB)."""


@dataclass(frozen=True)
class Geometry:
    """Sizes and settings of a convolution.

    Args:
        input_size: One entry per spatial axis, as for stride, padding and dilation.
        stride: The step between outputs.
        padding: Number of entries added on either side.
        dilation: The step between taps.
        groups: Number of channel groups, over which the operator is block-diagonal.
        padding_mode: "zeros", "circular", "reflect" or "replicate".

    Example:
        >>> Geometry.of(nn.Conv2d(3, 8, 3, stride=2, padding=1), (32, 32)).output_size((3, 3))
        (16, 16)
    """

    input_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: _ConvNd, input_size: tuple[int, ...]) -> Geometry:
        """Return the geometry of a convolution module on inputs of a spatial size.

        Raises:
            NoBoundError: If padding="same" is not symmetric.
        """
        padding = module.padding
        if padding == "valid":
            padding = (0,) * len(input_size)
        elif padding == "same":
            totals = [gap * (width - 1) for width, gap in zip(module.kernel_size, module.dilation, strict=True)]
            if any(total % 2 for total in totals):
                raise NoBoundError(
                    f"{module} pads by {totals} in total, which is more on one side than on the other, and has no "
                    "bound; use a kernel of odd size, or pad before it."
                )
            padding = tuple(total // 2 for total in totals)
        padding = tuple(int(amount) for amount in padding)
        return cls(input_size, module.stride, padding, module.dilation, module.groups, module.padding_mode)

    def output_size(self, kernel_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the output."""
        axes = zip(self.input_size, self.stride, self.padding, self.dilation, kernel_size, strict=True)
        return tuple((size + 2 * pad - gap * (width - 1) - 1) // step + 1 for size, step, pad, gap, width in axes)

    def sources(self, axis: int) -> Tensor:
        """Return the input position of which each position of the padded axis is a copy; -1 for a zero."""
        pad, positions = self.padding[axis], torch.arange(self.input_size[axis], dtype=torch.float64)[None, None]
        if self.padding_mode == "zeros":
            return nn.functional.pad(positions, (pad, pad), value=-1.0).flatten().long()
        return nn.functional.pad(positions, (pad, pad), mode=self.padding_mode).flatten().long()


def conv_norm(weight: Tensor, geometry: Geometry, *, dense: bool = True) -> Tensor:
    r"""Return an upper bound of the operator norm of a convolution, up to rounding.

    The norm is exact for a small operator, which is formed, and for a kernel of one tap. Otherwise there is an excess
    by the circular boundary, a few per cent if the image is much larger than the kernel, and about one per cent by
    :func:`~fisher_reg.bounds.operator_norms.symbols.norm_everywhere`. Padding that repeats the input multiplies the
    bound by the norm of the padding, except circular padding, which the symbol already assumes.

    Args:
        weight: ``(out_channels, in_channels / groups, *kernel)``.
        geometry: Sizes and settings of the convolution.
        dense: Whether the dense operator may be formed.

    Returns:
        ``()`` in float64. Its gradient is that of the singular value at the frequency of the maximum; zero where the
        norm is zero. NaN entries give NaN.

    Example:
        >>> geometry = Geometry((8,), stride=(1,), padding=(0,), dilation=(1,))
        >>> float(conv_norm(torch.full((1, 1, 1), -2.0), geometry))
        2.0
    """
    weight = weight.double()
    scale = largest_entry(weight)
    if is_settled(scale):
        return scale + vanishing(weight)
    kernel = weight.view(geometry.groups, -1, *weight.shape[1:]) / scale
    one_tap = all(_num_taps(geometry, axis, width) == 1 for axis, width in enumerate(kernel.shape[3:]))
    if one_tap and not any(geometry.padding):
        return scale * largest_norm(_polyphase(kernel, geometry.stride, geometry.dilation).flatten(2), rtol=1e-6)
    if dense and _is_small(kernel, geometry):
        return scale * largest_norm(_dense_operator(kernel, geometry), rtol=1e-6)
    return scale * _padding_norm(kernel, geometry) * _symbol_norm(kernel, geometry)  # ||C|| <= ||P|| sup ||X(omega)||


def conv_transpose_norm(weight: Tensor, geometry: Geometry, *, dense: bool = True) -> Tensor:
    """Return an upper bound of the operator norm of a transposed convolution, equal to that of its adjoint.

    Args:
        weight: ``(in_channels, out_channels / groups, *kernel)``, which is also the weight of the adjoint.
        geometry: That of the adjoint, which maps the transposed convolution's output space to its input space.
        dense: As in :func:`conv_norm`.

    Returns:
        As :func:`conv_norm`.

    Raises:
        NoBoundError: If the padding is not with zeros.
    """
    if geometry.padding_mode != "zeros":
        raise NoBoundError(f"A transposed convolution pads only with zeros; got {geometry.padding_mode!r}.")
    return conv_norm(weight, geometry, dense=dense)


def _symbol_norm(kernel: Tensor, geometry: Geometry) -> Tensor:
    """Return the largest norm of the symbol, on a sufficient grid or over all frequencies, whichever costs less."""
    grid = tuple(_grid_size(geometry, axis, width) for axis, width in enumerate(kernel.shape[3:]))
    # A dilation of the taps only rescales the frequencies, which does not change the supremum over all of them.
    gaps = tuple(1 if step == 1 else gap for step, gap in zip(geometry.stride, geometry.dilation, strict=True))
    undilated = _polyphase(kernel, geometry.stride, gaps)
    if num_frequencies(fine_grid(undilated)) < num_frequencies(grid):
        return norm_everywhere(undilated)
    return norm_on_grid(_polyphase(kernel, geometry.stride, geometry.dilation), grid)


def _num_taps(geometry: Geometry, axis: int, width: int) -> int:
    """Return the number of taps along an axis of the polyphase form of a kernel."""
    return (width - 1) * geometry.dilation[axis] // geometry.stride[axis] + 1


def _wraps(geometry: Geometry, axis: int, width: int) -> bool:
    """Return whether circular padding makes the convolution circular along an axis, in steps of the stride."""
    size, step = geometry.input_size[axis], geometry.stride[axis]
    outputs = geometry.output_size((width,) * len(geometry.input_size))[axis]
    return geometry.padding_mode == "circular" and size % step == 0 and outputs * step <= size


def _grid_size(geometry: Geometry, axis: int, width: int) -> int:
    r"""Return the size of a circular axis of which the convolution is a part.

    In steps of the stride, tap q - p connects input q and output p. On N points no pair is connected twice if the last
    q is below N, and the first q minus the last p plus N is larger than the last tap.
    """
    step, pad, taps = geometry.stride[axis], geometry.padding[axis], _num_taps(geometry, axis, width)
    if taps == 1:
        return 1  # a constant symbol
    if _wraps(geometry, axis, width):
        return geometry.input_size[axis] // step
    outputs = geometry.output_size((width,) * len(geometry.input_size))[axis]
    length = geometry.input_size[axis] + pad
    if geometry.padding_mode != "zeros":
        length, pad = length + pad, 0  # padded entries count as inputs
    first, last = pad // step, min((length - 1) // step, outputs + taps - 2)
    return max(last + 1, outputs + taps - 1 - first, outputs)


def _padding_norm(kernel: Tensor, geometry: Geometry) -> float:
    """Return the norm of the padding, without circular axes: sqrt(r) if an input entry is repeated r times."""
    repeats = [
        int(geometry.sources(axis).bincount().max())
        for axis, width in enumerate(kernel.shape[3:])
        if geometry.padding_mode != "zeros" and not _wraps(geometry, axis, width)
    ]
    return math.sqrt(math.prod(repeats))


def _is_small(kernel: Tensor, geometry: Geometry) -> bool:
    """Return whether the operator is small enough to be formed."""
    rows = kernel.shape[1] * math.prod(geometry.output_size(tuple(kernel.shape[3:])))
    columns = kernel.shape[2] * math.prod(geometry.input_size)
    return min(rows, columns) <= _MAX_DENSE_SIDE and kernel.shape[0] * rows * columns <= _MAX_DENSE_NUMBERS


def _dense_operator(kernel: Tensor, geometry: Geometry) -> Tensor:
    """Return the operator ``(groups, out * outputs, in * inputs)`` of the kernel ``(groups, out, in, *kernel)``."""
    outputs = geometry.output_size(tuple(kernel.shape[3:]))
    operator = kernel
    for axis, width in enumerate(kernel.shape[3:]):
        starts = geometry.stride[axis] * torch.arange(outputs[axis])
        taps = geometry.dilation[axis] * torch.arange(width)
        seen = geometry.sources(axis)[starts[:, None] + taps]
        meets = seen[..., None] == torch.arange(geometry.input_size[axis])  # output, tap, input
        # (g, o, i, this tap, other taps, p, x, ...): replaces this axis of taps by output and input axes at the end
        operator = torch.tensordot(operator, meets.to(kernel), dims=([3], [1]))
    pairs = list(range(3, operator.ndim))
    operator = operator.permute(0, 1, *pairs[::2], 2, *pairs[1::2])
    return operator.reshape(kernel.shape[0], kernel.shape[1] * math.prod(outputs), -1)


def _polyphase(kernel: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Return the equivalent stride-1 kernel, whose channels are the phases of the input that have taps."""
    widths = kernel.shape[3:]
    axes = list(zip(widths, stride, dilation, strict=True))
    lengths = [((width - 1) * gap // step + 1) * step for width, step, gap in axes]
    dilated = kernel.new_zeros(*kernel.shape[:3], *lengths)
    whole = (slice(None),) * 3
    dilated[(*whole, *(slice(0, (width - 1) * gap + 1, gap) for width, _, gap in axes))] = kernel
    phases = product(*(sorted({tap * gap % step for tap in range(width)}) for width, step, gap in axes))
    taps = [tuple(slice(first, None, step) for first, step in zip(phase, stride, strict=True)) for phase in phases]
    return torch.cat([dilated[(*whole, *tap)] for tap in taps], dim=2)
