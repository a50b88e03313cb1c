"""Spectral norms of matrices: the certificate holds without the estimate, and the gradient is that of the value."""

import pytest
import torch
from torch.testing import assert_close

from fisher_reg.bounds.operator_norms import matrix
from fisher_reg.bounds.operator_norms.matrix import largest_norm, linear_norm, may_exceed, roundoff


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_level_is_exceeded_by_eigenvalues_above_it_and_by_no_others(dtype):
    factors = torch.randn(6, 20, 30, dtype=dtype)
    gram = factors @ factors.mH
    largest = torch.linalg.eigvalsh(gram)[:, -1]
    # round-off moves a level by less than 1e-10, and may_exceed takes as much off it
    assert roundoff(20, 30) < 1e-10
    for level in (largest.max().item() * (1 + 1e-9), largest.median().item() * (1 + 1e-9)):
        assert (may_exceed(gram, level, roundoff(20, 30)) == (largest > level)).all()
    assert may_exceed(gram, largest.min().item() * (1 - 1e-9), roundoff(20, 30)).all()


def test_a_useless_estimate_costs_time_and_no_certificate(monkeypatch):
    monkeypatch.setattr(matrix, "lower_estimates", lambda gram, steps: torch.full((len(gram),), 0.5).double())
    matrices = torch.randn(3, 40, 50, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrices, 2).max().item()
    # the eigenvalue's level climbs from far below by 1 + 2 * rtol per step, and ends at most one step above it
    assert exact * (1 - 1e-12) <= largest_norm(matrices, rtol=0.05).item() <= exact * 1.1**0.5 * (1 + 1e-12)


def test_few_and_many_matrices_and_chunks_of_them_have_the_same_norm(monkeypatch):
    matrices = torch.randn(9, 30, 20, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrices, 2).max().item()
    for numbers in (1, 600 * 4, 2**22):
        monkeypatch.setattr(matrix, "MAX_NUMBERS", numbers)
        value = largest_norm(matrices.clone().requires_grad_(), rtol=1e-6).item()
        assert exact * (1 - 1e-12) <= value <= exact * (1 + 3e-6)


@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (7, 5), (300, 270)])
def test_the_gradient_of_a_linear_norm_is_the_pair_of_leading_singular_vectors(shape):
    # 270 is beyond what is left to an eigenvalue solver
    torch.manual_seed(0)
    weight_matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight_matrix, full_matrices=False)
    weight = weight_matrix.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(linear_norm(weight), weight)
    # relative excess of the value 2e-6; the vectors are off by (1e-5 / gap)^6, the gap being above 1e-3 here
    assert values.shape[0] == 1 or values[1] < values[0] * (1 - 1e-3)
    assert_close(gradient, torch.outer(left[:, 0], right[0]), rtol=1e-4, atol=1e-7)


def test_the_gradient_at_equal_singular_values_is_a_unit_subgradient():
    weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear_norm(weight), weight)
    # one pair u u^T of the many: of nuclear norm 1, and <gradient, I> = 1
    assert_close(torch.linalg.matrix_norm(gradient, "nuc").item(), 1.0, rtol=1e-9, atol=0)
    assert_close(gradient.trace().item(), 1.0, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e-100, 1e100, 1e300])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    matrices = torch.randn(3, 20, 20, dtype=torch.complex128)
    assert_close(largest_norm(scale * matrices).item(), scale * largest_norm(matrices).item(), rtol=1e-12, atol=0)


def test_an_infinite_entry_gives_an_infinite_norm():
    assert linear_norm(torch.tensor([[1.0, float("inf")]])) == float("inf")
