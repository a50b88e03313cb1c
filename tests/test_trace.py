import pytest
import torch
from torch.testing import assert_close

from fisher_reg import Bernoulli, Categorical, Exact, Gaussian, Hutchinson, Rademacher, SampledLabels, StandardNormal
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
    count = 20000
    weight, x = torch.randn(4, 6, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    fisher = InputFisher(lambda x: x @ weight.T, x.expand(count, -1), likelihood)
    scores = fisher.adjoint(SampledLabels().draw(fisher, torch.Generator().manual_seed(0)))
    one = InputFisher(lambda x: x @ weight.T, x, likelihood)
    rows = torch.cat([one.adjoint(unit[None]) for unit in torch.eye(4, dtype=torch.float64)])
    expected = rows.T @ rows
    scale = expected.diagonal().mean()
    # entries are means of 20,000 products of scores: standard errors of about 1 % of the scale
    assert_close(scores.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=0.05 * scale.sqrt().item())
    assert_close(scores.T @ scores / count, expected, rtol=0, atol=0.06 * scale.item())
    trace = Hutchinson(1, SampledLabels(), solver=None).trace(fisher, torch.Generator().manual_seed(0))
    assert_close(trace.mean(), expected.trace(), rtol=0.05, atol=0)


def test_a_sampled_score_is_the_gradient_of_a_log_probability():
    weight, x = torch.randn(3, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    fisher = InputFisher(lambda x: x @ weight.T, x, Categorical())
    scores = fisher.adjoint(SampledLabels().draw(fisher, torch.Generator().manual_seed(0)))
    p = (x @ weight.T).softmax(1)
    possible = torch.stack([weight[label] - p @ weight for label in range(3)], 1)
    nearest = (possible - scores[:, None]).norm(dim=2).amin(1)
    assert_close(nearest, torch.zeros(50, dtype=torch.float64))


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
