import copy
import pickle
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torchmetrics import MetricCollection

from fisher_reg import Exact, FisherSpectralNorm, FisherTrace, Lanczos, fisher_spectral_norm, fisher_trace
from fisher_reg.metrics import summarize
from tests import cases


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
    metric = FisherSpectralNorm(solver=Lanczos(num_steps=1, rtol=0.0))
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
