import copy
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, Running

from fisher_reg import (
    Categorical,
    Exact,
    FisherSpectralNorm,
    FisherTrace,
    Gaussian,
    Hutchinson,
    HutchinsonMax,
    Lanczos,
    fisher_spectral_norm,
    fisher_trace,
)
from fisher_reg.metrics import PerExampleValues, summarize
from tests import cases, metrics_ddp, oracles


@pytest.fixture
def model():
    return cases.tiny_network(batch_norm=True).eval()


@pytest.mark.parametrize(
    "reduction", [torch.mean, torch.max, torch.median, partial(torch.quantile, q=0.95), summarize, None]
)
def test_unequal_batches_count_by_example_and_equal_one_big_batch(model, reduction):
    x = torch.randn(10, 6)
    for metric, function in (
        (FisherSpectralNorm(reduction), lambda: fisher_spectral_norm(model, x).eigenvalue),
        (FisherTrace(reduction), lambda: fisher_trace(model, x)),
    ):
        for part in x.split([7, 2, 1]):
            metric.update(model, part)
        expected = function() if reduction is None else reduction(function())
        assert_close(metric.compute(), expected)


def test_reset_forward_and_collection(model):
    x, y = torch.randn(4, 6), torch.randn(3, 6)
    metrics = MetricCollection([FisherSpectralNorm(), FisherTrace()])
    batch_value = metrics(model, x)
    assert_close(batch_value["FisherSpectralNorm"], fisher_spectral_norm(model, x).eigenvalue.mean())
    metrics(model, y)
    both = fisher_spectral_norm(model, torch.cat([x, y])).eigenvalue.mean()
    assert_close(metrics.compute()["FisherSpectralNorm"], both)
    metrics.reset()
    metrics.update(model, y)
    assert_close(metrics.compute()["FisherTrace"], fisher_trace(model, y).mean())


def test_states_from_inference_mode_can_be_updated_outside(model):
    metric, x = FisherSpectralNorm(), torch.randn(4, 6)
    with torch.inference_mode():
        metric.update(model, x.clone())
    metric.update(model, x)
    assert_close(metric.compute(), fisher_spectral_norm(model, x).eigenvalue.mean())
    assert not any(value.is_inference() for value in metric.values)


def test_the_model_is_not_part_of_the_metric(model):
    metric = FisherSpectralNorm()
    metric.update(model, torch.randn(2, 6))
    assert not list(metric.parameters())
    assert not metric.state_dict()
    clone = pickle.loads(pickle.dumps(copy.deepcopy(metric)))
    assert_close(clone.compute(), metric.compute())


def test_two_merged_metrics_are_one(model):
    x = torch.randn(6, 6)
    first, second, whole = FisherSpectralNorm(), FisherSpectralNorm(), FisherSpectralNorm()
    first.update(model, x[:4])
    second.update(model, x[4:])
    whole.update(model, x)
    first.merge_state(second)
    assert_close(first.compute(), whole.compute())


def test_the_share_of_examples_with_a_wide_interval_is_told(model):
    metric = FisherSpectralNorm(solver=HutchinsonMax(2))
    assert metric.wide_share.isnan()
    metric.update(model, torch.randn(3, 6))
    metric.update(model, torch.randn(2, 6))
    assert metric.wide_share == 1
    metric.solver = Exact()
    metric.update(model, torch.randn(5, 6))
    assert metric.wide_share == 0.5
    with pytest.warns(DeprecationWarning, match="is now num_wide"):
        assert metric.unconverged == 5


def test_settings_reach_the_estimate(model):
    x, std = torch.randn(3, 6), torch.full((6,), 0.5)
    metric = FisherSpectralNorm(input_std=std)
    metric.update(model, x)
    assert_close(metric.compute(), 4 * fisher_spectral_norm(model, x).eigenvalue.mean())


def test_summary_of_nothing_is_nan():
    assert all(value.isnan() for value in summarize(torch.zeros(0)).values())


@pytest.mark.parametrize("metric_type", [FisherSpectralNorm, FisherTrace])
def test_a_metric_plots_its_value_like_every_torchmetric(model, metric_type):
    pytest.importorskip("matplotlib").use("agg")
    metric = metric_type()
    values = [metric(model, torch.randn(2, 6)) for _ in range(3)]
    _, axes = metric.plot()
    assert_close(float(axes.lines[0].get_ydata()[0]), metric.compute().item())
    _, axes = metric.plot(values)
    assert_close(torch.as_tensor(axes.lines[0].get_ydata()).float(), torch.stack(values))
    _, same = metric.plot(values, axes)
    assert same is axes


# class x functional x reference x processes x precision

REDUCTIONS = metrics_ddp.REDUCTIONS


def _reference(kind, model, x):
    """Eigenvalues of the Fisher matrix from its definition, a mean of outer products of scores."""
    matrices = oracles.fisher_by_scores(model.double(), x.double())
    return oracles.top_eigenvalue(matrices) if kind == "norm" else matrices.diagonal(dim1=1, dim2=2).sum(1)


def _functional(kind, model, x):
    if kind == "norm":
        return fisher_spectral_norm(model, x, solver=Exact()).eigenvalue
    return fisher_trace(model, x, estimator=Exact())


@pytest.mark.parametrize("dtype", metrics_ddp.DTYPES)
@pytest.mark.parametrize("kind", ["norm", "trace"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_class_function_and_definition_agree(kind, name, dtype):
    model, x = metrics_ddp.network(dtype), metrics_ddp.inputs(dtype)
    metric = metrics_ddp.metrics()[f"{kind}_{name}"]
    for part in x.split(3):
        metric.update(model, part)
    reduce = REDUCTIONS[name] or (lambda values: values)
    assert metric.compute().dtype == dtype
    assert_close(metric.compute(), reduce(_functional(kind, model, x)))
    expected = reduce(_reference(kind, metrics_ddp.network(dtype), x))
    assert_close(metric.compute().double(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-9)


def test_a_model_in_half_precision_gives_values_in_single_precision():
    model, x = metrics_ddp.network(torch.bfloat16), metrics_ddp.inputs(torch.bfloat16)
    metric = FisherSpectralNorm(None, solver=Exact())
    metric.update(model, x)
    assert metric.compute().dtype == torch.float32
    rounded = metrics_ddp.network(torch.bfloat16).float()
    assert_close(metric.compute(), fisher_spectral_norm(rounded, x.float(), solver=Exact()).eigenvalue)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.metrics_ddp"]
    running = [subprocess.Popen([*command, str(rank), str(folder)], env=environment, cwd=root) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("dtype", metrics_ddp.DTYPES)
def test_two_processes_give_what_one_gives(of_two_processes, dtype):
    first, second = (found[str(dtype)] for found in of_two_processes)
    collection = MetricCollection(metrics_ddp.metrics())
    collection.update(metrics_ddp.network(dtype), metrics_ddp.inputs(dtype))
    assert_close(first, collection.compute())
    assert_close(second, first)


def test_a_process_without_examples_adds_none(of_two_processes):
    x = metrics_ddp.inputs(torch.float32)
    expected = fisher_spectral_norm(metrics_ddp.network(torch.float32), x).eigenvalue.max()
    assert_close([found["alone"] for found in of_two_processes], [expected, expected])


# Collections, no examples, wrappers


def test_a_collection_never_merges_metrics_that_differ_in_a_setting(model):
    saturated = lambda x: 1e5 * model(x)  # noqa: E731  (every value is zero, whatever the setting)
    settings = {
        "plain": {},
        "pixels": {"input_std": 0.1},
        "list": {"input_std": [0.1] * 6},
        "gaussian": {"likelihood": Gaussian()},
        "exact": {"solver": Exact()},
        "lanczos": {"solver": Lanczos(num_steps=1)},
        "more_steps": {"solver": Lanczos(num_steps=2)},
    }
    together = MetricCollection({name: FisherSpectralNorm(**options) for name, options in settings.items()})
    alone = {name: FisherSpectralNorm(**options) for name, options in settings.items()}
    together.update(saturated, torch.randn(4, 6))
    assert len(together.compute_groups) == len(settings)
    together.reset()
    x = torch.randn(3, 6)
    together.update(model, x)
    for metric in alone.values():
        metric.update(model, x)
    assert_close(together.compute(), {name: metric.compute() for name, metric in alone.items()})
    traces = MetricCollection({"a": FisherTrace(), "b": FisherTrace(estimator=Hutchinson()), "c": FisherSpectralNorm()})
    traces.update(saturated, x)
    assert len(traces.compute_groups) == 3


def test_a_collection_merges_metrics_that_differ_in_the_reduction_alone(model):
    std = torch.full((6,), 0.5)
    made = {f"of_{name}": FisherSpectralNorm(reduce, input_std=std.clone()) for name, reduce in REDUCTIONS.items()}
    together = MetricCollection(made)
    x = torch.randn(4, 6)
    together.update(model, x)
    together.update(model, 2 * x)
    assert len(together.compute_groups) == 1
    expected = fisher_spectral_norm(model, torch.cat([x, 2 * x]), input_std=std).eigenvalue
    assert_close(together.compute()["of_max"], expected.max())
    assert_close(together.compute()["of_values"], expected)


class Unpicklable(Categorical):
    def __reduce__(self):
        raise TypeError("not to be pickled")


def test_objects_that_cannot_be_compared_are_different_settings(model):
    shared = Unpicklable()
    options = {"a": shared, "b": shared, "c": Unpicklable()}
    together = MetricCollection({name: FisherTrace(likelihood=likelihood) for name, likelihood in options.items()})
    together.update(model, torch.randn(4, 6))
    assert sorted(map(sorted, together.compute_groups.values())) == [["a", "b"], ["c"]]


def test_states_of_other_settings_are_not_merged(model):
    first, second = FisherTrace(), FisherTrace(input_std=0.5)
    first.update(model, torch.randn(2, 6))
    first.merge_state(second)  # it has nothing yet
    second.update(model, torch.randn(2, 6))
    with pytest.raises(ValueError, match="two FisherTrace with different settings"):
        first.merge_state(second)
    with pytest.raises(ValueError, match="Merge metrics with equal settings only"):
        first.merge_state(second.metric_state)


@pytest.mark.parametrize(
    "reduction",
    [torch.mean, torch.max, torch.min, torch.median, partial(torch.quantile, q=0.95), lambda v: (v > 1).sum(), float]
    + [lambda v: v.topk(3).values.mean(), summarize, lambda v: (v.mean(), len(v))],
)
@pytest.mark.parametrize("make", [FisherSpectralNorm, FisherTrace, PerExampleValues])
def test_nothing_seen_is_nan_with_the_warning_of_torchmetrics(make, reduction):
    metric = make(reduction)
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        result = metric.compute()
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else [result]
    assert all(torch.as_tensor(part).isnan().all() for part in parts)


def test_nothing_seen_without_a_reduction_is_no_value():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert FisherTrace(None).compute().shape == (0,)


@pytest.mark.parametrize("make", [FisherSpectralNorm, FisherTrace])
def test_wrappers_of_torchmetrics_work(model, make):
    x, y, z = torch.randn(3, 4, 6)
    function = {FisherSpectralNorm: lambda x: fisher_spectral_norm(model, x).eigenvalue}
    function = function.get(make, lambda x: fisher_trace(model, x))
    running = Running(make(torch.max), window=2)
    tracker = MetricTracker(make(), maximize=False)
    extremes = MinMaxMetric(make())
    for part in (x, y, z):
        running.update(model, part)
        tracker.increment()
        tracker.update(model, part)
        extremes(model, part)
    means = torch.stack([function(part).mean() for part in (x, y, z)])
    assert_close(running.compute(), function(torch.cat([y, z])).max())
    assert_close(tracker.compute_all(), means)
    assert tracker.best_metric() == pytest.approx(means.min().item())
    assert_close(extremes.compute()["min"], means.min())
    resampled = BootStrapper(make(), num_bootstraps=3, raw=True)
    resampled.update(inputs=x, model=model)
    assert resampled.compute()["raw"].shape == (3,)
    assert bool((resampled.compute()["raw"] <= function(x).max() * 1.001).all())
