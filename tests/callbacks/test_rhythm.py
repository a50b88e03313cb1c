"""When the monitor measures, and that what it measured then reaches loggers and other callbacks."""

import torch
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
