"""The spectral penalty in the linf norm: its value and its gradient against a dense expression over all vertices."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from fisher_reg import (
    L2,
    Bernoulli,
    Gaussian,
    LInf,
    SpectralPenalty,
    fisher_linf_norm,
    mean_log1p,
)
from tests import cases

VERTICES = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)


def _dense_values(model, x, covariance, std=1.0):
    """max over all vertices of s^T F s, (B,), with a graph to the parameters."""
    values = []
    for example in x:
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], example, create_graph=True) / std
        moved = VERTICES @ jacobian.T  # (2^d, K)
        values.append(((moved @ covariance(model(example[None])[0])) * moved).sum(1).max())
    return torch.stack(values)


def _categorical(z):
    p = z.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def _gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize(
    ("likelihood", "covariance"),
    [
        (None, _categorical),
        (Bernoulli(), lambda z: torch.diag(z.sigmoid() * (1 - z.sigmoid()))),
        (Gaussian(variance=0.5), lambda z: 2 * torch.eye(4, dtype=torch.float64)),
    ],
)
def test_the_gradient_is_that_of_the_best_vertex(likelihood, covariance):
    model, x = cases.tiny_network().double(), torch.randn(5, 6, dtype=torch.float64)
    expected = _dense_values(model, x, covariance).mean()
    chosen = {} if likelihood is None else {"likelihood": likelihood}
    penalty = SpectralPenalty(num_steps=6, geometry=LInf(), **chosen)(model, x)
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model), rtol=1e-8, atol=1e-12)


def test_reduction_and_input_std_are_applied():
    model, x, std = cases.tiny_network().double(), torch.randn(5, 6, dtype=torch.float64), torch.rand(6).double() + 0.5
    expected = _dense_values(model, x, _categorical, std).log1p().mean()
    penalty = SpectralPenalty(num_steps=6, geometry=LInf(), reduction=mean_log1p, input_std=std)(model, x)
    assert_close(penalty, expected)
    assert_close(_gradient(penalty, model), _gradient(expected, model), rtol=1e-8, atol=1e-12)


def test_the_value_is_above_the_closed_form_and_at_most_the_estimate():
    model, x = cases.tiny_network().double(), torch.randn(20, 6, dtype=torch.float64)
    closed, one, six = (SpectralPenalty(num_steps=n, geometry=LInf())(model, x) for n in (0, 1, 6))
    estimate = fisher_linf_norm(model, x).value.mean()
    assert closed < one <= six * (1 + 1e-12)
    assert_close(six.detach(), estimate)
    assert six > SpectralPenalty(num_steps=6)(model, x)


def test_where_the_matrix_is_zero_so_is_the_gradient():
    model, x = cases.tiny_network().double(), torch.randn(3, 6, dtype=torch.float64)
    torch.nn.init.zeros_(model[-1].weight)
    penalty = SpectralPenalty(num_steps=2, geometry=LInf())(model, x)
    assert penalty == 0
    assert (_gradient(penalty, model) == 0).all()


def test_another_geometry_has_the_closed_form_alone():
    class Mine(L2):
        pass

    class Other:
        norm = dual_norm = steepest = typical_entry = lambda self, *values: None

    SpectralPenalty(num_steps=2, geometry=Mine())
    SpectralPenalty(geometry=Other())
    with pytest.raises(ValueError, match=r"solves with geometry=L2\(\) or LInf\(\); got num_steps=2"):
        SpectralPenalty(num_steps=2, geometry=Other())
