import copy
import csv
import warnings

import lightning.pytorch
import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Exact,
    FisherMonitor,
    HutchinsonMax,
    blockwise_fisher_bound,
    bound_versus_empirical,
    fisher_bound,
    fisher_spectral_norm,
    fisher_trace,
    local_fisher_bound,
)
from fisher_reg.metrics import summarize
from tests import cases
from tests.callbacks.test_regularizer import _fingerprint

KEYS = {
    "fisher/lambda_max_mean",
    "fisher/lambda_max_median",
    "fisher/lambda_max_p95",
    "fisher/lambda_max_max",
    "fisher/log10_lambda_max_max",
    "fisher/log10_lambda_max_median",
    "fisher/trace_mean",
    "fisher/wide_interval_share",
    "fisher/kl_ratio",
    "fisher/num_left_out",
    "fisher/bound_global",
    "fisher/log10_bound_global",
    "fisher/log10_gap_global",
    "fisher/seconds",
    "fisher/seconds_bound_global",
}
SHOWN = {
    "fisher/lambda_max_mean",
    "fisher/lambda_max_p95",
    "fisher/log10_lambda_max_max",
    "fisher/bound_global",
    "fisher/log10_bound_global",
    "fisher/log10_gap_global",
}


def _module(**kwargs):
    torch.manual_seed(1)
    return cases.Plain(cases.tiny_network(**kwargs))


def _fit(folder, module, monitor, val=True, **kwargs):
    trainer = cases.trainer(folder, callbacks=[monitor], **kwargs)
    loaders = [cases.tiny_batches()] + ([cases.tiny_batches(count=10, batch_size=4, seed=1)] if val else [])
    trainer.fit(module, *loaders)
    return trainer


def _probe(count):
    return torch.cat([x for x, _ in cases.tiny_batches(count=10, batch_size=4, seed=1)])[:count]


def test_logs_the_numbers_of_the_functional_interface_on_the_probe(tmp_path):
    module = _module(batch_norm=True)
    trainer = _fit(tmp_path, module, FisherMonitor(num_samples=7))
    logged, x = trainer.callback_metrics, _probe(7)
    assert {key for key in logged if key.startswith("fisher/")} == KEYS
    expected = summarize(fisher_spectral_norm(module, x).eigenvalue)
    for name, value in expected.items():
        assert_close(logged[f"fisher/lambda_max_{name}"].item(), value.item())
    bound = fisher_bound(module, x)
    assert_close(logged["fisher/log10_bound_global"].item(), bound.log10_value)
    assert_close(logged["fisher/bound_global"].item(), bound.value, rtol=1e-5, atol=0)
    gap = bound.log10_value - expected["max"].log10().item()
    assert_close(logged["fisher/log10_gap_global"].item(), gap, rtol=1e-4, atol=0)
    trace = fisher_trace(module, x, estimator=Exact()).mean()
    assert_close(logged["fisher/trace_mean"].item(), trace.item())  # four classes: exact
    assert logged["fisher/seconds"] > 0


def test_the_share_of_wide_intervals_is_logged(tmp_path):
    for solver, share in ((Exact(), 0.0), (HutchinsonMax(2), 1.0)):
        trainer = _fit(tmp_path, _module(), FisherMonitor(num_samples=7, solver=solver))
        assert trainer.callback_metrics["fisher/wide_interval_share"] == share


def test_bounds_at_the_inputs_are_logged_by_their_means_over_the_probe(tmp_path):
    module = _module(batch_norm=True)
    bounds = (fisher_bound, local_fisher_bound, blockwise_fisher_bound)
    monitor = FisherMonitor(num_samples=7, bounds=bounds)
    logged = _fit(tmp_path, module, monitor).callback_metrics
    x = _probe(7)
    decades = fisher_spectral_norm(module, x).eigenvalue.double().log10().mean().item()
    for level, bound in (("local", local_fisher_bound), ("blockwise", blockwise_fisher_bound)):
        upper = bound(module, x)
        assert_close(logged[f"fisher/bound_{level}_mean"].item(), upper.value.mean().item(), rtol=1e-4, atol=0)
        mean = upper.log10_value.mean().item()
        assert_close(logged[f"fisher/log10_bound_{level}"].item(), mean, rtol=1e-4, atol=0)
        assert_close(logged[f"fisher/log10_gap_{level}"].item(), mean - decades, rtol=1e-4, atol=1e-5)
        assert logged[f"fisher/log10_gap_{level}"] > (-1e-4 if level == "local" else 0)  # that is exact here
    seconds = sum(logged[f"fisher/seconds_bound_{level}"] for level in ("global", "local", "blockwise"))
    assert 0 < seconds < logged["fisher/seconds"]
    labels = [line.get_label() for line in bound_versus_empirical(monitor.history).axes[0].lines[:3]]
    assert [label.split()[0] for label in labels] == ["global", "local", "blockwise"]


def _epochs(monitor, key="fisher/log10_bound_global"):
    return [entry["epoch"] for entry in monitor.history if key in entry]


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({}, {"max_epochs": 4}, [0, 3]),
        ({"bound_every_n_epochs": 1}, {"max_epochs": 3}, [0, 1, 2]),
        ({"bound_every_n_epochs": 2}, {"max_epochs": 6}, [0, 2, 4, 5]),
        ({"bound_every_n_epochs": 2, "every_n_epochs": 3}, {"max_epochs": 6}, [0, 3]),
        ({"bound_every_n_epochs": 3}, {"max_epochs": 7, "check_val_every_n_epoch": 2}, [1, 5]),
        ({}, {"max_epochs": -1, "max_steps": 8}, [0, 3]),  # two steps per epoch
    ],
)
def test_bounds_are_measured_every_few_epochs_and_at_the_last(tmp_path, settings, options, expected):
    monitor = FisherMonitor(num_samples=4, **settings)
    _fit(tmp_path, _module(), monitor, **options)
    assert _epochs(monitor) == expected
    assert set(_epochs(monitor, "fisher/lambda_max_mean")) >= set(expected)
    for entry in monitor.history:
        absent = set() if entry["epoch"] in expected else {key for key in KEYS if "bound" in key or "gap" in key}
        assert set(entry) == KEYS - absent | {"epoch", "step"}
    bound = bound_versus_empirical(monitor.history).axes[0].lines[0]
    drawn = [epoch for epoch, value in zip(*bound.get_data(), strict=True) if value == value]
    assert drawn == expected


def test_epochs_without_a_bound_leave_the_loggers_and_a_given_probe_as_they_are(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitor = FisherMonitor(probe=_probe(5), bound_every_n_epochs=2)
    trainer = _fit(tmp_path, _module(), monitor, val=False, logger=logger, max_epochs=4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert len(events.Scalars("fisher/lambda_max_mean")) == 4
    assert len(events.Scalars("fisher/log10_bound_global")) == len(_epochs(monitor)) == 3
    assert len(events.Images("fisher/bound_versus_empirical")) == 3
    assert set(trainer.callback_metrics) >= KEYS


def test_bounds_go_on_in_their_rhythm_after_a_resume(tmp_path):
    trainer = _fit(tmp_path, _module(), FisherMonitor(bound_every_n_epochs=3), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    monitor = FisherMonitor(bound_every_n_epochs=3)
    trainer = cases.trainer(tmp_path, callbacks=[monitor], max_epochs=6)
    loaders = cases.tiny_batches(), cases.tiny_batches(count=10, batch_size=4, seed=1)
    trainer.fit(_module(), *loaders, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert _epochs(monitor) == [0, 1, 4, 5]


def test_the_probe_is_fixed_over_the_epochs_even_when_validation_is_shuffled(tmp_path):
    monitor, module = FisherMonitor(num_samples=4), _module()
    probes = []
    monitor.on_validation_end = lambda trainer, pl_module: probes.append(
        torch.cat([part.inputs for part in monitor._probe]).clone()
    )
    shuffled = torch.utils.data.DataLoader(cases.tiny_batches(count=10).dataset, batch_size=4, shuffle=True)
    trainer = cases.trainer(tmp_path, callbacks=[monitor], max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(module, cases.tiny_batches(), shuffled)
    assert len(probes) == 3
    assert all(torch.equal(probe, probes[0]) for probe in probes)


def test_training_is_the_same_with_and_without_the_monitor(tmp_path):
    states = []
    for callbacks in ([], [FisherMonitor()]):
        torch.manual_seed(3)
        module = _module(batch_norm=True, dropout=True)
        torch.manual_seed(3)
        trainer = cases.trainer(tmp_path, callbacks=callbacks, max_epochs=2)
        trainer.fit(module, cases.tiny_batches(), cases.tiny_batches(seed=1))
        states.append(module.state_dict())
    assert_close(*states, rtol=0, atol=0)


def test_the_module_is_what_it_was_after_fit_and_validate(tmp_path):
    module = _module(batch_norm=True, dropout=True)
    module.network[3].eval()
    before = _fingerprint(module)
    trainer = _fit(tmp_path, module, FisherMonitor())
    assert _fingerprint(module) == before
    trainer.validate(module, cases.tiny_batches(), verbose=False)
    assert _fingerprint(module) == before


def test_every_n_epochs_and_the_sanity_check(tmp_path):
    monitor = FisherMonitor(every_n_epochs=2)
    _fit(tmp_path, _module(), monitor, max_epochs=5)
    assert [entry["epoch"] for entry in monitor.history] == [0, 2, 4]


def test_epochs_are_counted_where_validations_fall(tmp_path):
    monitor = FisherMonitor(every_n_epochs=2)
    _fit(tmp_path, _module(), monitor, max_epochs=6, check_val_every_n_epoch=2)
    assert [entry["epoch"] for entry in monitor.history] == [1, 3, 5]
    _fit(tmp_path, _module(), monitor, max_epochs=2, val_check_interval=0.5)  # a new fit starts anew
    assert [entry["epoch"] for entry in monitor.history] == [0]
    monitor = FisherMonitor()
    _fit(tmp_path, _module(), monitor, max_epochs=2, val_check_interval=0.5)
    assert [(entry["epoch"], entry["step"]) for entry in monitor.history] == [(0, 1), (0, 2), (1, 3), (1, 4)]


def test_the_probe_is_of_the_first_loader(tmp_path):
    monitor = FisherMonitor(num_samples=12)
    trainer = cases.trainer(tmp_path, callbacks=[monitor])

    class Two(cases.Plain):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None

    loaders = [cases.tiny_batches(count=8, seed=1), cases.tiny_batches(count=8, seed=2)]
    trainer.fit(Two(cases.tiny_network()), cases.tiny_batches(), loaders)
    assert_close(torch.cat([part.inputs for part in monitor._probe]), torch.cat([x for x, _ in loaders[0]]))


def test_infinite_derivatives_are_warned_of_and_training_goes_on(tmp_path):
    class Steep(cases.Plain):
        def forward(self, x):
            return self.network(x) + (0 * x[:, :4]).norm(dim=1, keepdim=True).sqrt() * (not self.training)

    with pytest.warns(UserWarning, match="leaves out 10 of the 10 examples(.|\n)*are finite, but their derivatives"):
        trainer = _fit(tmp_path, Steep(cases.tiny_network()), FisherMonitor())
    assert trainer.callback_metrics["fisher/lambda_max_mean"].isnan()


def test_validate_measures_too(tmp_path):
    monitor = FisherMonitor(every_n_epochs=7)
    trainer = cases.trainer(tmp_path, callbacks=[monitor])
    results = trainer.validate(_module(), cases.tiny_batches(), verbose=False)
    assert {key for key in results[0] if key.startswith("fisher/")} == SHOWN
    assert set(trainer.callback_metrics) >= KEYS
    assert monitor.history == []


def test_test_measures_too_on_the_test_data(tmp_path):
    trainer = cases.trainer(tmp_path, callbacks=[FisherMonitor(num_samples=5)])

    class Tested(cases.Plain):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    torch.manual_seed(1)
    module = Tested(cases.tiny_network())
    trainer.fit(module, cases.tiny_batches(), cases.tiny_batches(seed=1))
    loader = cases.tiny_batches(seed=2)
    logged = trainer.test(module, loader, verbose=False)[0]
    expected = fisher_spectral_norm(module, next(iter(loader))[0]).eigenvalue
    x = torch.cat([batch[0] for batch in loader])[:5]
    expected = fisher_spectral_norm(module, x).eigenvalue.mean()
    assert_close(logged["fisher/lambda_max_mean"], expected.item(), check_dtype=False)
    assert "fisher/bound_global" in logged


class _NoLogits(cases.Plain):
    def forward(self, x):
        return {"logits": self.network(x)}

    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0])["logits"], batch[1]))


def test_a_setting_that_cannot_work_fails_in_the_sanity_check(tmp_path):
    module = _NoLogits(cases.tiny_network())
    with pytest.raises(ValueError, match="it returned dict.*logits_fn=lambda"):
        _fit(tmp_path, module, FisherMonitor())
    with pytest.raises(AssertionError, match="training began"):
        _fit(tmp_path, module, FisherMonitor(logits_fn=lambda module, x: module(x)["logits"]))


def test_a_given_probe_needs_no_validation(tmp_path):
    monitor, module = FisherMonitor(probe=_probe(5)), _module()
    trainer = _fit(tmp_path, module, monitor, val=False, max_epochs=2)
    assert [entry["epoch"] for entry in monitor.history] == [0, 1]
    expected = fisher_spectral_norm(module, _probe(5)).eigenvalue.mean()
    assert_close(trainer.callback_metrics["fisher/lambda_max_mean"].item(), expected.item())


def test_a_fit_without_anything_to_measure_on_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"validation data and this fit has none.*probe=inputs"):
        _fit(tmp_path, _module(), FisherMonitor(), val=False)


def test_tensorboard_gets_scalars_histogram_figure_and_chart(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    _fit(tmp_path, _module(), FisherMonitor(), logger=logger, max_epochs=2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert {key for key in tags["scalars"] if key.startswith("fisher/")} == SHOWN
    assert tags["histograms"] == ["fisher/log10_lambda_max"]
    assert tags["images"] == ["fisher/bound_versus_empirical"]
    assert "custom_scalars__config__" in tags["tensors"]
    assert len(events.Images("fisher/bound_versus_empirical")) == 2


def test_a_csv_logger_gets_the_curves(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    _fit(tmp_path, _module(), FisherMonitor(), logger=logger, max_epochs=2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["fisher/lambda_max_mean"]]
    assert len(rows) == 2
    assert {key for key in rows[0] if key.startswith("fisher/")} == SHOWN


def test_a_detailed_monitor_sends_all_keys_to_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    _fit(tmp_path, _module(), FisherMonitor(detailed=True), logger=logger)
    with (tmp_path / "metrics.csv").open() as file:
        assert {key for key in next(csv.DictReader(file)) if key.startswith("fisher/")} == KEYS


def test_history_survives_a_resume(tmp_path):
    module = _module()
    trainer = _fit(tmp_path, module, FisherMonitor(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    monitor = FisherMonitor()
    trainer = cases.trainer(tmp_path, callbacks=[monitor], max_epochs=3)
    loaders = cases.tiny_batches(), cases.tiny_batches(count=10, batch_size=4, seed=1)
    trainer.fit(_module(), *loaders, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert [entry["epoch"] for entry in monitor.history] == [0, 1, 2]


def test_non_finite_logits_are_warned_of_once_and_training_goes_on(tmp_path):
    class Diverging(cases.Plain):
        def forward(self, x):
            return self.network(x) * (1.0 if self.training else torch.nan)

    torch.manual_seed(1)
    module = Diverging(cases.tiny_network())
    monitor = FisherMonitor()
    with pytest.warns(UserWarning, match="leaves out 10 of the 10 examples(.|\n)*are NaN") as caught:
        trainer = _fit(tmp_path, module, monitor, max_epochs=3)
    assert sum("FisherMonitor leaves out 10" in str(warning.message) for warning in caught) == 1
    assert trainer.current_epoch == 3
    assert len(monitor.history) == 3
    assert trainer.callback_metrics["fisher/lambda_max_mean"].isnan()


def test_non_finite_weights_do_not_stop_a_training(tmp_path):
    module = _module()
    nn.init.constant_(module.network[0].weight, torch.nan)
    with pytest.warns(UserWarning, match="has NaN or infinite values in weight"):
        trainer = _fit(tmp_path, module, FisherMonitor())
    assert trainer.current_epoch == 1


def test_a_network_without_a_bound_is_told_of_once_and_measured(tmp_path):
    torch.manual_seed(1)
    module = cases.Plain(nn.Sequential(nn.Bilinear(6, 6, 4)))
    module.network.forward = lambda x: module.network[0](x, x)
    monitor = FisherMonitor()
    with pytest.warns(UserWarning, match=r"No bound rule for Bilinear(.|\n)*register_bound_rule") as caught:
        trainer = _fit(tmp_path, module, monitor, max_epochs=2)
    assert sum("leaves out a bound" in str(warning.message) for warning in caught) == 1
    assert trainer.callback_metrics["fisher/lambda_max_mean"] > 0
    assert "fisher/bound_global" not in trainer.callback_metrics


def test_works_in_a_trainer_of_the_other_namespace(tmp_path):
    trainer = cases.trainer(tmp_path, lightning.pytorch.Trainer, callbacks=[FisherMonitor()])
    trainer.fit(cases.OtherPlain(cases.tiny_network()), cases.tiny_batches(), cases.tiny_batches(seed=1))
    assert set(trainer.callback_metrics) >= KEYS


def test_a_checkpoint_holds_no_second_copy_of_the_model(tmp_path):
    module = _module()
    trainer = _fit(tmp_path, module, FisherMonitor())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(module.state_dict())
    assert copy.deepcopy(FisherMonitor()).history == []


def test_without_matplotlib_there_is_no_figure_and_one_warning(tmp_path, monkeypatch):
    for module in ("monitor", "pictures"):
        monkeypatch.setattr(f"fisher_reg.callbacks.{module}.find_spec", lambda name: None)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="matplotlib is not installed"):
        _fit(tmp_path, _module(), FisherMonitor(), logger=logger)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == []
    assert events.Tags()["histograms"] == ["fisher/log10_lambda_max"]


@pytest.mark.parametrize("settings", [{"every_n_epochs": 0}, {"num_samples": 0}, {"bound_every_n_epochs": 0}])
def test_bad_settings_are_refused_at_once(settings):
    with pytest.raises(ValueError, match=">= 1; got 0"):
        FisherMonitor(**settings)


def test_no_warning_in_a_usual_run(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(tmp_path, _module(), FisherMonitor())
    assert not [warning for warning in caught if "fisher" in str(warning.filename) or "Fisher" in str(warning.message)]
