"""The monitor in the linf norm: what it logs beside the eigenvalue."""

import csv

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.testing import assert_close

from fisher_reg import FisherMonitor, LInf, fisher_linf_norm, fisher_spectral_norm
from fisher_reg.metrics import summarize
from tests import cases

KEYS = {f"fisher/lambda_linf_{name}" for name in ("mean", "median", "p95", "max")}
KEYS |= {"fisher/log10_lambda_linf_max", "fisher/log10_lambda_linf_median"}
SHOWN = KEYS - {"fisher/lambda_linf_max", "fisher/lambda_linf_median", "fisher/log10_lambda_linf_median"}


def _fit(folder, monitor, module=None, **kwargs):
    torch.manual_seed(1)
    module = module or cases.Plain(cases.tiny_network())
    trainer = cases.trainer(folder, callbacks=[monitor], **kwargs)
    trainer.fit(module, cases.tiny_batches(), cases.tiny_batches(count=10, batch_size=4, seed=1))
    return trainer, module


def _probe(count):
    return torch.cat([x for x, _ in cases.tiny_batches(count=10, batch_size=4, seed=1)])[:count]


def _of_linf(names):
    return {name for name in names if "lambda_linf" in name}


def test_logs_the_values_of_the_function_on_the_probe_beside_the_eigenvalue(tmp_path):
    std = [0.5, 0.5, 0.5, 2.0, 2.0, 2.0]
    monitor = FisherMonitor(num_samples=7, bounds=(), geometry=LInf(), input_std=std)
    trainer, module = _fit(tmp_path, monitor)
    logged = trainer.callback_metrics
    assert _of_linf(logged) == KEYS
    expected = summarize(fisher_linf_norm(module, _probe(7), input_std=std).value)
    for name, value in expected.items():
        assert_close(logged[f"fisher/lambda_linf_{name}"].item(), value.item())
        assert monitor.history[0][f"fisher/lambda_linf_{name}"] == logged[f"fisher/lambda_linf_{name}"]
    assert_close(logged["fisher/log10_lambda_linf_max"].item(), expected["max"].log10().item(), rtol=1e-4, atol=1e-5)
    eigenvalue = fisher_spectral_norm(module, _probe(7), input_std=std).eigenvalue
    assert_close(logged["fisher/lambda_max_mean"].item(), eigenvalue.mean().item())


@pytest.mark.parametrize(("detailed", "expected"), [(False, SHOWN), (True, KEYS)])
def test_the_main_curves_go_to_the_loggers_and_all_if_detailed(tmp_path, detailed, expected):
    logger = CSVLogger(tmp_path, name="", version="")
    _fit(tmp_path, FisherMonitor(bounds=(), geometry=LInf(), detailed=detailed), logger=logger)
    with (tmp_path / "metrics.csv").open() as file:
        assert _of_linf(next(csv.DictReader(file))) == expected


def test_without_it_nothing_is_logged_of_linf(tmp_path):
    trainer, _ = _fit(tmp_path, FisherMonitor(bounds=()))
    assert _of_linf(trainer.callback_metrics) == set()


def test_an_example_that_fails_counts_in_no_number(tmp_path):
    x = _probe(6)
    x[2] = torch.nan
    monitor = FisherMonitor(bounds=(), geometry=LInf(), probe=x)
    with pytest.warns(UserWarning, match="leaves out 1 of the 6 examples"):
        trainer, module = _fit(tmp_path, monitor)
    expected = fisher_linf_norm(module, x[[0, 1, 3, 4, 5]]).value
    assert_close(trainer.callback_metrics["fisher/lambda_linf_mean"].item(), expected.mean().item())


def test_where_all_fail_the_keys_are_there_and_training_goes_on(tmp_path):
    class Diverging(cases.Plain):
        def forward(self, x):
            return self.network(x) * (1.0 if self.training else torch.nan)

    with pytest.warns(UserWarning, match="leaves out 10 of the 10 examples"):
        trainer, _ = _fit(tmp_path, FisherMonitor(bounds=(), geometry=LInf()), Diverging(cases.tiny_network()))
    assert _of_linf(trainer.callback_metrics) == KEYS
    assert trainer.callback_metrics["fisher/lambda_linf_mean"].isnan()


def test_other_geometries_are_refused_at_once():
    class Other:
        norm = dual_norm = steepest = typical_entry = lambda self, *values: None

    with pytest.raises(TypeError, match=r"FisherMonitor needs geometry .* Write geometry=LInf\(\)"):
        FisherMonitor(geometry=LInf)
    with pytest.raises(TypeError, match=r"Write geometry=LInf\(\)"):
        FisherMonitor(geometry="linf")
    with pytest.raises(ValueError, match=r"FisherMonitor measures with geometry=L2\(\) or LInf\(\)"):
        FisherMonitor(geometry=Other())
