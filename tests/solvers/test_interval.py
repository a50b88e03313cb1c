"""What `EigenResult.interval` promises, against dense eigenvalues, closed forms and the beta distribution."""

import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Exact,
    HutchinsonMax,
    Lanczos,
    PowerIteration,
    fisher_eigenpairs,
    fisher_spectral_norm,
    fisher_trace,
    universal_spectral_norm,
)
from fisher_reg.solvers.interval import Interval, RandomStart, least_component, majorant
from tests import cases
from tests.oracles import MatrixOperator, with_singular_values

DOUBLE = torch.float64
PROBABILITIES = [1e-9, 1e-6, 1e-3, 0.01, 0.1, 0.5, 0.9]
DIMENSIONS = [3, 4, 5, 10, 30, 100, 1000]


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _probability_below(c, dimension):
    """P(|γ| < c): the square of a component of a random unit vector is Beta(1/2, (n - 1)/2)."""
    return stats.beta.cdf(min(c, 1.0) ** 2, 0.5, (dimension - 1) / 2)


def _probability_within(c, center, dimension):
    """P(|γ - center| < c)."""

    def below(x):
        half = stats.beta.cdf(min(abs(x), 1.0) ** 2, 0.5, (dimension - 1) / 2) / 2
        return 0.5 + math.copysign(half, x)

    return below(center + c) - below(center - c)


def _rotated(eigenvalues, batch, generator, start_index=0):
    """Matrices with the given Gram spectrum in Haar random bases; the start is the eigenvector of one of them.

    A batch shares its random vector. In independent random bases that is as good as independent vectors in one basis.
    """
    size = len(eigenvalues)
    normal = torch.randn(batch, size, size, dtype=DOUBLE, generator=generator)
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    matrix = q @ torch.diag(torch.tensor(eigenvalues, dtype=DOUBLE).sqrt())
    return matrix, q[:, :, start_index].contiguous()


def _top(matrix):
    return torch.linalg.eigvalsh(matrix.double() @ matrix.double().mT)[:, -1]


# --- the component of a random unit vector


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("probability", PROBABILITIES)
def test_a_component_is_smaller_than_c_with_at_most_the_promised_probability(dimension, probability):
    c = float(least_component(probability, dimension))
    assert 0 < c <= 1
    # in three dimensions the component is uniform and both are equal: 1e-10 for rounding in the beta distribution
    assert _probability_below(c, dimension) <= probability * (1 + 1e-10)


@pytest.mark.parametrize("probability", [1e-3, 0.1, 1e-60])
def test_c_has_the_probability_in_double_precision(probability):
    c = float(least_component(probability, 3))
    assert_close(c, probability, rtol=1e-14, atol=0)  # a uniform component


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_c_is_no_smaller_than_it_must_be_for_small_probabilities(dimension):
    # the density falls from its maximum by a factor above 1 - (n - 3) c^2 / 2, and c^2 < p^2 pi / (2 (n - 2))
    for probability in (1e-9, 1e-6, 1e-3, 0.01):
        observed = _probability_below(float(least_component(probability, dimension)), dimension)
        assert observed >= probability * (1 - probability**2 - 1e-10)


def test_c_grows_with_the_probability_and_falls_with_the_dimension():
    table = torch.tensor([[float(least_component(p, n)) for p in PROBABILITIES] for n in DIMENSIONS])
    assert (table.diff(dim=1) > 0).all()
    assert (table.diff(dim=0) <= 0).all()
    assert (table.diff(dim=0)[:, :-1] < 0).all()


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_whatever_the_guess_adds_the_component_is_no_likelier_to_be_small(dimension):
    # the guess shifts the component by a number that nobody knows
    for probability in (1e-3, 0.1, 0.5):
        c = float(least_component(probability, dimension))
        for center in (0.0, 0.1, 0.5, 1.0):
            assert _probability_within(c, center, dimension) <= probability * (1 + 1e-6)  # differences of the cdf


@pytest.mark.parametrize("dimension", DIMENSIONS[1:])
def test_a_guess_that_has_a_part_of_the_eigenvector_makes_a_small_component_no_likelier(dimension):
    # γ / σ = a + sqrt(1 - a²) g; in three dimensions a = 0.7 would make it likelier by 1.4
    for probability in (1e-3, 0.02, 0.1, 0.5):
        h = float(least_component(probability, dimension))
        for a in (0.0, 0.1, 0.3, 0.5, 0.6, 0.68, 0.7, 0.75, 0.9, 0.99):
            b = math.sqrt(1 - a * a)
            assert _probability_within(h / b, a / b, dimension) <= probability * (1 + 1e-6)


@pytest.mark.parametrize("num_outputs", [4, 5, 6])
def test_an_interval_from_few_outputs_fails_as_seldom_as_promised(num_outputs):
    # two steps exhaust all but the top, which is met by its component of the start alone
    promised, count = 0.1, 20_000
    normal = torch.randn(count, num_outputs, num_outputs, dtype=DOUBLE, generator=_seeded(40))
    q = torch.linalg.qr(normal).Q
    q = q * (torch.randn(count, 1, num_outputs, dtype=DOUBLE, generator=_seeded(41))).sign()
    values = torch.tensor([1.2, 1.0] + [0.0] * (num_outputs - 2), dtype=DOUBLE)
    guess = 0.6 * q[:, :, 0] + 0.8 * q[:, :, 1]
    operator = MatrixOperator(q @ values.sqrt().diag(), guess)
    solver = Lanczos(num_steps=1, is_exact=True, failure_probability=promised)
    upper = solver.solve(operator, _seeded(42)).interval().upper
    share = float((upper < 1.2 * (1 - 1e-9)).double().mean())
    assert share <= promised + 4 * math.sqrt(promised / count)


def test_a_small_failure_probability_is_kept_in_single_precision():
    # I + (√λ - 1) x xᵀ with a guess orthogonal to x: after two steps nothing but rounding seems left, which is no proof
    count, hidden = 20_000, 1.06
    x = torch.randn(count, 8, dtype=DOUBLE, generator=_seeded(50))
    x = x / x.norm(dim=1, keepdim=True)
    matrix = torch.eye(8, dtype=DOUBLE) + (hidden**0.5 - 1) * x[:, :, None] * x[:, None]
    guess = torch.randn(count, 8, dtype=DOUBLE, generator=_seeded(51))
    guess = guess - (guess * x).sum(1, keepdim=True) * x
    solver = Lanczos(is_exact=True, failure_probability=1e-6)
    result = solver.solve(MatrixOperator(matrix.float(), guess.float()), _seeded(52))
    assert (result.interval().upper >= hidden * (1 - 1e-4)).all()


# --- the majorant


def _blocks(num_inside, num_outside, batch=200, seed=0, rank=None):
    """Random G with diagonal Ritz block: values, couplings, top of the complement, top of G."""
    size = num_inside + num_outside
    rank = size if rank is None else rank
    factor = torch.randn(batch, size, rank, dtype=DOUBLE, generator=_seeded(seed))
    factor = factor * torch.logspace(0, -2, rank, dtype=DOUBLE)
    gram = factor @ factor.mT
    values, vectors = torch.linalg.eigh(gram[:, :num_inside, :num_inside])
    values, vectors = values.flip(1), vectors.flip(2)
    couplings = (gram[:, num_inside:, :num_inside] @ vectors).norm(dim=1)
    beyond = torch.linalg.eigvalsh(gram[:, num_inside:, num_inside:])[:, -1]
    return values, couplings, beyond, torch.linalg.eigvalsh(gram)[:, -1]


@pytest.mark.parametrize(("num_inside", "num_outside"), [(1, 1), (1, 5), (2, 3), (4, 1), (4, 20), (8, 2)])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_majorant_is_never_below_the_top_of_a_semidefinite_matrix(num_inside, num_outside, rank):
    values, couplings, beyond, top = _blocks(num_inside, num_outside, rank=rank)
    values = values.clamp_min(0)
    known = majorant(values, couplings, beyond)
    unknown = majorant(values, torch.full_like(couplings, torch.inf), beyond)
    partly = couplings.clone()
    partly[:, 1:] = torch.inf
    assert (known >= top * (1 - 1e-12)).all()  # eigvalsh is backward stable: 25 numbers times 2^-52 twice
    assert (majorant(values, partly, beyond) >= known * (1 - 1e-12)).all()
    assert (unknown >= majorant(values, partly, beyond) * (1 - 1e-12)).all()
    assert (majorant(values, couplings, 2 * beyond) >= known).all()


@pytest.mark.parametrize("num_inside", [1, 2, 5])
def test_the_majorant_is_the_top_itself_where_the_complement_has_one_dimension(num_inside):
    values, couplings, beyond, top = _blocks(num_inside, 1)
    assert_close(majorant(values, couplings, beyond), top, rtol=1e-12, atol=0)


def test_an_unknown_coupling_of_one_vector_gives_the_sum_of_both_blocks():
    # (θ, sqrt(θ b); sqrt(θ b), b) has rank one and the trace θ + b
    theta, b = torch.tensor([[3.0], [1.0], [0.0]], dtype=DOUBLE), torch.tensor([2.0, 5.0, 4.0], dtype=DOUBLE)
    assert_close(majorant(theta, torch.full_like(theta, torch.inf), b), theta[:, 0] + b, rtol=1e-14, atol=0)


def test_without_anything_beyond_the_majorant_is_the_largest_ritz_value():
    theta = torch.tensor([[3.0, 1.0], [0.0, 0.0]], dtype=DOUBLE)
    for couplings in (torch.zeros_like(theta), torch.full_like(theta, torch.inf)):
        assert majorant(theta, couplings, torch.zeros(2, dtype=DOUBLE)).tolist() == [3.0, 0.0]


def test_an_infinite_complement_makes_that_example_alone_infinite():
    theta = torch.tensor([[3.0, 1.0], [3.0, 1.0]], dtype=DOUBLE)
    found = majorant(theta, torch.ones_like(theta), torch.tensor([torch.inf, 0.0], dtype=DOUBLE))
    assert found.tolist() == [torch.inf, 3.0]


# --- the bound of a probe


def _probe(roots, log_norms, open_diagonal=None, dimension=20, share=1.0, open_offset=None):
    roots = torch.as_tensor(roots, dtype=DOUBLE)
    unknown = torch.full((len(roots),), torch.nan, dtype=DOUBLE)
    return RandomStart(
        roots=roots,
        log_norms=torch.as_tensor(log_norms, dtype=DOUBLE),
        open_diagonal=unknown if open_diagonal is None else torch.as_tensor(open_diagonal, dtype=DOUBLE),
        open_offset=torch.zeros(len(roots), dtype=DOUBLE) if open_offset is None else open_offset,
        dimension=dimension,
        share=share,
    )


@pytest.mark.parametrize("probability", [1e-9, 1e-2, 0.5, 0.9])
def test_one_finished_step_bounds_by_alpha_plus_beta_over_c(probability):
    alpha, beta = torch.tensor([2.0, 1e-3, 0.0], dtype=DOUBLE), torch.tensor([1.0, 5.0, 1e-4], dtype=DOUBLE)
    c = float(least_component(probability, 20))
    bound = _probe(alpha[:, None], beta.log()).bound(probability)
    assert_close(bound, alpha + beta / c, rtol=1e-12, atol=0)


@pytest.mark.parametrize("probability", [1e-9, 1e-2, 0.5, 0.9])
def test_one_unfinished_step_solves_its_quadratic_equation(probability):
    # (b - α) / sqrt(b α) = 1 / c is quadratic in sqrt(b)
    alpha = torch.tensor([2.0, 1e-3, 1e6], dtype=DOUBLE)
    c = float(least_component(probability, 20))
    root = 0.5 * alpha.sqrt() * (1 / c + math.sqrt(1 / c**2 + 4))
    bound = _probe(alpha[:, None], [0.0, 0.0, 0.0], alpha).bound(probability)
    assert_close(bound, root.square(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("num_roots", [2, 3, 7])
def test_the_lanczos_polynomial_is_one_over_c_at_the_bound(num_roots, is_open):
    roots = torch.rand(50, num_roots, dtype=DOUBLE, generator=_seeded(1)) * 3
    log_norms = torch.randn(50, dtype=DOUBLE, generator=_seeded(2))
    alpha = torch.rand(50, dtype=DOUBLE, generator=_seeded(3)) + 0.1 if is_open else None
    for probability in (1e-6, 0.1):
        b = _probe(roots, log_norms, alpha).bound(probability)
        assert (b > roots.amax(1)).all()
        log_p = (b[:, None] - roots).log().sum(1) - log_norms
        if is_open:
            log_p = log_p - 0.5 * (b * alpha).log()
        # a relative error of 2^-52 in b, of which b - r_j keeps at worst 3 / 1e-4 times as much
        expected = torch.full_like(log_p, -math.log(float(least_component(probability, 20))))
        assert_close(log_p, expected, rtol=0, atol=1e-10)


def test_missing_roots_do_not_count():
    nan = torch.nan
    padded = _probe([[2.0, nan, 1.0, nan], [nan, nan, nan, nan]], [0.3, 0.0]).bound(0.01)
    assert_close(padded[:1], _probe([[2.0, 1.0]], [0.3]).bound(0.01), rtol=1e-14, atol=0)
    assert padded[1] == torch.inf


def test_of_no_start_nothing_is_known_and_a_search_of_everything_is_certain():
    everything = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    for probability in (1e-9, 0.9):
        assert RandomStart.none(2).bound(probability).tolist() == [torch.inf, torch.inf]
        assert RandomStart.nothing_left(everything).bound(probability).tolist() == [3.0, 0.0]
    assert RandomStart.nothing_left(everything).is_certain
    assert not RandomStart.none(2).is_certain


@pytest.mark.parametrize("probability", [1e-9, 0.1])
def test_half_a_random_start_needs_a_polynomial_twice_as_large(probability):
    alpha, beta = torch.tensor([2.0], dtype=DOUBLE), torch.tensor([1.0], dtype=DOUBLE)
    half = _probe(alpha[:, None], beta.log(), share=0.5).bound(probability)
    assert_close(half - alpha, 2 * (_probe(alpha[:, None], beta.log()).bound(probability) - alpha), rtol=1e-10, atol=0)


def test_what_is_known_of_the_last_column_narrows_an_unfinished_step():
    # β² = α (b - offset): (b - r₁)(b - r₂) / (β₁ sqrt(α (b - offset))) = 1 / c
    roots, alpha = torch.tensor([[2.0, 0.5]], dtype=DOUBLE), torch.tensor([0.7], dtype=DOUBLE)
    offset, log_beta = torch.tensor([1.6], dtype=DOUBLE), torch.tensor([-0.3], dtype=DOUBLE)
    found = _probe(roots, log_beta, alpha, open_offset=offset)
    b = found.bound(0.1)
    log_p = (b[:, None] - roots).log().sum(1) - log_beta - 0.5 * (alpha * (b - offset)).log()
    assert_close(log_p, -least_component(0.1, 20).log()[None], rtol=0, atol=1e-10)
    assert b < _probe(roots, log_beta, alpha).bound(0.1)
    assert found.excludes(1.001 * b, 0.1)
    assert not found.excludes(0.999 * b, 0.1)


def test_a_probe_that_ends_is_bounded_by_its_largest_root():
    # the last β is zero up to rounding: 1e-16 / c = 2e-15 on top of the root
    bound = _probe([[2.0], [3.0]], [math.log(1e-16), math.log(1e-290)]).bound(0.1)
    assert_close(bound, torch.tensor([2.0, 3.0], dtype=DOUBLE), rtol=1e-14, atol=0)


@pytest.mark.parametrize("num_roots", [1, 2, 5])
@pytest.mark.parametrize("is_open", [False, True])
def test_the_bound_falls_with_the_failure_probability(num_roots, is_open):
    roots = torch.rand(30, num_roots, dtype=DOUBLE, generator=_seeded(4))
    probe = _probe(roots, torch.zeros(30, dtype=DOUBLE), torch.ones(30, dtype=DOUBLE) if is_open else None)
    bounds = torch.stack([probe.bound(p) for p in PROBABILITIES])
    assert (bounds.diff(dim=0) < 0).all()


@pytest.mark.parametrize(
    "scale",
    [
        1e-300,
        1e-260,
        1e-200,
        1e-40,
        1e40,
        1e200,
        1e270,
    ],
)
@pytest.mark.parametrize("is_open", [False, True])
def test_the_bound_scales_with_the_matrix(scale, is_open):
    roots = torch.tensor([[2.0, 1.0, 0.1]], dtype=DOUBLE)
    alpha = torch.tensor([0.5], dtype=DOUBLE)
    num_norms = 2 if is_open else 3  # the off-diagonals that are known
    once = _probe(roots, [0.0], alpha if is_open else None).bound(0.01)
    scaled = _probe(roots * scale, [num_norms * math.log(scale)], alpha * scale if is_open else None).bound(0.01)
    assert_close(scaled / scale, once, rtol=1e-10, atol=0)  # exp of a logarithm of up to 700, 2^-52 each


# --- observed failures

SPECTRA = {
    "repeated top": [1.0, 2.0, 2.0, 2.0] + [0.5] * 16,
    "tiny gap": [1.0, 1.0 + 1e-6, 1.0 - 1e-6] + [0.9] * 17,
    "flat bulk with one larger": [1.0, 1.5] + [1.0] * 18,
    "one hidden and nothing else": [1.0, 6.0] + [0.0] * 18,
    "one hidden above a bulk": [1.0, 1.5] + [0.3] * 18,
    "two hidden": [1.0, 1.6, 2.2] + [0.2] * 17,
    "three levels": [1.0] + [1.1] * 12 + [1.3] + [0.1] * 6,
    "linear": [0.05 * k for k in range(1, 21)],
    "geometric": [2.0**-k for k in range(19, -1, -1)],
}


@pytest.mark.parametrize(
    ("num_steps", "num_starts"),
    [(1, 1), (3, 1), (8, 1), (1, 3), (3, 3), (8, 3)],
)
@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5])
def test_the_upper_end_fails_no_more_often_than_promised_and_the_lower_one_never(num_steps, num_starts, probability):
    count = 200
    parts = [_rotated(spectrum, count, _seeded(5)) for spectrum in SPECTRA.values()]
    matrix, start = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    truth = torch.tensor([max(spectrum) for spectrum in SPECTRA.values()], dtype=DOUBLE).repeat_interleave(count)
    solver = Lanczos(num_steps, num_starts, failure_probability=probability, is_exact=True)
    result = solver.solve(MatrixOperator(matrix, start), _seeded(6))
    for asked in (probability, 0.5):
        found = result.interval(asked)
        assert found.failure_probability == asked
        assert (found.lower <= truth).all()
        failures = (found.upper < truth).view(-1, count).sum(1)
        assert (failures <= int(stats.binom.isf(3e-7, count, asked))).all()  # five standard deviations


def test_the_promise_holds_over_the_seeds_of_the_generator_too():
    matrix = torch.diag(torch.tensor(SPECTRA["one hidden and nothing else"], dtype=DOUBLE).sqrt())[None]
    start = torch.eye(20, dtype=DOUBLE)[:1]
    solver = Lanczos(num_steps=1, is_exact=True, failure_probability=0.3)
    uppers = [solver.solve(MatrixOperator(matrix, start), _seeded(s)).interval().upper.item() for s in range(60)]
    failures = sum(upper < 6.0 for upper in uppers)
    assert failures <= stats.binom.isf(3e-7, 60, 0.3)
    assert failures > 0  # and it is the random vector that decides


@pytest.mark.parametrize("is_open", [False, True])
def test_failures_are_as_frequent_as_the_polynomials_of_the_start_say(is_open):
    # Eigenvalues 1 (that of the guess), T and 0. The start has half of its square along the guess, and g / 2 along T,
    # where g is the squared component of a random unit vector of 19 dimensions. An interval fails where the polynomial
    # of that discrete measure is larger than 1 / c at T.
    size, count, hidden = 20, 4000, 6.0
    matrix, start = _rotated([1.0, hidden] + [0.0] * (size - 2), count, _seeded(7))
    easy = 1e9 if is_open else 0.0  # the first bound of all is good enough, or none ever is
    solver = Lanczos(num_steps=1, is_exact=True, tolerance=easy, rtol=easy)
    result = solver.solve(MatrixOperator(matrix, start), _seeded(8))
    assert bool(result.random_start.open_diagonal.isnan().all()) is not is_open
    squares = torch.as_tensor(stats.beta.rvs(0.5, (size - 2) / 2, size=400_000, random_state=0))
    points = torch.tensor([1.0, hidden, 0.0], dtype=DOUBLE)
    weights = 0.5 * torch.stack([torch.ones_like(squares), squares, 1 - squares], 1)
    alpha = (weights * points).sum(1, keepdim=True)
    beta = (weights * (points - alpha).square()).sum(1, keepdim=True).sqrt()
    p = (points - alpha) / beta
    alpha_2 = (weights * points * p.square()).sum(1, keepdim=True)
    q = (points - alpha_2) * p - beta
    at_hidden = (q / (weights * q.square()).sum(1, keepdim=True).sqrt())[:, 1]
    if is_open:  # beta is at most sqrt(alpha (T - alpha))
        at_hidden = ((hidden - alpha) / alpha).sqrt()[:, 0]
    for probability in (0.1, 0.3, 0.6):
        c = math.sqrt(0.5) * float(least_component(probability, size - 1))
        expected = float((at_hidden > 1 / c).double().mean())
        failures = int((result.interval(probability).upper < hidden).sum())
        assert stats.binom.ppf(1e-6, count, expected) <= failures <= stats.binom.isf(1e-6, count, expected)
        assert failures <= stats.binom.isf(3e-7, count, probability)


@pytest.mark.parametrize("num_starts", [1, 3])  # the unit vectors of the first outputs beside the start
def test_a_top_orthogonal_to_every_start_is_enclosed(num_starts):
    matrix = torch.diag(torch.tensor([1.0, 0.9, 0.8, 4.0] + [0.1] * 16, dtype=DOUBLE))[None]
    start = torch.eye(20, dtype=DOUBLE)[:1]
    solver = Lanczos(num_starts=num_starts, is_exact=True, failure_probability=1e-9)
    for seed in range(8):
        found = solver.solve(MatrixOperator(matrix, start), _seeded(seed)).interval()
        assert found.lower <= 16 <= found.upper


def test_the_interval_falls_with_the_failure_probability_and_never_below_the_lower_end():
    matrix, start = _rotated(SPECTRA["linear"], 40, _seeded(9), start_index=-1)
    result = Lanczos(num_steps=3, is_exact=True).solve(MatrixOperator(matrix, start), _seeded(10))
    intervals = [result.interval(p) for p in PROBABILITIES]
    uppers = torch.stack([found.upper for found in intervals])
    assert (uppers.diff(dim=0) <= 0).all()
    assert (uppers[0] > uppers[-1]).all()
    assert all((found.lower <= found.upper).all() for found in intervals)
    assert all(torch.equal(found.lower, intervals[0].lower) for found in intervals)


def test_more_steps_narrow_the_interval():
    matrix, start = _rotated(SPECTRA["linear"], 100, _seeded(11), start_index=-1)
    widths = []
    for num_steps in (1, 4, 8, 14):
        solver = Lanczos(num_steps, is_exact=True, tolerance=0.0)
        widths.append(solver.solve(MatrixOperator(matrix, start), _seeded(12)).interval().relative_width.median())
    assert widths[0] > widths[1] > widths[2] > widths[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_search_takes_all_outputs_the_interval_is_the_eigenvalue(dtype):
    matrix = torch.randn(10, 6, 30, dtype=DOUBLE, generator=_seeded(13)).to(dtype)
    result = Lanczos(num_steps=12, rtol=1e-6, tolerance=1e-3).solve(MatrixOperator(matrix))
    found, truth = result.interval(), _top(matrix)
    assert (found.lower <= truth).all()
    assert (truth <= found.upper).all()
    # rounding is added on both sides of the root, 4 eps and what the products disagree by (a few eps sqrt(30))
    assert (found.relative_width <= 200 * torch.finfo(dtype).eps).all()


# --- the interval


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "solver",
    [
        Lanczos(1),
        Lanczos(3),
        Lanczos(2, num_starts=4, is_exact=True),
        PowerIteration(3),
        HutchinsonMax(3),
        Exact(),
    ],
)
@pytest.mark.parametrize("name", ["random", *SPECTRA])
def test_with_an_exact_trace_the_interval_is_certain(solver, dtype, name):
    if name == "random":
        matrix = torch.randn(100, 20, 40, dtype=DOUBLE, generator=_seeded(14)).to(dtype)
        start = torch.ones(100, 20, dtype=dtype)
    else:
        matrix, start = (part.to(dtype) for part in _rotated(SPECTRA[name], 100, _seeded(14)))
    operator = MatrixOperator(matrix, start)
    found = solver.solve(operator, _seeded(15)).interval(trace=Exact().trace(operator))
    truth = _top(matrix)
    assert found.failure_probability == 0.0
    assert (found.lower.double() <= truth).all()
    assert (truth <= found.upper.double()).all()
    assert found.lower.dtype == found.upper.dtype == dtype


def test_with_an_exact_trace_it_is_certain_of_quotients_too():
    matrix = torch.randn(100, 9, 30, dtype=DOUBLE, generator=_seeded(16))
    torch.manual_seed(0)
    result = Lanczos(2).solve(MatrixOperator(matrix, noise=2e-2))
    assert not result.residual_is_exact
    found = result.interval(trace=matrix.square().sum((1, 2)))
    truth = _top(matrix)
    assert found.failure_probability == 0.0
    assert (found.lower <= truth).all()
    assert (truth <= found.upper).all()


def test_the_rounding_of_the_trace_itself_is_allowed_for():
    # What the search leaves is one eigenvalue, so that the upper end is the trace less what is known, without slack:
    # a trace in float32 alone lies below that for half of the examples.
    values = 1.1 + torch.rand(100, generator=_seeded(31), dtype=DOUBLE)
    eigenvalues = torch.stack([torch.ones_like(values), values, torch.zeros_like(values)], 1)
    start = torch.eye(3, dtype=DOUBLE)[:1].expand(100, -1)
    solver = Lanczos(1, tolerance=1e9, is_exact=True)  # the first bound of all is good enough
    result = solver.solve(MatrixOperator(torch.diag_embed(eigenvalues.sqrt()), start))
    found = result.interval(trace=eigenvalues.sum(1).float())
    assert (values <= found.upper).all()
    # 4 eps of the trace and of what is known of it, each at most 3.1, and half an eps of the trace
    assert (found.upper <= values + 30 * torch.finfo(torch.float32).eps).all()


def test_a_probability_beside_the_trace_takes_the_smaller_upper_end():
    matrix = torch.randn(100, 9, 30, dtype=DOUBLE, generator=_seeded(17))
    result, trace = Lanczos(2, is_exact=True).solve(MatrixOperator(matrix)), matrix.square().sum((1, 2))
    by_probe, by_trace = result.interval(0.01), result.interval(trace=trace)
    by_both = result.interval(0.01, trace=trace)
    assert_close(by_both.upper, torch.minimum(by_probe.upper, by_trace.upper), rtol=1e-14, atol=0)
    assert (by_both.upper < by_probe.upper).any()
    assert (by_both.upper < by_trace.upper).any()
    assert by_both.failure_probability == 0.01


def test_a_trace_that_is_too_small_never_puts_the_upper_end_below_the_lower_one():
    matrix = torch.randn(20, 9, 30, dtype=DOUBLE, generator=_seeded(18))
    found = Lanczos(2).solve(MatrixOperator(matrix)).interval(trace=torch.zeros(20, dtype=DOUBLE))
    assert (found.lower <= found.upper).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_outputs", [10, 1000])
@pytest.mark.parametrize("solver", [Exact(), Lanczos(is_exact=True)])
def test_equal_eigenvalues_of_many_classes_are_enclosed(solver, num_outputs, dtype):
    # equal probabilities and J = I: λ = 1 / K for all directions but one
    x = torch.zeros(1, num_outputs, dtype=dtype)
    result = fisher_spectral_norm(lambda x: 1.0 * x, x, solver=solver)
    trace = fisher_trace(lambda x: 1.0 * x, x, estimator=Exact())
    for found in (result.interval(), result.interval(trace=trace)):
        assert found.lower.double() * num_outputs <= 1
        assert found.upper.double() * num_outputs >= 1
    assert result.converged.all()
    if isinstance(solver, Exact):
        # 4 eps of each root on both sides, two next numbers, and three times the rounding of K additions in a pass
        eps = torch.finfo(dtype).eps
        assert result.interval(trace=trace).relative_width <= (20 + 12 * num_outputs**0.5) * eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [Exact(), Lanczos(is_exact=True), Lanczos(1, rtol=0.0), PowerIteration(rtol=1e-3)])
def test_a_zero_matrix_has_the_interval_zero(solver, dtype):
    found = solver.solve(MatrixOperator(torch.zeros(2, 6, 9, dtype=dtype))).interval()
    assert found.lower.tolist() == found.upper.tolist() == found.relative_width.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [Exact(), Lanczos(is_exact=True), PowerIteration(rtol=1e-3)])
def test_rank_one_is_enclosed_to_rounding(solver, dtype):
    torch.manual_seed(0)
    matrix = with_singular_values([2.0], 6, 9, batch=10).to(dtype)
    result = solver.solve(MatrixOperator(matrix))
    found, truth = result.interval(), _top(matrix)
    assert result.converged.all()
    assert (found.lower <= truth).all()
    assert (truth <= found.upper).all()
    # a complement of rounding errors, whose steps are divided by c = 0.01 / 2 / 0.4: sqrt(b θ) with b of some eps^2
    assert (found.relative_width <= 1e4 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("solver", [Exact(), Lanczos(is_exact=True), Lanczos(1, rtol=0.0)])
def test_rounding_is_on_both_sides(solver):
    matrix = torch.randn(50, 8, 20, dtype=DOUBLE, generator=_seeded(19)).float()
    result = solver.solve(MatrixOperator(matrix))
    found = result.interval()
    assert (result.rounding >= 4 * torch.finfo(torch.float32).eps * result.eigenvalue.sqrt() * 0.99).all()
    root, eta = result.eigenvalue.double().sqrt(), result.rounding.double()
    assert (found.lower < (root - 0.9 * eta).square()).all()
    assert (found.upper > (root + 0.9 * eta).square()).all()


@pytest.mark.parametrize("solver", [Exact(), Lanczos(), Lanczos(rtol=1e-3), PowerIteration(), HutchinsonMax(3)])
def test_the_lower_end_needs_no_luck(solver):
    matrix = torch.randn(200, 20, 30, dtype=DOUBLE, generator=_seeded(20)).float()
    operator = MatrixOperator(matrix)
    result = solver.solve(operator)
    assert (result.interval(trace=Exact().trace(operator)).lower.double() <= _top(matrix)).all()


@pytest.mark.parametrize("solver", [Exact(), Lanczos(failure_probability=0.2, is_exact=True), HutchinsonMax(2)])
def test_the_failure_probability_is_that_of_the_solver_unless_told(solver):
    result = solver.solve(MatrixOperator(torch.randn(3, 7, 9, dtype=DOUBLE, generator=_seeded(21))))
    expected = {Exact: 0.0, Lanczos: 0.2, HutchinsonMax: 1e-3}[type(solver)]
    assert result.interval().failure_probability == expected
    asked = result.interval(0.3)
    assert asked.failure_probability == (0.0 if isinstance(solver, Exact) else 0.3)
    if isinstance(solver, Lanczos):
        assert torch.equal(result.interval().upper, result.interval(0.2).upper)
    if isinstance(solver, HutchinsonMax):  # it looks at nothing else
        assert asked.upper.isinf().all()


def test_the_relative_width_knows_zero_and_infinity():
    lower, upper = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([0.0, 1.0, 3.0, torch.inf])
    assert Interval(lower, upper, 0.1).relative_width.tolist() == [0.0, torch.inf, 0.5, torch.inf]


@pytest.mark.parametrize("num_starts", [1, 3])
@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("probability", [1e-4, 0.2])
def test_converged_is_a_small_residual_and_a_narrow_interval(num_starts, tolerance, probability):
    parts = [_rotated(spectrum, 20, _seeded(22)) for spectrum in SPECTRA.values()]
    matrix, start = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    solver = Lanczos(6, num_starts, tolerance=tolerance, failure_probability=probability, is_exact=True)
    result = solver.solve(MatrixOperator(matrix, start), _seeded(23))
    width = result.interval().relative_width
    settled = result.residual <= solver.rtol * result.eigenvalue
    assert torch.equal(result.converged, settled & (width <= tolerance + 1e-14))  # and two steps to the next number
    assert result.converged.any()
    assert not result.converged.all()


@pytest.mark.parametrize("solver", [Lanczos(is_exact=True), PowerIteration(rtol=1e-3)])
def test_an_interval_too_wide_is_not_converged(solver):
    matrix, start = _rotated(SPECTRA["linear"], 20, _seeded(24), start_index=-1)
    result = type(solver)(**{**vars(solver), "tolerance": 1e-9}).solve(MatrixOperator(matrix, start), _seeded(25))
    assert not result.converged[result.interval().relative_width > 1e-9].any()
    assert (result.interval().relative_width > 1e-9).any()


@pytest.mark.parametrize("probability", [0, 1, 1.5, -1, float("nan")])
def test_what_is_no_probability_is_refused(probability):
    message = "strictly between 0 and 1; got"
    result = Lanczos(is_exact=True).solve(MatrixOperator(torch.ones(1, 3, 4)))
    with pytest.raises(ValueError, match=f"failure_probability must lie {message}"):
        result.interval(probability)
    with pytest.raises(ValueError, match=f"failure_probability must lie {message}"):
        Exact().solve(MatrixOperator(torch.ones(1, 3, 4))).interval(probability, trace=torch.ones(1))
    with pytest.raises(ValueError, match=f"failure_probability of Lanczos must lie {message}"):
        Lanczos(failure_probability=probability)
    with pytest.raises(ValueError, match=f"failure_probability of PowerIteration must lie {message}"):
        PowerIteration(failure_probability=probability)


@pytest.mark.parametrize("solver", [Lanczos(), PowerIteration()])
def test_quotients_certify_nothing_and_the_message_names_what_does(solver):
    result = solver.solve(MatrixOperator(torch.ones(1, 5, 4)))
    match = r"difference quotients.*Lanczos\(is_exact=True, failure_probability=0.0[12]\) or solver=Exact\(\)"
    for arguments in ((), (0.01,)):
        with pytest.raises(ValueError, match=match):
            result.interval(*arguments)
    with pytest.raises(ValueError, match="difference quotients"):
        result.interval(0.01, trace=torch.full((1,), 12.0))


@pytest.mark.parametrize("solver", [Exact(), Lanczos(is_exact=True)])
def test_several_eigenpairs_have_no_interval(solver):
    result = fisher_eigenpairs(cases.tiny_network(), torch.zeros(2, 6), 2, solver=solver)
    with pytest.raises(ValueError, match="use the result of fisher_spectral_norm"):
        result.interval()


def test_the_norm_of_a_data_set_is_bounded_above_by_the_trace_alone():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double(), torch.randn(9, 6, dtype=DOUBLE)
    result = universal_spectral_norm(model, [x[:5], x[5:]])
    # F = mean over x of Jᵀ (diag p - p pᵀ) J, formed whole
    matrices = []
    for example in x:
        jacobian = torch.autograd.functional.jacobian(lambda e: model(e[None])[0], example)
        p = model(example[None]).softmax(1)[0].detach()
        matrices.append(jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian)
    truth = torch.linalg.eigvalsh(torch.stack(matrices).mean(0))[-1]
    alone = result.interval()
    assert alone.upper.tolist() == [torch.inf]
    assert alone.lower <= truth
    found = result.interval(trace=fisher_trace(model, x, estimator=Exact()).mean()[None])
    assert found.failure_probability == 0.0
    assert found.lower <= truth <= found.upper < torch.inf


def test_the_old_upper_bound_warns_and_agrees():
    matrix = torch.randn(5, 9, 30, dtype=DOUBLE, generator=_seeded(26))
    result, trace = Lanczos(2).solve(MatrixOperator(matrix)), matrix.square().sum((1, 2))
    with pytest.warns(DeprecationWarning, match=r"interval\(trace=trace\).upper"):
        old = result.upper_bound(trace)
    assert torch.equal(old, result.interval(trace=trace).upper)


# --- outside the range of the numbers


@pytest.mark.parametrize("with_trace", [False, True])
@pytest.mark.parametrize("solver", [Exact(), Lanczos(is_exact=True)])
def test_an_overflowing_eigenvalue_leaves_the_interval_of_the_others_alone(solver, with_trace):
    matrix = torch.randn(2, 9, 30, dtype=DOUBLE, generator=_seeded(27)).float()
    truth = _top(matrix)[0]
    matrix[1] *= 1e25
    result = solver.solve(MatrixOperator(matrix))
    assert result.eigenvalue[1] == torch.inf
    assert not result.converged[1]
    trace = torch.stack([matrix[0].square().sum(), torch.tensor(torch.inf)]) if with_trace else None
    found = result.interval(trace=trace)
    assert found.lower[0] <= truth <= found.upper[0] < torch.inf
    assert found.upper[1] == torch.inf


@pytest.mark.parametrize("solver", [Exact(), Lanczos(is_exact=True)])
def test_an_underflowing_eigenvalue_is_enclosed_and_not_converged(solver):
    matrix = (torch.randn(4, 9, 30, dtype=DOUBLE, generator=_seeded(28)) * 1e-25).float()
    result = solver.solve(MatrixOperator(matrix))
    found, truth = result.interval(), _top(matrix)
    assert (result.eigenvalue == 0).all()
    assert (found.lower == 0).all()
    assert (found.upper.double() >= truth).all()
    assert (found.relative_width == torch.inf).all()
    assert not result.converged.any()


@pytest.mark.parametrize(
    "scale",
    [
        1e-150,
        1e-130,
        1e-100,
        1.0,
        1e100,
        1e140,
    ],
)
def test_the_interval_scales_with_the_matrix_in_double_precision(scale):
    # one hidden eigenvalue that a single step has not found: all hangs on the bound of the probe
    matrix, start = _rotated([1.0, 36.0] + [1.0] * 18, 50, _seeded(29))
    solver = Lanczos(num_steps=1, is_exact=True)
    upper = [solver.solve(MatrixOperator(s * matrix, start), _seeded(30)).interval().upper for s in (1.0, scale)]
    scaled = upper[1] / scale / scale
    assert (scaled >= upper[0] * (1 - 1e-6)).all()  # rounding errors of the first product, over c
    if 1e-120 < scale < 1e120:
        assert_close(scaled, upper[0], rtol=1e-6, atol=0)
