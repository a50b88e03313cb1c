"""Random networks from seeds: no claim of a bound is ever wrong. ``FISHER_REG_FUZZ=2000`` runs thousands of them."""

import copy
import os
from collections import Counter
from functools import cache

import pytest
import torch

import fisher_reg as fr
from tests.bounds.claims import check
from tests.bounds.random_networks import random_network, refused_networks

COUNT, CHUNK = 100, 10
LOWEST_SHARE = 0.7
"""Of the networks, with a bound over all inputs. The others are gates, and ways of writing that are refused."""


@pytest.fixture(autouse=True)
def _one_thread():
    """On matrices this small, threads wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@cache
def _outcomes(start, stop):
    return tuple(check(seed) for seed in range(start, stop))


def _report(outcomes):
    """What is wrong, one network after the other, and how many of each awkward way of writing are among them."""
    wrong = [outcome for outcome in outcomes if outcome.violations]
    lines = [f"{outcome.description}\n    " + "\n    ".join(outcome.violations) for outcome in wrong]
    kinds = Counter(kind for outcome in wrong for kind in outcome.description.awkward)
    seeds = [outcome.description.seed for outcome in wrong]
    return "\n".join([*lines, f"seeds {seeds}", f"ways of writing among them: {dict(kinds)}"])


def _share(outcomes):
    share = sum(outcome.has_bound for outcome in outcomes) / len(outcomes)
    local = sum(outcome.has_local_bound for outcome in outcomes) / len(outcomes)
    print(f"{len(outcomes)} networks: {share:.0%} have a bound over all inputs, {local:.0%} one at the inputs")
    return share


@pytest.mark.parametrize("start", range(0, COUNT, CHUNK), ids=lambda start: f"seeds {start} to {start + CHUNK - 1}")
def test_no_claim_is_wrong(start):
    outcomes = _outcomes(start, start + CHUNK)
    assert not any(outcome.violations for outcome in outcomes), _report(outcomes)


def test_most_networks_have_a_bound():
    outcomes = [outcome for start in range(0, COUNT, CHUNK) for outcome in _outcomes(start, start + CHUNK)]
    assert _share(outcomes) >= LOWEST_SHARE


@pytest.mark.fuzz
@pytest.mark.skipif("FISHER_REG_FUZZ" not in os.environ, reason="FISHER_REG_FUZZ is not set to a number of networks")
def test_no_claim_is_wrong_for_thousands():
    count = int(os.environ["FISHER_REG_FUZZ"] or 2000)
    outcomes = [check(seed) for seed in range(COUNT, COUNT + count)]
    share = _share(outcomes)
    assert not any(outcome.violations for outcome in outcomes), _report(outcomes)
    assert share >= LOWEST_SHARE


def test_a_seed_makes_the_same_network_again():
    for seed in range(20):
        (first, x, description), (second, y, other) = random_network(seed), random_network(seed)
        assert (torch.equal(x, y), str(description)) == (True, str(other))
        tensors = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
        assert all(torch.equal(*pair) for pair in tensors)


REFUSED = refused_networks()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [fr.fisher_bound, fr.lipschitz_bound])
def test_a_network_without_a_constant_is_refused(name, function):
    model, x = REFUSED[name]
    with pytest.raises(fr.NoBoundError):
        function(model, x)


SMOOTH = {"square", "power", "pow", "exponential", "reciprocal", "attention without a norm"}
SMOOTH |= {"product", "product in place", "outer product"}
"""Without a constant over all inputs, and with one in a ball."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(REFUSED) - SMOOTH))
def test_a_network_that_jumps_has_no_radius(name):
    with pytest.raises(fr.NoBoundError):
        fr.certified_radius(*REFUSED[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_a_network_with_a_constant_in_balls_only_has_a_radius_that_holds(name):
    model, x = copy.deepcopy(REFUSED[name][0]).double(), REFUSED[name][1].double()
    radius, generator = fr.certified_radius(model, x), torch.Generator().manual_seed(0)
    assert (radius >= 0).all()
    with torch.no_grad():
        predicted = model(x).argmax(1)
        for _ in range(50):
            shift = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            shift = shift / torch.linalg.vector_norm(shift.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))
            moved = x + 0.999 * radius.clamp_max(1e3).view(-1, *[1] * (x.ndim - 1)) * shift
            assert (model(moved).argmax(1) == predicted).all()
