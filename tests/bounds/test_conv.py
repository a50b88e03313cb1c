"""Certified norms against dense operators: never below, and near."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.testing import assert_close

from fisher_reg import NoBoundError
from fisher_reg.bounds.operator_norms.conv import Geometry, conv_norm, conv_transpose_norm
from fisher_reg.bounds.operator_norms.matrix import largest_norm, linear_norm
from fisher_reg.bounds.operator_norms.symbols import norm_everywhere

# module, spatial size
CONVOLUTIONS = [
    (nn.Conv2d(3, 4, 3, 1, 1), (8, 8)),
    (nn.Conv2d(3, 4, 3, 2, 1), (9, 9)),
    (nn.Conv2d(3, 4, 7, 2, 3), (9, 9)),
    (nn.Conv2d(3, 4, 7, 4, 2), (15, 12)),
    (nn.Conv2d(4, 4, 3, 1, 1, groups=2), (8, 8)),
    (nn.Conv2d(4, 4, 3, 1, 1, groups=4), (6, 6)),
    (nn.Conv2d(3, 4, 1, 2), (8, 8)),
    (nn.Conv2d(3, 4, 1, 1, 1), (5, 5)),
    (nn.Conv2d(3, 6, 3, 1, 2, dilation=2), (8, 8)),
    (nn.Conv2d(2, 3, 3, 2, 2, dilation=3), (9, 10)),
    (nn.Conv2d(3, 4, 4, 4), (8, 8)),
    (nn.Conv2d(3, 5, 2, 3, 1, dilation=2), (7, 7)),
    (nn.Conv2d(2, 3, 5), (6, 6)),
    (nn.Conv2d(2, 3, (1, 4), (2, 1), (0, 2)), (7, 6)),
    (nn.Conv2d(3, 2, 3, 1, 1), (1, 1)),
    (nn.Conv2d(3, 2, 3, 1, 1), (2, 3)),
    (nn.Conv2d(3, 4, 3, 1, 1, padding_mode="circular"), (6, 8)),
    (nn.Conv2d(3, 4, 3, 2, 1, padding_mode="circular"), (6, 8)),
    (nn.Conv2d(3, 4, 3, 1, 1, padding_mode="reflect"), (6, 6)),
    (nn.Conv2d(3, 4, 5, 2, 2, padding_mode="replicate"), (7, 7)),
    (nn.Conv1d(3, 4, 3, 2, 1), (9,)),
    (nn.Conv1d(2, 4, 4, 1, 2, dilation=2), (11,)),
    (nn.Conv3d(2, 2, 2), (4, 4, 4)),
    (nn.Conv3d(1, 2, 3, 2, 1), (5, 4, 5)),
]


def _operator(function, shape):
    """The matrix of a linear function, by a basis."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return function(basis).flatten(1).mT


def _random(module, seed=0):
    torch.manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        module.weight.normal_()
        if module.bias is not None:
            module.bias.zero_()
    return module


@pytest.mark.parametrize(("module", "size"), CONVOLUTIONS, ids=str)
def test_a_convolution_is_bounded_by_its_matrix_exactly_and_by_its_symbol_above(module, size):
    for seed in range(3):
        module = _random(module, seed)
        geometry = Geometry.of(module, size)
        with torch.no_grad():
            exact = torch.linalg.matrix_norm(_operator(module, (module.in_channels, *size)), 2).item()
            dense, symbol = (conv_norm(module.weight, geometry, dense=flag).item() for flag in (True, False))
        assert_close(dense, exact, rtol=1e-5, atol=0)  # the certificate's margin is 1e-6
        assert exact <= dense * (1 + 1e-12)
        assert exact <= symbol * (1 + 1e-12)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("kernel", ["random", "smooth"])
def test_the_excess_of_the_symbol_falls_with_the_size_of_the_image(size, kernel):
    torch.manual_seed(0)
    weight = torch.randn(6, 6, 3, 3, dtype=torch.float64)
    if kernel == "smooth":
        weight = weight[:, :, :1, :1] * torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).double()
    geometry = Geometry((size, size), (1, 1), (1, 1), (1, 1))
    exact = torch.linalg.matrix_norm(_operator(lambda x: F.conv2d(x, weight, padding=1), (6, size, size)), 2).item()
    # a peak of width 1 in frequency is missed by a grid of n points by about (pi / n)^2 per axis
    assert exact <= conv_norm(weight, geometry, dense=False).item() <= exact * (1 + 2 * (math.pi / size) ** 2)


@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (5, 4, 7, 7), (3, 3, 4, 2), (4, 3, 5), (2, 3, 2, 3, 2), (3, 4, 1, 3)])
def test_the_norm_over_all_frequencies_is_above_a_fine_grid_by_a_per_cent(shape):
    for seed in range(3):
        torch.manual_seed(seed)
        weight = torch.randn(shape, dtype=torch.float64)
        axes = tuple(range(2, len(shape)))
        points = {1: 4096, 2: 128, 3: 24}[len(axes)]
        symbol = torch.fft.fftn(weight, [points] * len(axes), dim=axes).flatten(2).movedim(2, 0)
        fine = torch.linalg.matrix_norm(symbol, 2).max().item()
        assert fine <= norm_everywhere(weight[None]).item() * (1 + 1e-12)
        if len(axes) < 3:
            assert norm_everywhere(weight[None]).item() <= 1.015 * fine


def test_the_norm_on_a_large_image_does_not_depend_on_its_size():
    torch.manual_seed(0)
    weight = torch.randn(8, 8, 3, 3, dtype=torch.float64)
    norms = [conv_norm(weight, Geometry((size, size), (1, 1), (1, 1), (1, 1))).item() for size in (224, 1000)]
    assert norms[0] == norms[1]


def test_the_flattened_kernel_is_not_a_bound_and_ours_is():
    # a constant kernel sums its taps: the operator norm tends to 9, the flattened kernel says 3
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(_operator(lambda x: F.conv2d(x, weight, padding=1), (1, 16, 16)), 2).item()
    assert linear_norm(weight.flatten(1)).item() < 0.4 * exact
    for dense in (True, False):
        bound = conv_norm(weight, Geometry((16, 16), (1, 1), (1, 1), (1, 1)), dense=dense).item()
        assert exact <= bound * (1 + 1e-12) <= 1.05 * exact
    assert_close(norm_everywhere(weight[None]).item(), 9.0, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.ConvTranspose1d(3, 4, 3, 2, 1, 1), (5,)),
        (nn.ConvTranspose2d(3, 4, 3, 2, 1), (4, 4)),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (4, 4)),
        (nn.ConvTranspose2d(2, 3, 3, 1, 0, dilation=2), (4, 3)),
    ],
    ids=str,
)
def test_a_transposed_convolution_has_the_norm_of_its_adjoint(module, size):
    module = _random(module)
    matrix = _operator(module, (module.in_channels, *size))
    with torch.no_grad():
        output = module(torch.zeros(1, module.in_channels, *size, dtype=torch.float64)).shape[2:]
        geometry = Geometry(tuple(output), module.stride, module.padding, module.dilation, module.groups)
        exact = torch.linalg.matrix_norm(matrix, 2).item()
        assert_close(conv_transpose_norm(module.weight, geometry).item(), exact, rtol=1e-5, atol=0)
        assert exact <= conv_transpose_norm(module.weight, geometry, dense=False).item() * (1 + 1e-12)
    with pytest.raises(NoBoundError, match="pads only with zeros; got 'reflect'"):
        conv_transpose_norm(module.weight, Geometry(size, (1,), (1,), (1,), padding_mode="reflect"))


def test_asymmetric_padding_is_refused():
    with pytest.raises(NoBoundError, match="more on one side"):
        Geometry.of(nn.Conv2d(2, 2, 2, padding="same"), (5, 5))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 6), (6, 1), (30, 2000)])
def test_a_linear_norm_is_the_largest_singular_value(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrix, 2).item()
    assert exact * (1 - 1e-12) <= linear_norm(matrix).item() <= exact * (1 + 1e-5)


def test_a_stack_of_large_matrices_is_certified_by_factorisations():
    # 300 rows are beyond what is left to an eigenvalue solver when several matrices are compared
    torch.manual_seed(0)
    matrices = torch.randn(4, 300, 300, dtype=torch.complex128)
    matrices[2] *= 1.001
    exact = torch.linalg.matrix_norm(matrices, 2).max().item()
    for rtol in (1e-3, 1e-6):
        assert exact * (1 - 1e-12) <= largest_norm(matrices, rtol=rtol).item() <= exact * (1 + 2 * rtol)


def test_a_start_orthogonal_to_the_top_vector_does_not_hide_it():
    # An iteration that starts in the kernel of the top direction sees only the second value; the certificate does not.
    for seed in range(20):
        torch.manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
        values = torch.cat([torch.tensor([1.01]), torch.ones(63)]).double()
        matrices = (basis * values) @ basis.mT
        norm = largest_norm(torch.stack([matrices, torch.eye(64).double()]), rtol=1e-4).item()
        assert 1.01 * (1 - 1e-12) <= norm <= 1.01 * (1 + 3e-4)


def test_zero_huge_tiny_and_broken_weights():
    geometry = Geometry((6, 6), (1, 1), (1, 1), (1, 1))
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    for dense in (True, False):
        norm = conv_norm(weight, geometry, dense=dense).item()
        assert conv_norm(torch.zeros(3, 2, 3, 3), geometry, dense=dense) == 0
        for scale in (1e-100, 1e100):
            assert_close(conv_norm(scale * weight, geometry, dense=dense).item(), scale * norm, rtol=1e-9, atol=0)
        assert conv_norm(weight * math.nan, geometry, dense=dense).isnan()
    assert linear_norm(torch.zeros(3, 4)) == 0
    assert linear_norm(torch.full((3, 4), math.nan)).isnan()


@pytest.mark.parametrize("dense", [True, False])
def test_the_gradient_of_a_convolution_norm_is_its_slope(dense):
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    geometry = Geometry((6, 6), (2, 2), (1, 1), (1, 1))
    (gradient,) = torch.autograd.grad(conv_norm(weight, geometry, dense=dense), weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        ends = [conv_norm(weight + h * direction, geometry, dense=dense).item() for h in (1e-3, -1e-3)]
    # the certified value carries a relative margin of up to 1e-3 that need not vary smoothly
    slope = (ends[0] - ends[1]) / 2e-3
    assert_close((gradient * direction).sum().item(), slope, rtol=2e-2 if dense else 0.2, atol=0)
    assert_close((gradient * weight).sum().item(), conv_norm(weight, geometry, dense=dense).item(), rtol=1e-6, atol=0)


def test_the_gradient_of_a_zero_norm_is_zero():
    weight = torch.zeros(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(conv_norm(weight, Geometry((6, 6), (1, 1), (1, 1), (1, 1))), weight)
    assert (gradient == 0).all()
    matrix = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear_norm(matrix), matrix)
    assert (gradient == 0).all()
