"""Run as ``python -m tests.callbacks.ddp_monitor FOLDER``: monitors on 1, 2 and 3 processes, their numbers to files."""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from fisher_reg import (
    FisherMonitor,
    FisherRegularizer,
    KLPenalty,
    LInf,
    blockwise_fisher_bound,
    fisher_bound,
    local_fisher_bound,
)
from tests import cases


class Still(cases.Plain):
    """Four classes, for which the default solver is exact; the weights stay what they are."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Saves(pl.Callback):
    """Writes what this process has, and what early stopping would see on it."""

    def __init__(self, folder, monitors):
        self.folder = folder
        self.monitors = monitors

    def on_fit_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics.items()
        seen = {key: float(value) for key, value in metrics if not key.startswith("fisher/penalty")}
        saved = {monitor.prefix: monitor.history for monitor in self.monitors}
        name = f"{trainer.world_size}_{trainer.global_rank}.pt"
        torch.save({"history": saved, "seen": seen}, Path(self.folder) / name)


def images():
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))
    x[4] = torch.nan  # on the first of two processes, on the second of three
    return x


def loader(devices):
    data = torch.utils.data.TensorDataset(images(), torch.arange(10) % 4)
    return torch.utils.data.DataLoader(data, batch_size=max(2, 6 // devices))


def bound_that_fails_on_the_last_process(model, inputs, **options):
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        raise RuntimeError("out of memory")
    return fisher_bound(model, inputs, **options)


def run(folder, devices):
    bounds = (bound_that_fails_on_the_last_process, local_fisher_bound, blockwise_fisher_bound)
    x = images()
    monitors = [
        FisherMonitor(num_samples=None, prefix="all", bounds=bounds),
        # more than the ten; three processes repeat two of them
        FisherMonitor(num_samples=50, prefix="more", bounds=(), geometry=LInf()),
        FisherMonitor(num_samples=7, prefix="few", bounds=()),
        FisherMonitor(probe=x[~x.isnan().any(1)][:5], prefix="given", bounds=()),
        FisherMonitor(probe=x[:1], prefix="one", bounds=()),  # none is left for the other processes
    ]
    strategy = {"strategy": "ddp_spawn"} if devices > 1 else {}
    penalty = FisherRegularizer(0.1, KLPenalty(step=0.5, geometry=LInf()))
    callbacks = [*monitors, penalty, Saves(folder, monitors)]
    trainer = cases.trainer(folder, callbacks=callbacks, devices=devices, **strategy)
    trainer.fit(Still(), cases.tiny_batches(count=12, batch_size=12 // devices), loader(devices))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for devices in (1, 2, 3):
        run(sys.argv[1], devices)
