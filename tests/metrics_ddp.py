"""Run as ``python -m tests.metrics_ddp RANK FOLDER``: one of two processes, each with a part of the examples."""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import distributed, nn
from torchmetrics import MetricCollection

from fisher_reg import Exact, FisherSpectralNorm, FisherTrace

REDUCTIONS = {"mean": torch.mean, "max": torch.max, "p95": partial(torch.quantile, q=0.95), "values": None}
DTYPES = (torch.float32, torch.float64)
PARTS = (slice(0, 5), slice(5, 7))


def network(dtype):
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)
    return nn.Sequential(*layers).eval().to(dtype)


def inputs(dtype):
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def metrics():
    kinds = {"norm": partial(FisherSpectralNorm, solver=Exact()), "trace": partial(FisherTrace, estimator=Exact())}
    made = {f"{kind}_{name}": make(reduce) for kind, make in kinds.items() for name, reduce in REDUCTIONS.items()}
    made["norm_pixels"] = FisherSpectralNorm(solver=Exact(), input_std=0.5)
    return made


def run(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for dtype in DTYPES:
        collection = MetricCollection(metrics())
        for example in inputs(dtype)[PARTS[rank]].split(2):
            collection.update(network(dtype), example)
        found[str(dtype)] = collection.compute()
    alone = FisherSpectralNorm(torch.max)
    if rank == 0:  # the other process has no examples
        alone.update(network(torch.float32), inputs(torch.float32))
    found["alone"] = alone.compute()
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(int(sys.argv[1]), sys.argv[2])
