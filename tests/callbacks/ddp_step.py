"""Run as ``python -m tests.callbacks.ddp_step FOLDER DEVICES``: three steps on 1 or 2 processes, results to a file.

One batch is one epoch, since Lightning shuffles training data between processes.
"""

import sys
from pathlib import Path

import torch

from fisher_reg import FisherMonitor, FisherRegularizer, SpectralPenalty
from tests import cases


def main(folder, devices):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    module = cases.Plain(cases.tiny_network())
    batches = cases.tiny_batches(count=8, batch_size=8 // devices)
    callbacks = [FisherRegularizer(0.7, SpectralPenalty(num_steps=3)), FisherMonitor(num_samples=8)]
    strategy = {"strategy": "ddp_spawn"} if devices > 1 else {}
    trainer = cases.trainer(folder, callbacks=callbacks, devices=devices, max_epochs=3, **strategy)
    trainer.fit(module, batches, cases.tiny_batches(count=8, batch_size=8 // devices, seed=1))
    logged = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("fisher/")}
    torch.save({"parameters": dict(module.state_dict()), "logged": logged}, Path(folder) / f"{devices}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
