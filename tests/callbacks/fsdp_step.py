"""Run as ``python -m tests.callbacks.fsdp_step FOLDER``: penalised steps with sharded weights on two processes."""

import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from fisher_reg import BoundPenalty, FisherRegularizer, KLPenalty, SpectralPenalty
from tests import cases


class Sharded(cases.Plain):
    """Shards its layers when the strategy says over which processes."""

    def configure_model(self):
        if not isinstance(self.network, torch.distributed.fsdp.FSDPModule):
            for part in (self.network[0], self.network[4], self.network):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _fit(folder, penalty):
    torch.manual_seed(1)
    module = Sharded(cases.tiny_network())
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    regularizer = FisherRegularizer(0.7, penalty, every_n_steps=1, batch_fraction=1.0)
    trainer = cases.trainer(folder, callbacks=[regularizer], devices=2, strategy=strategy, max_epochs=2)
    trainer.fit(module, cases.tiny_batches(count=8, batch_size=4))
    return module, trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    fitted, trainer = _fit(sys.argv[1], KLPenalty(step=0.3))
    whole = {name: parameter.full_tensor().detach() for name, parameter in fitted.network.named_parameters()}
    if trainer.global_rank == 0:
        torch.save(whole, Path(sys.argv[1]) / "sharded.pt")
    for penalty in (SpectralPenalty(), BoundPenalty()):
        with pytest.raises(MisconfigurationException, match=r"FSDP has freed them. KLPenalty\(\) does not"):
            _fit(sys.argv[1], penalty)
