"""Run as ``python -m tests.passes_ddp FOLDER``: a metric and a monitor on 1, 2 and 3 processes count their passes."""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fisher_reg import FisherMonitor, FisherSpectralNorm, Lanczos
from tests import cases

NUM_EXAMPLES, BATCH = 48, 4
PASSES = {"forward": 0, "backward": 0}


def _count(kind):
    PASSES[kind] += 1


class Counted(nn.Module):
    """Two layers that count the forward passes and the backward passes of this process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10))

    def forward(self, x):
        _count("forward")
        logits = self.layers(x)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: _count("backward"))
        return logits


class Still(cases.Plain):
    """A module whose weights stay what they are."""

    def __init__(self):
        super().__init__(Counted())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Between(pl.Callback):
    """Counts from here on: it stands before the monitor, so that its counts are those of the measurement alone."""

    def on_validation_epoch_end(self, trainer, pl_module):
        PASSES.update(forward=0, backward=0)


class Saves(pl.Callback):
    """Writes what the monitor cost and found on this process, then what a metric does."""

    def __init__(self, folder, monitor):
        self.folder, self.monitor, self.of_monitor = folder, monitor, {}

    def on_validation_epoch_end(self, trainer, pl_module):
        self.of_monitor = dict(PASSES)

    def on_fit_end(self, trainer, pl_module):
        (entry,) = self.monitor.history
        PASSES.update(forward=0, backward=0)
        norms = metric(trainer.global_rank, trainer.world_size)
        saved = {"monitor": self.of_monitor, "metric": dict(PASSES), "history": entry, "norms": norms}
        torch.save(saved, Path(self.folder) / f"{trainer.world_size}_{trainer.global_rank}.pt")


def data():
    x = torch.randn(NUM_EXAMPLES, 6, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, torch.arange(NUM_EXAMPLES) % 10)


def metric(rank, num_processes):
    sampler = DistributedSampler(data(), num_processes, rank, shuffle=False)
    found, network = FisherSpectralNorm(None, solver=Lanczos(is_exact=True)), Counted()
    for x, _ in DataLoader(data(), BATCH, sampler=sampler):
        found.update(network, x)
    return found.compute().sort().values


def run(folder, devices):
    monitor = FisherMonitor(num_samples=None, bounds=(), solver=Lanczos(is_exact=True))
    # forked and not launched anew, which differs in nothing but the seconds that a start takes
    options = {"strategy": "ddp_fork"} if devices > 1 else {}
    callbacks = [Between(), monitor, Saves(folder, monitor)]
    trainer = cases.trainer(folder, callbacks=callbacks, devices=devices, num_sanity_val_steps=0, **options)
    trainer.fit(Still(), cases.tiny_batches(count=12), DataLoader(data(), BATCH))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in (1, 2, 3):
        run(sys.argv[1], number)
