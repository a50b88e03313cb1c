"""Profile the default estimate: ``python -m recipes.estimate_profile``.

The networks of ``recipes.benchmark`` are trained, and the default estimate of their first test images is profiled in
two ways. ``estimate_passes.csv``: the passes of the solver, with their share of the batch (``shares``) and their time
in forwards of the whole batch without gradient (``forwards``), each the median over the rounds.
``estimate_operations.csv``: the shares of the kinds of operations in the time of one estimate, by torch's profiler.

Writes both, ``estimate_profile.md`` (the tables) and ``estimate_profile.json`` (versions, settings) to Hydra's run
folder.

Takes about two minutes on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fisher_reg import Categorical, Lanczos, evaluation_operator, fisher_spectral_norm
from recipes.data.chosen import prepared_data
from recipes.models.training import trained_network
from recipes.reporting.files import settings_of, show, write
from recipes.reporting.tables import markdown_table
from recipes.runtime.command import command
from recipes.runtime.counted import Counted, Passes
from recipes.runtime.environment import environment
from recipes.runtime.progress import track
from recipes.runtime.timing import silent_stderr, timed

KINDS = {
    "convolution, backward": ("convolution_backward", "conv2d_backward"),
    "convolution": ("conv",),
    "attention, backward": ("attention_for_cpu_backward", "attention_backward"),
    "attention": ("attention",),
    "pooling": ("pool",),
    "matrix product": ("mm", "bmm", "addmm"),
    "normalisation": ("norm", "addcmul", "rsqrt"),
    "copy and fill": ("copy", "fill", "zero", "cat", "clone", "contiguous"),
}
"""From a kind to parts of names of operations; the first match is used."""


@command("estimate_profile")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    estimate_profile(config)


def estimate_profile(config: DictConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Profile every case, write the files, and return the rows of both tables."""
    folder = Path(config.output_dir)
    passes, operations = list[dict[str, Any]](), list[dict[str, Any]]()
    plain = OmegaConf.create(OmegaConf.to_container(config))  # allows keys that the data group does not have
    for case in track(config.cases, "profile", lambda case: str(case.name)):
        case_config: Any = OmegaConf.merge(plain, {"model": config.networks[case.network], "data": case.data})
        data = prepared_data(case_config)
        network = trained_network(case_config, data)
        images = next(iter(data.test_dataloader()))[0][: config.num_images]
        passes += [{"case": case.name} | row for row in passes_of(network, images, config.num_rounds)]
        operations += [{"case": case.name} | row for row in operations_of(network, images)]
    tables = {"passes": pd.DataFrame(passes), "operations": pd.DataFrame(operations)}
    for name, table in tables.items():
        write(folder, f"estimate_{name}", config, rows=table)
    result = {"environment": environment(torch.device("cpu")), "config": settings_of(config)}
    write(folder, "estimate_profile", config, page=as_markdown(**tables), record=result)
    show(as_markdown(**tables), folder)
    return tables["passes"], tables["operations"]


def passes_of(network: nn.Module, images: Tensor, num_rounds: int) -> list[dict[str, Any]]:
    """Return the passes of one estimate, one row per kind of pass and one for the whole estimate."""
    device, rounds = images.device, list[dict[str, float]]()
    for _ in range(num_rounds + 1):
        with torch.no_grad():
            forward = timed(lambda: network(images), device)[1]
        passes = Passes()
        with evaluation_operator(network, images, Categorical()) as fisher:
            Lanczos().solve(Counted(fisher, passes))
        whole = timed(lambda: fisher_spectral_norm(network, images), device)[1]
        seconds = passes.seconds | {"everything": whole}
        rounds.append({kind: spent / forward for kind, spent in seconds.items()})
    medians = pd.DataFrame(rounds[1:]).median()  # the first one warms up
    counts = [(passes.calls.get(kind, 1), passes.shares.get(kind, 1.0)) for kind in medians.index]
    return [
        {"pass": kind, "calls": calls, "shares": shares, "forwards": medians[kind]}
        for kind, (calls, shares) in zip(medians.index, counts, strict=True)
    ]


def operations_of(network: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Return the share of each kind of operation in the time of all operations of one estimate."""
    fisher_spectral_norm(network, images)
    with silent_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fisher_spectral_norm(network, images)
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profile.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(spent.values())
    return [{"operation": kind, "share": time / total} for kind, time in spent.items()]


def kind_of(operation: str) -> str:
    """Return the kind of an operation of torch, such as ``aten::addmm``."""
    name = operation.rsplit("::", 1)[-1]
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def as_markdown(passes: pd.DataFrame, operations: pd.DataFrame) -> str:
    """Return one table of the passes and one of the operations, a column per case."""
    columns = list(passes.case.unique())
    forwards = passes.pivot(index="pass", columns="case", values="forwards")[columns]
    shares = passes.pivot(index="pass", columns="case", values="shares")[columns]
    cells = forwards.map("{:.2f}".format) + " (" + shares.map("{:.2f}".format) + ")"
    cells = cells.loc[passes["pass"].unique()]
    of_operations = operations.pivot(index="operation", columns="case", values="share")[columns]
    of_operations = of_operations.loc[operations.operation.unique()].map("{:.0%}".format)
    first = "Time of the passes of one estimate, in forwards (and over how many times the batch):"
    second = "Time in operations:"
    return f"{first}\n\n{_table(cells)}\n{second}\n\n{_table(of_operations)}"


def _table(cells: pd.DataFrame) -> str:
    return markdown_table(cells.rename_axis("").reset_index()) + "\n"


if __name__ == "__main__":
    main()
