import copy

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


def test_a_difference_quotient_is_the_product_to_half_the_digits(trained, digits):
    # on noisy images, since flat backgrounds lie on the kinks of max pooling
    x = cases.test_images(digits, 32).double()
    x = x + 0.05 * torch.randn_like(x)
    fisher = InputFisher(copy.deepcopy(trained).double(), x, Categorical(), quotients=True)
    start = fisher.starts(1)[:, 0]
    row = fisher.adjoint(start)
    v = row / row.norm(dim=1, keepdim=True)
    exact = fisher.apply(v)
    error = (fisher.apply(v, slope=fisher.slope_along(start, row)) - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0 < error.median() < 1e-6


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_step_of_a_quotient_follows_the_unit_of_the_inputs(scale):
    model = cases.tiny_network()
    x = torch.randn(5, 6)
    fisher = InputFisher(lambda y: model(y / scale), x * scale, Categorical(), quotients=True)
    start = fisher.starts(1)[:, 0]
    row = fisher.adjoint(start)
    exact = fisher.apply(row)
    assert_close(
        fisher.apply(row, slope=fisher.slope_along(start, row)), exact, rtol=0, atol=5e-3 * exact.abs().max().item()
    )


def test_a_part_of_a_batch_is_its_own_operator_unless_the_graph_must_not_be_rebuilt():
    fisher, _, _ = _fisher(input_std=torch.full((6,), 2.0))
    keep = torch.tensor([True, False, True])
    u = torch.randn(3, 4, dtype=torch.float64)
    assert_close(fisher.restrict(keep).adjoint(u[keep]), fisher.adjoint(u)[keep])
    stored, _, _ = _fisher(double_backward)
    assert stored.restrict(keep) is None


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
