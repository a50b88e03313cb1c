"""Run as ``python -m tests.callbacks.killed FOLDER STEP ...``: a fit, and the same one killed at these steps.

It is resumed from its last checkpoint each time. Each life is a fork of this process, so that Python starts once. What
a life logs goes to ``logged.jsonl``, its state at the end to ``end.pt``, in ``FOLDER/whole`` and ``FOLDER/killed``.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from torch import nn

from fisher_reg import FisherMonitor, FisherRegularizer, SpectralPenalty
from tests import cases


class Module(cases.Plain):
    """Its batch follows from the step alone, since Lightning begins a loader anew when it resumes within an epoch."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(cases.tiny_network(batch_norm=True))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training:
            return batch
        generator = torch.Generator().manual_seed(self.trainer.global_step)
        return torch.randn(4, 6, generator=generator), torch.randint(0, 4, (4,), generator=generator)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Lines(Logger):
    """Appends what is logged to a file, at once."""

    name = version = "lines"

    def __init__(self, path):
        super().__init__()
        self.path = path

    def log_hyperparams(self, params):
        pass

    def log_metrics(self, metrics, step=None):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")


class Kills(pl.Callback):
    """Ends this process without any clearing up when a batch begins."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def callbacks():
    options = {"num_samples": 6, "bounds": ()}
    return [
        FisherMonitor(num_samples=6, bound_every_n_epochs=2),
        FisherMonitor(every_n_epochs=2, prefix="every_second", **options),
        FisherMonitor(every_n_steps=5, prefix="steps", **options),
        FisherMonitor(every_n_steps=3, prefix="given", probe=torch.ones(2, 6), bounds=()),
        FisherRegularizer(weight=0.1, every_n_steps=2, target_lambda=0.05, detailed=True),
        FisherRegularizer(
            0.05, SpectralPenalty(num_steps=2), every_n_steps=3, batch_fraction=0.5, warmup_steps=9, detailed=True
        ),
    ]


def fit(folder, kill_at):
    chosen, module, last = callbacks(), Module(), folder / "last.ckpt"
    saves = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_top_k=0)
    trainer = cases.trainer(
        folder,
        max_epochs=4,
        val_check_interval=4,
        callbacks=[*chosen, saves, Kills(kill_at)],
        enable_checkpointing=True,
        logger=Lines(folder / "logged.jsonl"),
    )
    resumed = {"ckpt_path": str(last) if last.exists() else None}
    trainer.fit(module, cases.tiny_batches(count=32), cases.tiny_batches(seed=7), **resumed)
    history = {callback.prefix: callback.history for callback in chosen if isinstance(callback, FisherMonitor)}
    weights = nn.utils.parameters_to_vector(module.parameters()).detach()
    torch.save({"history": history, "weights": weights, "weight": chosen[4].control.weight}, folder / "end.pt")


def live(folder, kill_at):
    """Fit in a fork and return its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            fit(folder, kill_at)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    whole, killed = Path(sys.argv[1]) / "whole", Path(sys.argv[1]) / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert live(whole, -1) == 0
    for step in sys.argv[2:]:
        assert live(killed, int(step)) == -signal.SIGKILL, step
    assert live(killed, -1) == 0
