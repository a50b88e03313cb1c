import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Bernoulli,
    Categorical,
    Exact,
    Gaussian,
    Hutchinson,
    Lanczos,
    Rademacher,
    SampledLabels,
    StandardNormal,
    fisher_effective_rank,
    fisher_spectral_norm_and_trace,
    fisher_trace,
)
from fisher_reg.operator import InputFisher
from fisher_reg.sampling import normal, signs, uniform
from tests.oracles import MatrixOperator


@pytest.mark.parametrize("probe", [Rademacher(), StandardNormal()])
def test_hutchinson_is_unbiased_with_the_variance_of_its_formula(probe):
    matrix = torch.randn(1, 5, 8, dtype=torch.float64)
    gram = matrix @ matrix.mT
    generator, sampled = torch.Generator().manual_seed(0), Hutchinson(1, probe, solver=None)
    samples = torch.cat([sampled.trace(MatrixOperator(matrix), generator) for _ in range(4000)])
    variance = probe.variance(gram)[0]
    assert abs(samples.mean() - gram[0].trace()) < 4 * (variance / 4000).sqrt()
    # the variance of a sample variance of near-normal values: relative 2 / n, doubled or so by heavier tails
    assert_close(samples.var(), variance, rtol=0.2, atol=0)


def test_random_signs_vary_least_and_not_at_all_for_a_diagonal_gram():
    gram = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    assert Rademacher().variance(gram) == 0
    assert StandardNormal().variance(gram) == 28


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.5)])
def test_sampled_labels_are_the_scores_of_the_model_s_own_labels(likelihood):
    count, generator = 5000, torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 6, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    fisher = InputFisher(lambda x: x @ weight.T, x, likelihood)
    scores = torch.cat([fisher.adjoint(SampledLabels().draw(fisher, generator)) for _ in range(count)])
    rows = torch.cat([fisher.adjoint(unit[None]) for unit in torch.eye(4, dtype=torch.float64)])
    expected = rows.T @ rows
    scale = expected.diagonal().mean()
    # entries are means of 5,000 products of scores: standard errors of about 2 % of the scale
    assert_close(scores.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=0.08 * scale.sqrt().item())
    assert_close(scores.T @ scores / count, expected, rtol=0, atol=0.12 * scale.item())
    trace = Hutchinson(count, SampledLabels(), solver=None).trace(fisher)
    assert_close(trace[0], expected.trace(), rtol=0.1, atol=0)


def test_a_sampled_score_is_the_gradient_of_a_log_probability():
    weight, x = torch.randn(3, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    fisher = InputFisher(lambda x: x @ weight.T, x, Categorical())
    scores = fisher.adjoint(SampledLabels().draw(fisher, torch.Generator().manual_seed(0)))
    p = (x @ weight.T).softmax(1)
    possible = torch.stack([weight[label] - p @ weight for label in range(3)], 1)
    nearest = (possible - scores[:, None]).norm(dim=2).amin(1)
    assert_close(nearest, torch.zeros(50, dtype=torch.float64))


@pytest.mark.parametrize("probe", [Rademacher(), StandardNormal(), SampledLabels()])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_the_trace_of_an_example_does_not_depend_on_the_batch(probe, likelihood):
    model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 17))
    x = torch.randn(50, 12)
    options = {"estimator": Hutchinson(4, probe), "likelihood": likelihood}
    whole, alone = fisher_trace(model, x, **options), fisher_trace(model, x[7:8], **options)
    assert_close(whole[7:8], alone, rtol=1e-4, atol=0)
    assert_close(whole.flip(0), fisher_trace(model, x.flip(0), **options), rtol=1e-4, atol=0)


def test_the_sampled_trace_is_never_below_the_eigenvalue_and_is_exact_where_the_space_holds_everything():
    model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 40)).double(), torch.randn(60, 12).double()
    result, trace = fisher_spectral_norm_and_trace(model, x, estimator=Hutchinson(1))
    assert (trace >= result.eigenvalue).all()
    assert (fisher_trace(model, x, estimator=Hutchinson(1)) >= result.eigenvalue * (1 - 1e-3)).all()
    assert (fisher_effective_rank(model, x) >= 1).all()
    narrow = nn.Linear(2, 40).double()  # rank two
    exact = fisher_trace(narrow, x[:, :2], estimator=Exact())
    assert_close(fisher_trace(narrow, x[:, :2], estimator=Hutchinson(1)), exact)


def test_deflation_leaves_the_estimate_unbiased_with_a_smaller_error():
    model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 40)).double(), torch.randn(8, 12).double()
    exact = fisher_trace(model, x, estimator=Exact())
    errors = {}
    for solver in (None, Lanczos(is_exact=True)):
        samples = torch.stack(
            [
                fisher_trace(
                    model, x, estimator=Hutchinson(2, solver=solver), generator=torch.Generator().manual_seed(s)
                )
                for s in range(60)
            ]
        )
        spread = samples.std(0)
        assert ((samples.mean(0) - exact).abs() < 4 * spread / 60**0.5).all()
        errors[solver] = (spread / exact).median()
    assert errors[Lanczos(is_exact=True)] < 0.7 * errors[None]


def test_eigenvalue_and_trace_together_do_no_pass_twice():
    # K = 9: exact; K = 40: the passes of the solver and two samples
    counts = []

    class Counting(MatrixOperator):
        def adjoint(self, u):
            counts.append(1)
            return super().adjoint(u)

    matrix = torch.randn(3, 40, 50, dtype=torch.float64)
    result = Lanczos(is_exact=True).solve(Counting(matrix))
    backward = len(counts)
    Hutchinson(2).trace_beside(Counting(matrix), result)
    assert len(counts) == backward + 2
    exact = Exact().solve(Counting(matrix))
    counts.clear()
    assert_close(Hutchinson(2).trace_beside(Counting(matrix), exact), matrix.square().sum((1, 2)))
    assert not counts


def test_exact_trace_is_the_sum_of_squares():
    matrix = torch.randn(3, 5, 8, dtype=torch.float64)
    assert_close(Exact().trace(MatrixOperator(matrix)), (matrix.mT @ matrix).diagonal(dim1=1, dim2=2).sum(1))


@pytest.mark.parametrize("sample", [signs, uniform, normal])
def test_random_numbers_follow_the_generator(sample):
    like = torch.zeros(50, 3)
    first, again = (sample(like, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == like.shape
    assert len(first.unique()) == (2 if sample is signs else 150)


def test_signs_are_fair():
    drawn = signs(torch.zeros(10000), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {-1.0, 1.0}
    assert abs(drawn.mean()) < 0.04  # four standard errors


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="Hutchinson needs num_samples >= 1; got -1"):
        Hutchinson(-1)
