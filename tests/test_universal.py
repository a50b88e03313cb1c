import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from fisher_reg import (
    Bernoulli,
    Categorical,
    Exact,
    Gaussian,
    HutchinsonMax,
    Lanczos,
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


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(2.0)])
@pytest.mark.parametrize("solver", [Lanczos(num_steps=12, rtol=1e-6), PowerIteration(3000, rtol=1e-4)])
def test_value_residual_and_vectors_are_those_of_the_dense_mean(likelihood, solver):
    model, batches = cases.tiny_network().double(), list(torch.randn(11, 6, dtype=torch.float64).split([4, 4, 3]))
    stacked = torch.cat([_factors(model, x, likelihood) for x in batches]).flatten(0, 1) / 11**0.5  # (N K, d)
    mean = stacked.T @ stacked
    exact = torch.linalg.eigvalsh(mean)
    found = universal_spectral_norm(model, batches, likelihood=likelihood, solver=solver)
    v, u = found.eigenvector.flatten(), found.left_singular_vector.flatten()
    assert_close(found.eigenvalue, exact[-1:], rtol=1e-6, atol=0)
    assert_close(found.residual[0], (mean @ v - found.eigenvalue * v).norm(), rtol=1e-3, atol=1e-14)
    assert_close(v.norm().item(), 1.0)
    assert_close(u, stacked @ v / found.eigenvalue.sqrt(), rtol=1e-6, atol=1e-9)
    assert found.converged.all()
    assert found.ritz_values[0, 0] == found.ritz_values.max()
    if isinstance(solver, Lanczos):
        ritz = found.ritz_values[0, :6]
        assert (ritz <= exact.flip(0)[: len(ritz)] * (1 + 1e-12) + 1e-12).all()


def _factors(model, x, likelihood):
    """A = L J, (B, K, d), by the dense Jacobian."""
    jacobian = torch.stack([torch.autograd.functional.jacobian(model, example) for example in x])
    logits = model(x).detach()
    return torch.stack([likelihood.whiten(logits, column) for column in jacobian.unbind(2)], 2)


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_of_two_near_eigenvalues_is_found(seed):
    # 10 % apart, and most of the trace elsewhere
    torch.manual_seed(seed)
    weight = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q * torch.cat(
        [torch.tensor([1.0, 0.95]), torch.linspace(0.7, 0.1, 38)]
    )
    found = universal_spectral_norm(
        lambda x: x @ weight.T, [torch.zeros(4, 40, dtype=torch.float64)] * 2, likelihood=Gaussian()
    )
    assert_close(found.eigenvalue.item(), 1.0, rtol=1e-2, atol=0)


def test_a_matrix_of_zeros_and_one_of_rank_one_end_at_once():
    flat = universal_spectral_norm(lambda x: 0 * x, [torch.randn(3, 4)])
    assert flat.eigenvalue == 0
    assert flat.residual == 0
    assert flat.converged.all()
    assert (flat.eigenvector == 0).all()
    assert (flat.left_singular_vector == 0).all()
    weight = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    line = universal_spectral_norm(lambda x: x @ weight.T, [torch.zeros(3, 3)], solver=Lanczos(20, rtol=1e-5))
    assert_close(line.eigenvalue.item(), 25 / 4)
    assert line.num_steps <= 3
    assert_close(line.eigenvector.abs(), torch.tensor([[0.6, 0.8, 0.0]]))


@pytest.mark.parametrize("solver", [Exact(), HutchinsonMax(), "lanczos"])
def test_another_solver_is_refused_before_any_work(solver):
    def model(x):
        raise AssertionError("called")

    with pytest.raises(TypeError, match=r"(takes solver=Lanczos\(...\) or solver=PowerIteration|needs solver).*got"):
        universal_spectral_norm(model, [torch.zeros(2, 3)], solver=solver)


def test_a_part_under_no_grad_is_noticed_and_inference_mode_changes_nothing():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            with torch.no_grad():
                blocked = self.first(x)
            return blocked + 0.2 * self.last(x)

    x = torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"disagree.*no_grad"):
        universal_spectral_norm(Skips(), [x])
    network = cases.tiny_network()
    plain = universal_spectral_norm(network, [x])
    with torch.inference_mode():
        inside = universal_spectral_norm(network, [x.clone()])
    assert_close(inside.eigenvalue, plain.eigenvalue)


class _Largest(TorchDispatchMode):
    """Keep the numbers of elements of the tensors that are made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        if not any(returned.alias_info for returned in func._schema.returns):  # views and changes in place hold no more
            self.sizes += [one.numel() * one.element_size() for one in made if isinstance(one, Tensor)]
        return result


def test_nothing_but_the_left_vector_grows_with_the_number_of_inputs():
    num_batches, batch_size, num_classes = 30, 10, 40
    network = nn.Linear(6, num_classes)
    batches = list(torch.randn(num_batches, batch_size, 6))
    with _Largest() as largest:
        universal_spectral_norm(network, batches)
    per_batch, left = 8 * batch_size * num_classes, 4 * num_batches * batch_size * num_classes
    beyond = [size for size in largest.sizes if size > per_batch]  # one batch in double precision
    assert beyond == [left]


@pytest.mark.slow
def test_fifty_thousand_inputs_with_a_thousand_classes_fit_in_two_gibibytes():
    program = """
import resource, torch
from fisher_reg import Lanczos, universal_spectral_norm
torch.manual_seed(0)
x, model = torch.randn(50_000, 32), torch.nn.Linear(32, 1000)
universal_spectral_norm(model, [x[:4]], solver=Lanczos(1))  # what the libraries take
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = universal_spectral_norm(model, list(x.split(500)), solver=Lanczos(1))
assert result.left_singular_vector.shape == (1, 50_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) * 1024 < 2 * 2**30  # kibibytes on Linux
