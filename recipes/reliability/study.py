"""Whether the numbers can be trusted, tried on what is known exactly: ``python -m recipes.reliability``.

Four tables, with fixed seeds: how often the interval of the largest eigenvalue fails on synthetic spectra, beside what
it promises; Ritz values against exact eigenvalues; the solvers on 24 networks and on models made to mislead them;
and the estimate by queries on trained networks and behind faulty services.

Leaves ``reliability.md`` and ``reliability.json`` (with versions and settings) in Hydra's run folder. Takes about a
quarter of an hour on two CPU cores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from recipes.reliability import blackbox, solvers, spectra
from recipes.reporting.records import plain, without_folders
from recipes.runtime.command import command
from recipes.runtime.environment import environment, provenance

TITLES = {
    "interval": "Interval on synthetic spectra: promised and observed failures",
    "ritz": "Ritz values and lower ends against exact eigenvalues",
    "solvers": "Solvers on networks, and on models made to mislead them",
    "black_box": "Estimate by queries: +-2 standard errors",
}


@command("reliability")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    reliability(config)


def reliability(config: DictConfig) -> dict[str, list[dict[str, Any]]]:
    """Make the tables, write the files, and return the rows."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "interval": spectra.interval_rows(
            config.num_spectra,
            config.num_outputs,
            config.num_batches,
            list(config.failure_probabilities),
            config.seed,
        ),
        "ritz": spectra.ritz_rows(config.num_ritz_values, config.seed),
        "solvers": [
            *solvers.network_rows(config.num_images, config.seed),
            *solvers.model_rows(config.num_models, config.seed),
        ],
        "black_box": blackbox.rows(config.seed, config.num_queried),
    }
    settings = without_folders(OmegaConf.to_container(config, resolve=True))
    result = {"environment": environment(torch.device("cpu")), "config": settings, "tables": plain(tables)}
    (folder / "reliability.json").write_text(json.dumps(result | {"provenance": provenance(config)}, indent=2) + "\n")
    (folder / "reliability.md").write_text(as_markdown(tables))
    Console().print(as_markdown(tables), f"\nFiles: {folder}", soft_wrap=True, markup=False)
    return tables


def as_markdown(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Return the tables as a page."""
    parts = ["# How far the numbers can be trusted", "Made by `python -m recipes.reliability`."]
    for name, rows in tables.items():
        frame = pd.DataFrame(rows)
        text = frame.to_csv(index=False, sep="|", float_format="%.3g", na_rep="-")
        lines = [f"| {line.replace('|', ' | ')} |" for line in text.strip().split("\n")]
        lines.insert(1, "|" + " --- |" * frame.shape[1])
        parts += [f"## {TITLES[name]}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"
