"""The divergence after one step beside that after several."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import L2, Bernoulli, Categorical, Gaussian, KLPenalty, LInf, single_step_ratio
from fisher_reg.estimate import evaluation_operator
from fisher_reg.single_step import step_divergences
from tests import cases

GEOMETRIES = [L2(), LInf()]
STEP = 0.5


class Masked(nn.Module):
    """The logit of the first class makes one full wave within a step: at its end it is what it was at the beginning."""

    def forward(self, x):
        first = 2 + torch.sin(math.pi / STEP * x[:, :1])
        return torch.cat([first, torch.zeros_like(first)], 1)


def _inputs(count=8):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(0))


def _found(model, x, step, geometry, **options):
    with evaluation_operator(model, x, Categorical()) as fisher:
        return step_divergences(fisher, step, geometry, **options)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_network_that_is_flat_at_the_end_of_the_step_alone_has_a_ratio_of_zero(geometry):
    ratio = single_step_ratio(Masked(), torch.zeros(3, 6), step=STEP, geometry=geometry)
    assert_close(ratio, torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_linear_function_of_two_classes_has_a_ratio_of_one(geometry):
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    assert_close(single_step_ratio(model, _inputs(), step=STEP, geometry=geometry), torch.ones(8), rtol=0, atol=0)


def test_no_search_finds_more_than_the_largest_divergence_which_is_at_a_corner():
    """Of linear logits the divergence is convex in the perturbation."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), _inputs().double()
    corners = STEP * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    log_p, log_q = model(x).log_softmax(1), model(x[:, None] + corners).log_softmax(-1)
    largest = (log_p.exp()[:, None] * (log_p[:, None] - log_q)).sum(-1).amax(1).detach()
    found = _found(model, x, STEP, LInf(), num_steps=8)
    assert bool((found.several <= largest * (1 + 1e-9)).all())
    assert bool((found.several > 1.5 * found.single).any())
    assert bool((found.several >= found.single).all())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_single_step_is_that_of_the_penalty(geometry):
    model, x = cases.tiny_network().eval(), _inputs()
    penalty = KLPenalty(step=STEP, geometry=geometry)
    single = _found(model, x, STEP, geometry).single
    assert_close(2 / STEP**2 * single.mean(), penalty(model, x).detach())


def test_the_step_is_in_units_of_the_standard_deviation():
    model, x = cases.tiny_network(), _inputs()
    std = torch.tensor(0.25)
    scaled = nn.Sequential(nn.Flatten(), *model)
    expected = single_step_ratio(lambda y: scaled(y / std), x * std, step=0.1, geometry=LInf())
    assert_close(single_step_ratio(scaled, x, step=0.1, geometry=LInf(), input_std=std), expected)


def test_without_a_slope_the_search_begins_elsewhere():
    """The slope at the input is exactly zero, of an input at the middle of a flat piece."""

    def model(x):
        first = 2 - torch.relu(x[:, :1].abs() - 0.1)
        return torch.cat([first, torch.zeros_like(first)], 1)

    found = _found(model, torch.zeros(2, 6), STEP, LInf())
    assert_close(found.single, torch.zeros(2))
    assert bool((found.several > 0.001).all())
    assert_close(found.ratio, torch.zeros(2))


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_it_is_a_share_for_every_likelihood(likelihood):
    ratio = single_step_ratio(cases.tiny_network(), _inputs(), step=STEP, geometry=LInf(), likelihood=likelihood)
    assert bool(((ratio > 0) & (ratio <= 1)).all())


def test_a_function_that_does_not_change_has_no_ratio():
    ratio = single_step_ratio(lambda x: 0 * x[:, :3], _inputs(), step=STEP, geometry=LInf())
    assert bool(ratio.isnan().all())


def test_what_cannot_be_a_step_is_refused():
    with pytest.raises(ValueError, match=r"step > 0, in the input unit; got 0"):
        single_step_ratio(cases.tiny_network(), _inputs(), step=0, geometry=LInf())
    with pytest.raises(ValueError, match=r"num_steps >= 1; got 0"):
        single_step_ratio(cases.tiny_network(), _inputs(), step=1, geometry=LInf(), num_steps=0)
    with pytest.raises(TypeError, match="geometry"):
        single_step_ratio(cases.tiny_network(), _inputs(), step=1, geometry="linf")
