import pytest
import torch
from torch.testing import assert_close

from fisher_reg import Categorical
from fisher_reg.operator import InputFisher, double_backward, forward_mode, vjp_only
from fisher_reg.solvers import dense_rows
from tests import cases, oracles


def _fisher(linearize=forward_mode, **kwargs):
    model, x = cases.tiny_network().double(), torch.randn(3, 6, dtype=torch.float64)
    return InputFisher(model, x, Categorical(), linearize=linearize, **kwargs), model, x


@pytest.mark.parametrize("linearize", [forward_mode, double_backward])
def test_apply_and_adjoint_are_transposes_of_each_other(linearize):
    fisher, _, _ = _fisher(linearize)
    v, u = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert_close((fisher.apply(v) * u).sum(1), (v * fisher.adjoint(u)).sum(1))


@pytest.mark.parametrize("linearize", [forward_mode, double_backward])
def test_the_product_with_a_vector_is_that_of_the_dense_matrix(linearize):
    fisher, model, x = _fisher(linearize)
    dense = oracles.fisher_by_scores(model, x)
    v = torch.randn(3, 6, dtype=torch.float64)
    assert_close(fisher.adjoint(fisher.apply(v)), (dense @ v[:, :, None]).squeeze(2))
    rows = dense_rows(fisher)
    assert_close(rows.mT @ rows, dense)


def test_both_linearizations_agree_on_a_trained_network(trained, digits):
    x = cases.test_images(digits, 4)
    with oracles.sdpa_kernel(oracles.SDPBackend.MATH):
        v = torch.randn(4, x[0].numel())
        images = [
            InputFisher(trained, x, Categorical(), linearize=rule).apply(v) for rule in (forward_mode, double_backward)
        ]
    assert_close(*images, rtol=1e-3, atol=1e-5)


def test_backward_only_says_so():
    fisher, _, _ = _fisher(vjp_only)
    with pytest.raises(NotImplementedError, match="backward passes only"):
        fisher.apply(torch.zeros(3, 6))


def test_split_gives_the_same_operator_in_pieces():
    fisher, _, _ = _fisher(input_std=torch.full((6,), 2.0))
    u = torch.randn(3, 4, dtype=torch.float64)
    pieces = list(fisher.split(2))
    assert [len(piece.inputs) for piece in pieces] == [2, 1]
    assert_close(
        torch.cat([piece.adjoint(part) for piece, part in zip(pieces, u.split(2), strict=True)]), fisher.adjoint(u)
    )
