import copy

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from fisher_reg import (
    Bernoulli,
    Categorical,
    Gaussian,
    PowerIteration,
    fisher_spectral_norm,
    universal_spectral_norm,
)
from tests import cases, oracles


def test_the_mean_matrix_has_the_eigenvalue_of_the_definition_and_stays_below_the_mean(trained, digits):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 24).double()
    dense = oracles.fisher_by_scores(model, x)
    values, vectors = torch.linalg.eigh(dense.mean(0))
    loader = DataLoader(TensorDataset(x, torch.zeros(24)), batch_size=10)
    result = universal_spectral_norm(model, loader)
    assert_close(result.eigenvalue.item(), values[-1].item(), rtol=1e-3, atol=0)
    assert result.converged.all()
    assert result.eigenvector.shape == (1, *x.shape[1:])
    assert abs(result.eigenvector.flatten() @ vectors[:, -1]) > 0.99
    assert result.eigenvalue < fisher_spectral_norm(model, x).eigenvalue.mean()


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_identical_inputs_make_both_averages_equal(likelihood):
    model, x = cases.tiny_network().double(), torch.randn(1, 6, dtype=torch.float64)
    one = fisher_spectral_norm(model, x, likelihood=likelihood)
    std = torch.full((6,), 2.0, dtype=torch.float64)
    for solver in (None, PowerIteration(rtol=1e-6)):
        options = {} if solver is None else {"solver": solver}
        mean = universal_spectral_norm(model, [x.expand(4, -1), x], likelihood=likelihood, **options)
        assert_close(mean.eigenvalue, one.eigenvalue, rtol=1e-4, atol=0)
    scaled = universal_spectral_norm(model, [x, x], likelihood=likelihood, input_std=std)
    assert_close(scaled.eigenvalue, one.eigenvalue / 4, rtol=1e-4, atol=0)


def test_batches_that_change_or_end_are_refused_and_the_module_is_restored():
    model = cases.tiny_network(batch_norm=True).train()
    x = torch.randn(16, 6)
    shuffled = DataLoader(TensorDataset(x), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="not the same each time"):
        universal_spectral_norm(model, shuffled)
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="can be iterated only once"):
        universal_spectral_norm(model, iter([x]))
    with pytest.raises(ValueError, match="batches is empty"):
        universal_spectral_norm(model, [])
    with pytest.raises(ValueError, match="floating-point"):
        universal_spectral_norm(model, [x.int()])


def test_a_loader_that_gives_fewer_batches_the_second_time_is_refused():
    class Shrinking:
        def __init__(self):
            self.batches = [torch.ones(2, 6), torch.zeros(3, 6)]

        def __iter__(self):
            yield from self.batches
            self.batches = self.batches[:1]

    with pytest.raises(ValueError, match="not the same each time"):
        universal_spectral_norm(cases.tiny_network(), Shrinking())
