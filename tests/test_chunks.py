"""A large batch goes in parts that fit into a memory budget, and gives the same numbers."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Categorical,
    Exact,
    FisherMonitor,
    FisherSpectralNorm,
    FisherTrace,
    Hutchinson,
    Lanczos,
    LInf,
    chunks,
    fisher_effective_rank,
    fisher_eigenpairs,
    fisher_spectral_norm,
    fisher_spectral_norm_and_trace,
    fisher_trace,
)
from fisher_reg.chunks import Batch, budget_on, bytes_per_example, graph_bytes
from fisher_reg.estimate import evaluation_operator
from fisher_reg.measurement import measure
from tests import cases

WIDTH, CLASSES = 8, 10
PER_EXAMPLE = 4 * WIDTH + 4 * 6 * 12  # the output of tanh, and what Lanczos keeps
SMALL = 5 * PER_EXAMPLE  # five examples
CALLS = []


class Counted(nn.Module):
    """Two layers that note with how many examples they are called, and whether for a graph."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x):
        CALLS.append((len(x), torch.is_grad_enabled()))
        return self.layers(x)


@pytest.fixture(autouse=True)
def _no_calls_yet():
    CALLS.clear()


def _x(count=32):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def _sizes_of_graphs():
    return [count for count, has_graph in CALLS if has_graph]


ESTIMATES = {
    "norm": fisher_spectral_norm,
    "exact": partial(fisher_spectral_norm, solver=Exact()),
    "eigenpairs": partial(fisher_eigenpairs, num_eigenpairs=3),
    "eigenpairs by Lanczos": partial(fisher_eigenpairs, num_eigenpairs=2, solver=Lanczos(is_exact=True)),
    "rank": fisher_effective_rank,
    "trace": partial(fisher_trace, estimator=Exact()),
    "sampled trace": partial(fisher_trace, estimator=Hutchinson()),
    "both": partial(fisher_spectral_norm_and_trace, solver=Lanczos(is_exact=True), estimator=Hutchinson(2)),
    "measure": partial(measure, geometry=LInf(), solver=Lanczos(is_exact=True)),
}


def _numbers(found):
    if isinstance(found, torch.Tensor):
        return [found]
    parts = (
        found
        if isinstance(found, tuple)
        else [getattr(found, name) for name in ("trace", "kl_ratio", "linf", "result") if hasattr(found, name)]
    )
    if not parts:
        return [found.eigenvalue, found.eigenvector.abs(), found.residual]
    return [number for part in parts for number in _numbers(part)]


@pytest.mark.parametrize("name", ESTIMATES)
def test_parts_give_the_numbers_of_the_whole(name):
    model, x = Counted().double(), _x().double()  # so that difference quotients say the same
    whole = ESTIMATES[name](model, x)
    assert max(_sizes_of_graphs()) == 32
    CALLS.clear()
    parts = ESTIMATES[name](model, x, memory_budget=2 * SMALL)
    assert max(_sizes_of_graphs()) <= 5
    assert_close(_numbers(parts), _numbers(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimate", [fisher_spectral_norm, partial(fisher_trace, estimator=Hutchinson(2))])
def test_the_parts_draw_what_the_whole_draws(estimate):
    found, states = [], []
    for memory_budget in (None, SMALL):
        generator = torch.Generator().manual_seed(5)
        found.append(_numbers(estimate(Counted(), _x(), generator=generator, memory_budget=memory_budget))[0])
        states.append(generator.get_state())
    assert_close(*found, rtol=1e-4, atol=1e-6)
    assert torch.equal(*states)


def test_a_batch_that_fits_costs_no_call_more():
    fisher_spectral_norm(Counted(), _x(64))
    expected = list(CALLS)
    assert all(count > 2 for count, has_graph in expected if has_graph)
    CALLS.clear()
    fisher_spectral_norm(Counted(), _x(64), memory_budget=64 * 6 * 4 * 1024)  # all that a graph is taken to keep
    assert expected == CALLS
    CALLS.clear()
    fisher_spectral_norm(Counted(), _x(64), memory_budget=64 * PER_EXAMPLE)  # fits, which a trial finds out
    assert [(2, True), (1, True), *expected] == CALLS


def test_a_batch_in_parts_costs_a_trial_and_a_forward_without_a_graph():
    fisher_spectral_norm(Counted(), _x(20), solver=Exact(), memory_budget=5 * (4 * WIDTH + 4 * 6 * CLASSES))
    assert [(2, True), (1, True), (20, False), *[(5, True)] * 4] == CALLS


def test_a_few_examples_are_not_measured():
    fisher_spectral_norm(Counted(), _x(15), solver=Exact(), memory_budget=10**6)
    assert CALLS == [(15, True)]


def test_the_graph_of_a_part_is_freed_before_the_next():
    alive = []

    def run(fisher):
        assert all(logits() is None for logits in alive)
        alive.append(weakref.ref(fisher.logits))

    batch = Batch(evaluation_operator, Counted(), _x(), Categorical(), None, None)
    batch.in_chunks(run, lambda num_outputs: Lanczos(), SMALL)
    assert len(alive) == 7


def _operator(model, x):
    with evaluation_operator(model, x, Categorical()) as fisher:
        return fisher


def test_the_bytes_of_an_example_are_those_of_its_activations_and_rows():
    assert bytes_per_example(_operator(Counted(), _x(2)), num_rows=12) == PER_EXAMPLE


def test_the_bytes_of_a_graph_are_those_that_autograd_saves():
    data = cases.digits()
    model, x = cases.network("vit", data).eval(), cases.test_images(data, 4).requires_grad_()
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    found = graph_bytes(model(x))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert abs(found - sum(storages.values())) < 0.05 * found
    assert found > weights


class Fixed(Counted):
    """Takes 32 examples and no others."""

    def forward(self, x):
        return super().forward(x.view(32, 6))


class Coupled(Counted):
    """An example depends on the others."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Placed(Counted):
    """An example depends on its place."""

    def forward(self, x):
        return super().forward(x + torch.linspace(0, 1, 32)[: len(x), None])


@pytest.mark.parametrize("kind", [Fixed, Coupled, Placed])
def test_a_model_that_takes_only_the_whole_batch_gets_it_whole(kind):
    expected = fisher_spectral_norm(kind(), _x(), solver=Exact()).eigenvalue
    CALLS.clear()
    found = fisher_spectral_norm(kind(), _x(), solver=Exact(), memory_budget=SMALL)
    assert torch.equal(found.eigenvalue, expected)
    assert max(_sizes_of_graphs()) == 32


class Masked(Counted):
    """Has a side input."""

    def forward(self, x, mask):
        return super().forward(x * mask)


def test_side_inputs_go_with_their_examples():
    mask = torch.rand(32, 6)
    expected = fisher_spectral_norm(Masked(), _x(), side_inputs=mask).eigenvalue
    CALLS.clear()
    found = fisher_spectral_norm(Masked(), _x(), side_inputs=mask, memory_budget=SMALL)
    assert_close(found.eigenvalue, expected, rtol=1e-4, atol=0)
    assert max(_sizes_of_graphs()) <= 5


def test_the_rows_of_exact_are_cut_where_the_graph_was_not_measured():
    per_example = 4 * 6 * CLASSES
    fisher_spectral_norm(Counted(), _x(15), solver=Exact(), memory_budget=5 * per_example)
    assert _sizes_of_graphs() == [15, 5, 5, 5]


@pytest.mark.parametrize("wrong", [0, -1, 4e9, True, "4 GiB"])
def test_a_budget_is_a_positive_number_of_bytes(wrong):
    message = "needs memory_budget to be a positive whole number of bytes"
    for call in (partial(fisher_spectral_norm, Counted(), _x()), partial(fisher_trace, Counted(), _x())):
        with pytest.raises(ValueError, match=f"fisher_.* {message}"):
            call(memory_budget=wrong)
    for kind in (FisherSpectralNorm, FisherTrace, FisherMonitor):
        with pytest.raises(ValueError, match=f"{kind.__name__} {message}"):
            kind(memory_budget=wrong)


def test_on_a_cuda_device_the_default_is_at_most_half_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**28)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**28)
    assert budget_on(torch.device("cuda"), None) == 3 * 2**28
    assert budget_on(torch.device("cuda"), 7) == 7
    assert budget_on(torch.device("cpu"), None) == chunks.DEFAULT_MEMORY_BUDGET


@pytest.mark.parametrize("kind", [FisherSpectralNorm, FisherTrace])
def test_the_metrics_pass_the_budget_on(kind):
    found = []
    for memory_budget in (None, SMALL):
        CALLS.clear()
        metric = kind(memory_budget=memory_budget)
        metric.update(Counted(), _x())
        found.append(metric.compute())
    assert max(_sizes_of_graphs()) <= 5
    assert_close(*found, rtol=1e-4, atol=0)


def test_the_monitor_passes_the_budget_on(tmp_path):
    found = []
    for memory_budget in (None, SMALL):
        monitor = FisherMonitor(probe=_x(), bounds=(), memory_budget=memory_budget, solver=Lanczos(is_exact=True))
        trainer = cases.trainer(tmp_path, callbacks=[monitor], limit_train_batches=0)
        CALLS.clear()
        trainer.validate(cases.Plain(Counted()), cases.tiny_batches(), verbose=False)
        found.append(trainer.callback_metrics["fisher/lambda_max_mean"])
    assert max(count for count in _sizes_of_graphs()) <= 5
    assert_close(*found, rtol=1e-4, atol=0)
