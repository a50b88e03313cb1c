"""Certified norms against dense operators."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.testing import assert_close

from fisher_reg.bounds.conv import conv_norm, largest_norm, linear_norm

# out, in, kernel, size, stride, padding, dilation, groups
CONVOLUTIONS = [
    (4, 3, 3, 8, 1, 1, 1, 1),
    (4, 3, 3, 9, 2, 1, 1, 1),
    (4, 3, 7, 9, 2, 3, 1, 1),
    (4, 4, 3, 8, 1, 1, 1, 2),
    (4, 3, 1, 8, 2, 0, 1, 1),
    (6, 3, 3, 8, 1, 2, 2, 1),
    (4, 3, 4, 8, 4, 0, 1, 1),
    (5, 3, 2, 7, 3, 1, 2, 1),
    (3, 2, 5, 6, 1, 0, 1, 1),
    (2, 3, 3, 1, 1, 1, 1, 1),
    (4, 4, 3, 6, 1, 1, 1, 4),
]


def _dense(weight, size, stride, padding, dilation, groups):
    channels = weight.shape[1] * groups
    basis = torch.eye(channels * size * size, dtype=weight.dtype).view(-1, channels, size, size)
    output = F.conv2d(basis, weight, None, stride, padding, dilation, groups)
    return torch.linalg.matrix_norm(output.flatten(1), 2).item(), tuple(output.shape[2:])


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_bound_is_above_the_dense_norm_and_near_it(case):
    out, channels, kernel, size, stride, padding, dilation, groups = case
    for seed in range(3):
        torch.manual_seed(seed)
        weight = torch.randn(out, channels // groups, kernel, kernel, dtype=torch.float64)
        exact, output_size = _dense(weight, size, stride, padding, dilation, groups)
        bound = conv_norm(weight, output_size, (stride,) * 2, (dilation,) * 2, groups)
        assert exact <= bound * (1 + 1e-12)
        # the circular boundary sees whole kernels where the true one sees cut ones: loose on a tiny image
        if size >= 2 * kernel:
            assert bound <= 1.3 * exact


def test_a_one_by_one_convolution_is_exact():
    weight = torch.randn(6, 5, 1, 1, dtype=torch.float64)
    assert_close(conv_norm(weight, (4, 4), (1, 1), (1, 1), 1), linear_norm(weight[:, :, 0, 0]), rtol=2e-3, atol=0)


def test_other_dimensions():
    weight = torch.randn(4, 3, 3, dtype=torch.float64)
    basis = torch.eye(3 * 9, dtype=torch.float64).view(-1, 3, 9)
    exact = torch.linalg.matrix_norm(F.conv1d(basis, weight, padding=1, stride=2).flatten(1), 2).item()
    assert exact <= conv_norm(weight, (5,), (2,), (1,), 1) <= 1.3 * exact
    weight = torch.randn(2, 2, 2, 2, 2, dtype=torch.float64)
    basis = torch.eye(2 * 64, dtype=torch.float64).view(-1, 2, 4, 4, 4)
    exact = torch.linalg.matrix_norm(F.conv3d(basis, weight).flatten(1), 2).item()
    assert exact <= conv_norm(weight, (3, 3, 3), (1, 1, 1), (1, 1, 1), 1) <= 2 * exact


def test_the_flattened_kernel_is_not_a_bound_and_ours_is():
    # a constant kernel sums its taps: the operator norm tends to 9, the flattened kernel says 3
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    exact, output_size = _dense(weight, 16, 1, 1, 1, 1)
    assert linear_norm(weight.flatten(1)) < 0.4 * exact
    assert exact <= conv_norm(weight, output_size, (1, 1), (1, 1), 1) <= 1.05 * exact


@pytest.mark.parametrize("squarings", [1, 3, 9])
def test_gram_iteration_is_above_at_every_stage(squarings):
    matrices = torch.randn(20, 7, 5, dtype=torch.complex128)
    exact = torch.linalg.matrix_norm(matrices, 2).max().item()
    bound = largest_norm(matrices, max_squarings=squarings, rtol=0)
    assert exact * (1 - 1e-12) <= bound <= exact * 5 ** (0.5 ** (squarings + 2)) * (1 + 1e-12)


def test_zero_and_huge_and_tiny_matrices():
    assert largest_norm(torch.zeros(3, 4, 4, dtype=torch.complex128)) == 0
    for scale in (1e-100, 1e100):
        assert_close(largest_norm(scale * torch.eye(3, dtype=torch.complex128)[None]), scale, rtol=2e-3, atol=0)
