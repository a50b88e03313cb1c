"""No solver says `converged` of a wrong number; what cannot be computed says so, and harms no other example."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.testing import assert_close

from fisher_reg import (
    Bernoulli,
    Categorical,
    Exact,
    Gaussian,
    Hutchinson,
    HutchinsonMax,
    Lanczos,
    PowerIteration,
    fisher_effective_rank,
    fisher_eigenpairs,
    fisher_spectral_norm,
    fisher_spectral_norm_and_trace,
    fisher_trace,
)
from fisher_reg.penalty import SpectralPenalty
from fisher_reg.solvers import linalg
from tests.oracles import MatrixOperator, with_singular_values

DOUBLE = torch.float64
SEARCHES = [Lanczos(), Lanczos(is_exact=True), PowerIteration()]
LIKELIHOODS = [Categorical(), Bernoulli(), Gaussian(variance=0.3)]


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _normal(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=_seeded(seed))


def _sigma(logits, likelihood):
    """The Fisher matrix of the logits (B, K, K) in double precision, written down."""
    logits = logits.double()
    if isinstance(likelihood, Categorical):
        p = logits.softmax(1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None]
    if isinstance(likelihood, Bernoulli):
        p = logits.sigmoid()
        return torch.diag_embed(p * (1 - p))
    return torch.eye(logits.shape[1], dtype=DOUBLE).expand(len(logits), -1, -1) / likelihood.variance


def _truth(logits, weight, likelihood=LIKELIHOODS[0]):
    """λ of a linear model z = x Wᵀ + b: the top of Wᵀ Σ W."""
    return torch.linalg.eigvalsh(weight.T.double() @ _sigma(logits, likelihood) @ weight.double())[:, -1]


# --- converged means right


@pytest.mark.parametrize("solver", SEARCHES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_converged_example_of_a_random_linear_model_is_more_than_five_per_cent_off(solver, likelihood, dtype):
    num_converged = 0
    for num_outputs, scale, decay in ((7, 0.3, 0), (20, 1.0, 0), (20, 1.0, 2), (60, 0.3, 1), (60, 3.0, 0)):
        spread = torch.logspace(0, -decay, 12, dtype=DOUBLE)
        weight = (scale * spread * _normal(num_outputs, 12, seed=num_outputs)).to(dtype)
        x = _normal(40, 12, seed=1).to(dtype)
        result = fisher_spectral_norm(lambda x, w=weight: x @ w.T, x, solver=solver, likelihood=likelihood)
        truth = _truth(x @ weight.T, weight, likelihood)
        error = 1 - result.eigenvalue.double() / truth
        # at a failure probability of 1 %, which these spectra do not come near
        assert (error[result.converged] <= solver.tolerance).all()
        assert (error >= -1e3 * torch.finfo(dtype).eps).all()  # rounding of 60 products and of the softmax
        num_converged += int(result.converged.sum())
    assert num_converged > 20


@pytest.mark.parametrize("solver", [None, *SEARCHES])
@pytest.mark.parametrize("num_outputs", [10, 30, 100, 1000])
def test_a_class_that_moves_alone_is_found_at_any_probability_rank(solver, num_outputs):
    # A = diag(sqrt p) (1 - p 1ᵀ) diag(w): nothing couples the large row to the likeliest classes but sqrt(p p')
    bias = -1e-3 * torch.arange(num_outputs, dtype=DOUBLE)
    x = torch.zeros(1, num_outputs)
    for rank in {0, 2, 10 % num_outputs, num_outputs - 1}:
        for size in (6.0, 50.0):
            weight = torch.ones(num_outputs, dtype=DOUBLE)
            weight[rank] = size
            p = bias.softmax(0)
            gram = weight[:, None] * (torch.diag(p) - torch.outer(p, p)) * weight
            truth = torch.linalg.eigvalsh(gram)[-1]
            result = fisher_spectral_norm(lambda x, w=weight: x * w.float() + bias.float(), x, solver=solver)
            assert result.converged.all(), (rank, size)
            assert_close(result.eigenvalue.double(), truth[None], rtol=0.05, atol=0)


@pytest.mark.parametrize("solver", SEARCHES)
@pytest.mark.parametrize("num_outputs", [12, 100])
def test_a_label_of_many_that_moves_alone_is_found(solver, num_outputs):
    # Σ of independent labels is diagonal: each label is decoupled from all others
    for rank in (0, 1, num_outputs // 2, num_outputs - 1):
        weight = torch.ones(num_outputs, dtype=DOUBLE)
        weight[rank] = 20.0
        bias = torch.linspace(0, -3, num_outputs, dtype=DOUBLE)
        truth = (weight.square() * bias.sigmoid() * (1 - bias.sigmoid())).max()
        model = nn.Linear(num_outputs, num_outputs).double()
        model.weight.data, model.bias.data = torch.diag(weight), bias
        x = torch.zeros(1, num_outputs, dtype=DOUBLE)
        result = fisher_spectral_norm(model, x, solver=solver, likelihood=Bernoulli())
        assert result.converged.all()
        assert_close(result.eigenvalue, truth[None].detach(), rtol=0.05, atol=0)


@pytest.mark.parametrize("solver", SEARCHES)
def test_a_probe_of_one_step_does_not_call_a_hidden_class_converged(solver):
    # 200 hidden spectra in which the start is an eigenvector; one step cannot prove anything about a flat bulk
    matrix = torch.diag_embed(torch.cat([torch.ones(200, 1), torch.rand(200, 29, generator=_seeded(2)) * 1.2], 1))
    truth = matrix.square().amax((1, 2))
    start = torch.eye(30)[:1].expand(200, -1)
    short = {"num_steps": 1} if isinstance(solver, Lanczos) else {"num_probe_steps": 1}
    result = type(solver)(**{**vars(solver), **short}).solve(MatrixOperator(matrix, start))
    wrong = result.eigenvalue < 0.95 * truth
    assert wrong.any()
    assert not result.converged[wrong].any()


def test_random_quotients_never_count_as_converged():
    result = HutchinsonMax(20).solve(MatrixOperator(_normal(5, 6, 9)))
    assert not result.converged.any()


# --- examples are independent


class _WholeBatchOnly(MatrixOperator):
    def restrict(self, keep):
        return None


def _mixed():
    """Rank one, hidden tops, flat bulks and zeros, with starts at the first output."""
    matrix = _normal(12, 15, 20, seed=3)
    matrix[0] = 0
    matrix[1, 1:] = 0
    matrix[2] = torch.eye(15, 20, dtype=DOUBLE)
    matrix[3] = torch.eye(15, 20, dtype=DOUBLE)
    matrix[3, 7, 7] = 9.0
    matrix[4] *= 1e-12
    matrix[5] *= torch.logspace(0, -6, 20, dtype=DOUBLE)
    start = torch.eye(15, dtype=DOUBLE)[:1].expand(12, -1)
    return matrix, start


_FIELDS = ("eigenvalue", "residual", "converged", "num_steps", "rounding")


@pytest.mark.parametrize("solver", [Lanczos(), Lanczos(4, rtol=1e-3), PowerIteration(20), Exact(), HutchinsonMax(4)])
@pytest.mark.parametrize("operator", [MatrixOperator, _WholeBatchOnly])
def test_no_example_depends_on_the_batch_or_its_order(solver, operator):
    matrix, start = _mixed()
    whole = solver.solve(operator(matrix, start))
    order = torch.randperm(len(matrix), generator=_seeded(4))
    shuffled = solver.solve(operator(matrix[order], start[order]))
    bound = {"trace": matrix.square().sum((1, 2))}
    for name in _FIELDS:
        assert_close(getattr(shuffled, name), getattr(whole, name)[order], rtol=1e-7, atol=1e-12)
    for index in range(len(matrix)):
        alone = solver.solve(operator(matrix[index][None], start[index][None]))
        for name in _FIELDS:
            assert_close(getattr(alone, name)[0], getattr(whole, name)[index], rtol=1e-7, atol=1e-12)
        upper = alone.interval(trace=bound["trace"][index][None]).upper[0]
        assert_close(upper, whole.interval(**bound).upper[index], rtol=1e-7, atol=1e-12)


def test_an_operator_that_cannot_be_restricted_gives_the_same_results():
    matrix, start = _mixed()
    for solver in (Lanczos(is_exact=True), PowerIteration(20)):
        free, tied = solver.solve(MatrixOperator(matrix, start)), solver.solve(_WholeBatchOnly(matrix, start))
        for name in _FIELDS:
            assert_close(getattr(free, name), getattr(tied, name), rtol=1e-7, atol=1e-12)
        if isinstance(solver, Lanczos):
            assert_close(free.interval().upper, tied.interval().upper, rtol=1e-7, atol=1e-12)


def test_an_example_that_is_done_stays_as_it_was():
    # the rank-one example is done after one probe, the other one takes all steps, in one batch that stays whole
    matrix, start = _mixed()
    pick = torch.tensor([1, 6])
    long = Lanczos(12, tolerance=1e-6, rtol=1e-6)
    together = long.solve(_WholeBatchOnly(matrix[pick], start[pick]))
    assert together.num_steps[0] < together.num_steps[1]
    assert_close(together.eigenvalue[0], matrix[1].square().sum(), rtol=1e-12, atol=0)


def test_the_generator_decides_the_random_vector_and_nothing_else_does():
    matrix, start = _mixed()
    solver = Lanczos(2, is_exact=True)

    def uppers(generator):
        return solver.solve(MatrixOperator(matrix, start), generator).interval().upper

    assert torch.equal(uppers(_seeded(5)), uppers(_seeded(5)))
    assert not torch.equal(uppers(_seeded(5)), uppers(_seeded(6)))
    torch.manual_seed(1)
    by_default = uppers(None)
    torch.manual_seed(2)
    assert torch.equal(by_default, uppers(None))


def test_the_probes_of_the_trace_are_independent_of_those_of_the_solver():
    # The fixed random vector of the solver must tell nothing of the signs of the trace: with the same seed they agree
    # in sign or by their numbers. Here all but one of its outputs are left to the trace.
    num_outputs = 64
    like = MatrixOperator(torch.eye(num_outputs, dtype=DOUBLE)[None], torch.eye(num_outputs, dtype=DOUBLE)[:1])
    seen = []

    class Recording(MatrixOperator):
        def adjoint(self, u):
            seen.append(u[0].clone())
            return super().adjoint(u)

    Hutchinson(1, solver=None).trace(Recording(like.matrix, like.start))
    Lanczos(1).solve(Recording(like.matrix, like.start))
    signs, vector = seen[0], seen[-1]
    uniform = torch.rand(num_outputs, dtype=DOUBLE, generator=_seeded(0))
    assert_close(signs.abs(), torch.ones_like(signs))
    assert abs(float(signs @ vector)) < 4  # a standard normal number, eight if the signs are those of the vector
    assert not torch.equal(signs, 2.0 * (uniform < 0.5) - 1)  # the seed of the solver


@pytest.mark.parametrize("num_samples", [1, 8])
def test_the_sampled_trace_does_not_depend_on_the_batch(num_samples):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 17)).double(), _normal(30, 12)
    estimator = Hutchinson(num_samples)
    whole = fisher_trace(model, x, estimator=estimator)
    for index in (0, 5, 29):
        assert_close(fisher_trace(model, x[index][None], estimator=estimator)[0], whole[index], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"solver": Lanczos(1)}, {"estimator": Hutchinson(1)}, {"estimator": Exact()}, {"solver": PowerIteration(2)}],
)
def test_the_effective_rank_is_at_least_one(arguments):
    torch.manual_seed(0)
    for num_outputs in (2, 17):
        model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, num_outputs)), torch.randn(60, 12)
        rank = fisher_effective_rank(model, x, **arguments)
        assert (rank >= 1).all()
        if num_outputs == 2:  # one eigenvalue: an eighth of a per cent is what five per cent of residual leave
            assert_close(rank, torch.ones(60), rtol=2e-3, atol=0)
        result, trace = fisher_spectral_norm_and_trace(model, x, **arguments)
        assert (trace >= result.eigenvalue).all()


# --- the matrix itself


@pytest.mark.parametrize("scale", [20, 100])
def test_saturated_predictions_of_many_classes_have_all_their_eigenpairs(scale):
    for seed in range(5):
        generator = _seeded(seed)
        weight, x = torch.randn(100, 100, generator=generator), torch.randn(1, 100, generator=generator)
        weight *= scale / (x @ weight.T).std()
        z = (x @ weight.T).double()
        found = fisher_eigenpairs(lambda v, w=weight: v @ w.T, x, 2)
        # sum over pairs of p_j p_k (w_j - w_k)(w_j - w_k)ᵀ from the likeliest class: p_k of the rest is no difference
        best = int(z.argmax())
        contrast = (weight - weight[best]).double()
        p = z.softmax(1)[0]
        rest = p.clone()
        rest[best] = 0
        mean = rest @ contrast
        expected = torch.linalg.eigvalsh(contrast.T @ (rest[:, None] * contrast) - torch.outer(mean, mean))[-1]
        # probabilities are exponentials of float32 logits of several hundreds, with errors of 1e-7 of them
        assert_close(found.eigenvalue[0, 0].double(), expected, rtol=1e-3, atol=1e-38)
        assert found.eigenvalue.isfinite().all()


def test_one_matrix_without_eigenvalues_fails_alone(monkeypatch):
    true_eigh = torch.linalg.eigh

    def eigh(matrices):
        bad = matrices.reshape(-1, *matrices.shape[-2:])[:, 0, 0] == 1.0
        if bool(bad.any()):
            raise torch.linalg.LinAlgError("The algorithm failed to converge.")
        return true_eigh(matrices)

    matrix = _normal(3, 5, 8)
    matrix[:, 0] *= 0.1  # after scaling the first entry is one where it is the largest
    matrix[1] = 0
    matrix[1, 0, 0] = 3.0
    monkeypatch.setattr(linalg.torch.linalg, "eigh", eigh)
    values, vectors = linalg.symmetric_eigen(matrix @ matrix.mT)
    monkeypatch.undo()
    assert values[1].isnan().all()
    assert vectors[1].isnan().all()
    grams = matrix @ matrix.mT
    for index in (0, 2):
        assert_close(values[index], torch.linalg.eigvalsh(grams[index]), rtol=1e-12, atol=1e-12)


def test_the_small_eigenproblems_are_in_double_precision():
    rows = _normal(2, 5, 40000).float()  # more than one chunk
    gram = linalg.inner_products(rows, rows)
    values, vectors = linalg.symmetric_eigen(gram)
    assert gram.dtype == values.dtype == vectors.dtype == DOUBLE
    assert_close(gram, rows.double() @ rows.double().mT, rtol=1e-12, atol=1e-10)  # 40000 products of order one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_eigenpairs_beyond_the_rank_are_zero(rank, dtype):
    torch.manual_seed(0)
    values = [3.0, 2.0, 1.0][:rank]
    result = Exact().eigenpairs(MatrixOperator(with_singular_values(values, 6, 9).to(dtype)), 6)
    expected = torch.tensor(values, dtype=DOUBLE).square().expand(3, -1)
    # the products of nine numbers in the precision of the matrix
    assert_close(result.eigenvalue[:, :rank].double(), expected, rtol=100 * torch.finfo(dtype).eps, atol=0)
    assert (result.eigenvalue[:, rank:] == 0).all()
    assert (result.eigenvector[:, rank:] == 0).all()
    assert result.converged.all()


def test_the_last_eigenpair_of_a_softmax_is_zero():
    weight = _normal(5, 9).float()
    result = fisher_eigenpairs(lambda x: x @ weight.T, torch.zeros(2, 9), 5)
    truth = torch.linalg.eigvalsh(weight.double().T @ _sigma(torch.zeros(2, 5), Categorical()) @ weight.double())
    assert (result.eigenvalue[:, 4] == 0).all()
    assert_close(result.eigenvalue[:, :4].double(), truth.flip(1)[:, :4], rtol=1e-5, atol=0)


# --- cancellation: the right number or an honest flag, and no accusation


def _honest(result, truth):
    """Where converged, within 5 %; the interval, if there is one, holds."""
    error = (result.eigenvalue.double() / truth - 1).abs()
    assert (error[result.converged] <= 0.05).all()
    if result.residual_is_exact:
        found = result.interval()
        assert (found.lower.double() <= truth).all()
        assert (truth <= found.upper.double()).all()


@pytest.mark.parametrize("solver", [Exact(), *SEARCHES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [10.0, 1e3, 1e5])
def test_a_common_part_of_all_rows_cancels_honestly(solver, dtype, scale):
    weight, common = _normal(10, 30), scale * _normal(1, 30, seed=1)
    x = _normal(8, 30, seed=2) / scale
    whole = (weight + common).to(dtype)
    result = fisher_spectral_norm(lambda x: x @ whole.T, x.to(dtype), solver=solver)
    # of the numbers that the model has: those rounded to its precision
    exact = whole.double()
    truth = _truth(x.to(dtype).double() @ exact.T, exact - exact.mean(0))
    _honest(result, truth)
    # a product rounds by eps times the common part, relative to rows of length one
    if 30 * scale * torch.finfo(dtype).eps < 1e-4 and isinstance(solver, Exact):
        assert result.converged.all()


@pytest.mark.parametrize(
    ("solver", "dtype"),
    [
        (Exact(), torch.float32),
        (Exact(), DOUBLE),
        *[(solver, torch.float32) for solver in SEARCHES],
        *[(solver, DOUBLE) for solver in SEARCHES],
    ],
)
def test_identical_rows_are_zero_to_rounding_and_not_refused(solver, dtype):
    for seed in range(30 if dtype == torch.float32 else 8):
        torch.manual_seed(seed)
        head, x = nn.Linear(30, 10).to(dtype), torch.rand(4, 30, dtype=dtype)
        nn.init.constant_(head.weight, 0.37)
        result = fisher_spectral_norm(head, x, solver=solver)
        # sums of ten products of 0.37 over 30 inputs: (10 eps 0.37)^2 30 at most
        assert (result.eigenvalue <= 30 * (10 * torch.finfo(dtype).eps * 0.37) ** 2).all()
        assert not (result.converged & (result.eigenvalue > 0)).any()


@pytest.mark.parametrize(
    "solver",
    [
        Exact(),
        *SEARCHES,
    ],
)
def test_a_common_part_that_leaves_nothing_but_rounding_is_not_accused(solver):
    for seed in range(12):
        weight, common = _normal(10, 30, seed=seed), 1e7 * _normal(1, 30, seed=seed + 100)
        whole, x = (weight + common).float(), _normal(4, 30, seed=seed + 200).float() / 1e7
        assert fisher_spectral_norm(lambda x, w=whole: x @ w.T, x, solver=solver).eigenvalue.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_rows_do_not_end_a_training(dtype):
    head = nn.Linear(30, 10).to(dtype)
    nn.init.constant_(head.weight, 0.37)
    penalty = SpectralPenalty(3)(head, torch.rand(2, 30, dtype=dtype, generator=_seeded(7)))
    assert penalty.isfinite().all()


@pytest.mark.parametrize("solver", [Exact(), *SEARCHES])
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_inputs_far_from_zero_are_honest(solver, offset):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10))
    x = torch.randn(8, 30) + offset
    result = fisher_spectral_norm(lambda x: network(x - offset), x, solver=solver)
    centred = fisher_spectral_norm(network.double(), x.double() - offset, solver=Exact()).eigenvalue
    network.float()
    _honest(result, centred)
    if isinstance(solver, Exact):
        assert result.converged.all()


@pytest.mark.parametrize("solver", [Exact(), *SEARCHES])
def test_a_first_layer_that_cancels_a_large_offset_is_not_accused(solver):
    # the bias takes the offset back: pre-activations are right to eps 1e6, which moves tanh by per cents
    torch.manual_seed(0)
    first, second = nn.Linear(30, 20), nn.Linear(20, 10)
    first.bias.data -= first.weight.data.sum(1) * 1e6
    x = torch.randn(8, 30) + 1e6
    result = fisher_spectral_norm(nn.Sequential(first, nn.Tanh(), second), x, solver=solver)
    assert result.eigenvalue.isfinite().all()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(context, gradient):
        return 2 * context.saved_tensors[0] * gradient


def test_a_function_without_second_derivative_is_named_and_exact_needs_none():
    weight, x = _normal(6, 9), _normal(4, 6, seed=1)
    with pytest.raises(ValueError, match="@once_differentiable.*solver=Exact()"):
        fisher_spectral_norm(lambda x: _Once.apply(x) @ weight, x, solver=Lanczos(is_exact=True))
    found = fisher_spectral_norm(lambda x: _Once.apply(x) @ weight, x, solver=Exact()).eigenvalue
    assert_close(found, fisher_spectral_norm(lambda x: (x * x) @ weight, x, solver=Exact()).eigenvalue)


@pytest.mark.parametrize("solver", [Lanczos(), Lanczos(is_exact=True), PowerIteration()])
def test_maps_that_are_no_transposes_are_still_refused(solver):
    class Doubled(MatrixOperator):
        def apply(self, v, exact=False, slope=None):
            return 2 * super().apply(v, exact=True)

        def restrict(self, keep):
            return Doubled(self.matrix[keep], self.start[keep])

    with pytest.raises(ValueError, match="not transposes of each other"):
        solver.solve(Doubled(_normal(3, 5, 7)))


# --- tolerances and range


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-4])
def test_a_tight_tolerance_converges_in_single_precision(rtol):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 20)]
    model, x = nn.Sequential(*layers).eval(), torch.rand(8, 3, 8, 8)
    result = fisher_spectral_norm(model, x, solver=Lanczos(20, rtol=rtol))
    truth = fisher_spectral_norm(model.double(), x.double(), solver=Exact()).eigenvalue
    assert result.converged.all()
    assert (result.residual <= rtol * result.eigenvalue).all()
    # an eigenvalue within the residual, and float32 throughout
    assert_close(result.eigenvalue.double(), truth, rtol=rtol + 1e-5, atol=0)


def test_a_tighter_tolerance_takes_more_passes():
    matrix = with_singular_values([1.0 - 0.03 * k for k in range(20)], 30, 40)
    passes = [Lanczos(20, tolerance=t).solve(MatrixOperator(matrix)).num_matvecs for t in (0.5, 0.05)]
    assert passes[0] < passes[1]


def test_a_smaller_failure_probability_takes_more_passes():
    matrix = with_singular_values([1.0 - 0.03 * k for k in range(20)], 30, 40)
    passes = [
        Lanczos(20, failure_probability=p, tolerance=0.3).solve(MatrixOperator(matrix)).num_matvecs for p in (0.5, 1e-9)
    ]
    assert passes[0] < passes[1]


@pytest.mark.parametrize("solver", [Exact(), *SEARCHES])
@pytest.mark.parametrize(("slope", "message"), [(1e25, "0 .* small and 1"), (1e-25, "1 .* small and 0")])
def test_one_example_out_of_range_is_told_and_the_others_are_right(solver, slope, message):
    weight = _normal(9, 12).float()
    x = torch.zeros(3, 12)
    factor = torch.tensor([1.0, slope, 2.0])[:, None]

    def model(x):
        rows = factor if len(x) == 3 else factor[[0, 2]]  # a search goes on with the first and the last
        return (x * rows) @ weight.T

    with pytest.warns(UserWarning, match=message):
        result = fisher_spectral_norm(model, x, solver=solver)
    truth = _truth(torch.zeros(1, 9), weight)
    assert result.eigenvalue[1] == (0.0 if slope < 1 else torch.inf)
    assert not result.converged[1]
    for index, square in ((0, 1.0), (2, 4.0)):
        assert_close(result.eigenvalue[index].double(), square * truth[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("gap", [300.0, 690.0])
def test_a_saturated_softmax_in_double_precision_is_enclosed(gap):
    weight, bias = _normal(10, 30), torch.zeros(10, dtype=DOUBLE)
    bias[0] = gap
    x = torch.zeros(1, 30, dtype=DOUBLE)
    exact = fisher_spectral_norm(lambda x: x @ weight.T + bias, x, solver=Exact()).eigenvalue
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fisher_spectral_norm(lambda x: x @ weight.T + bias, x, solver=Lanczos(1, rtol=0.9, is_exact=True))
    found = result.interval()
    assert found.lower <= exact * (1 + 1e-12)
    assert exact * (1 - 1e-12) <= found.upper
