"""Run as ``python -m tests.callbacks.ddp_step FOLDER [kl | bf16]``: the same steps on 1 and on 2 processes, to files.

One batch is one epoch, since Lightning shuffles training data between processes. Each process has its own batch norm
statistics, so the network with batch norm runs on 2 processes only.
"""

import sys
from pathlib import Path

import torch

from fisher_reg import FisherMonitor, FisherRegularizer, HutchinsonMax, KLPenalty, SpectralPenalty
from tests import cases


def run(folder, name, devices, penalty, batch_norm=False, epochs=3, precision="32-true", **options):
    torch.manual_seed(1)
    module = cases.Plain(cases.tiny_network(batch_norm))
    batches = cases.tiny_batches(count=8, batch_size=8 // devices)
    monitor = FisherMonitor(num_samples=8, solver=HutchinsonMax(2))
    callbacks = [FisherRegularizer(0.7, penalty, every_n_steps=1, batch_fraction=1.0, **options), monitor]
    strategy = {"strategy": "ddp_spawn"} if devices > 1 else {}
    trainer = cases.trainer(
        folder, callbacks=callbacks, devices=devices, max_epochs=epochs, precision=precision, **strategy
    )
    trainer.fit(module, batches, cases.tiny_batches(count=8, batch_size=8 // devices, seed=1))
    logged = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("fisher/")}
    torch.save({"parameters": dict(module.state_dict()), "logged": logged}, Path(folder) / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:] == ["kl"]:
        for devices in (1, 2):
            run(sys.argv[1], str(devices), devices, KLPenalty(), target_lambda=0.01)
    elif sys.argv[2:] == ["bf16"]:
        for devices in (1, 2):
            run(sys.argv[1], str(devices), devices, KLPenalty(), precision="bf16-mixed")
    else:
        run(sys.argv[1], "1", 1, SpectralPenalty(num_steps=3))
        run(sys.argv[1], "2", 2, SpectralPenalty(num_steps=3))
        run(sys.argv[1], "batch_norm", 2, SpectralPenalty(), batch_norm=True, epochs=1)
