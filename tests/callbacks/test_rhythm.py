"""When the monitor measures, and that what it measured then reaches loggers and other callbacks."""

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from fisher_reg import FisherMonitor
from tests import cases


def _module():
    torch.manual_seed(1)
    return cases.Plain(cases.tiny_network())


def _fit(folder, *callbacks, module=None, val=True, ckpt_path=None, **options):
    """Fit with four steps an epoch."""
    trainer = cases.trainer(folder, callbacks=list(callbacks), **options)
    val = cases.tiny_batches(seed=1) if val else None
    trainer.fit(module or _module(), cases.tiny_batches(count=16), val, ckpt_path=ckpt_path)
    return trainer


class _Rows(CSVLogger):
    """Remembers what it was given."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))
        super().log_metrics(metrics, step)


def test_what_is_measured_between_validations_reaches_the_loggers_whatever_log_every_n_steps(tmp_path):
    for log_every_n_steps in (50, 1):
        logger = _Rows(tmp_path)
        monitor = FisherMonitor(every_n_steps=3, probe=torch.ones(2, 6))
        trainer = _fit(tmp_path, monitor, logger=logger, max_epochs=2, log_every_n_steps=log_every_n_steps)
        rows = [(step + 1, row) for step, row in logger.rows if "fisher/lambda_max_mean" in row]
        assert [step for step, _ in rows] == [entry["step"] for entry in monitor.history] == [1, 4, 7]
        for (_, row), entry in zip(rows, monitor.history, strict=True):
            assert all(row[key] == entry[key] for key in row if key.startswith("fisher/"))
            assert "fisher/trace_mean" not in row
            assert row["epoch"] == entry["epoch"]
        assert float(trainer.callback_metrics["fisher/trace_mean"]) == monitor.history[-1]["fisher/trace_mean"]


class _Seen(EarlyStopping):
    """Remembers what it decided on."""

    def __init__(self, key):
        super().__init__(key, patience=100)
        self.values = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.values.append(float(trainer.callback_metrics[self.monitor]))
        super().on_train_epoch_end(trainer, pl_module)


def test_early_stopping_without_validation_sees_a_new_value_after_each_epoch(tmp_path):
    for rhythm in ({"every_n_epochs": 3}, {"every_n_steps": 3}, {"every_n_steps": 4}, {"every_n_steps": 100}):
        monitor, seen = FisherMonitor(probe=torch.ones(2, 6), **rhythm), _Seen("fisher/log10_gap_global")
        _fit(tmp_path, monitor, seen, val=False, max_epochs=3)
        at_the_end = {entry["step"]: entry["fisher/log10_gap_global"] for entry in monitor.history}
        assert seen.values == [at_the_end[step] for step in (4, 8, 12)]
        assert len(at_the_end) == len(monitor.history)  # none is measured twice


def test_a_resumed_training_measures_between_validations_from_the_first_one_on(tmp_path):
    def monitor():
        return FisherMonitor(every_n_steps=5, num_samples=None, bounds=())

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole, resumed = monitor(), monitor()
    _fit(tmp_path, whole, saves, max_epochs=5, enable_checkpointing=True)
    _fit(tmp_path, resumed, max_epochs=5, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert [entry["step"] for entry in resumed.history] == [entry["step"] for entry in whole.history] == [4, 9, 14, 19]
    assert len(resumed._probe.parts) == len(whole._probe.parts)


@pytest.mark.parametrize("rhythm", [{}, {"every_n_steps": 3}, {"every_n_steps": 4}, {"every_n_epochs": 2}])
@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": 10, "max_epochs": -1},
        {"max_steps": 10, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_steps": 16, "max_epochs": 3},
        {"max_epochs": 3},
        {"max_epochs": 3, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_epochs": 3, "accumulate_grad_batches": 3},
    ],
)
def test_the_last_measurement_has_the_bounds(tmp_path, rhythm, length):
    monitor = FisherMonitor(bound_every_n_epochs=100, **rhythm)
    _fit(tmp_path, monitor, **length)
    has_bounds = ["fisher/bound_global" in entry for entry in monitor.history]
    assert has_bounds[0]
    assert has_bounds[-1]
    assert sum(has_bounds) <= 3
