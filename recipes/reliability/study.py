"""Test the reliability of the estimates against exact values: ``python -m recipes.reliability``.

Four tables, with fixed seeds: the failure rate of the interval of the largest eigenvalue on synthetic spectra, compared
with its failure probability; Ritz values compared with exact eigenvalues; the solvers on 24 networks and on models
constructed to mislead them; and the estimate by queries on trained networks and faulty services.

Writes ``reliability.md`` and ``reliability.json`` (with versions and settings) to Hydra's run folder. Takes about a
quarter of an hour on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from recipes.reliability import blackbox, solvers, spectra
from recipes.reporting.files import settings_of, show, write
from recipes.reporting.records import plain
from recipes.reporting.tables import markdown_table
from recipes.runtime.command import command
from recipes.runtime.environment import environment
from recipes.runtime.progress import track

TITLES = {
    "interval": "Interval on synthetic spectra: guaranteed and observed failure rates",
    "ritz": "Ritz values and lower ends against exact eigenvalues",
    "solvers": "Solvers on networks and on difficult models",
    "black_box": "Estimate by queries: +-2 standard errors",
}


@command("reliability")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    reliability(config)


def reliability(config: DictConfig) -> dict[str, list[dict[str, Any]]]:
    """Compute the tables, write the files, and return the rows."""
    folder = Path(config.output_dir)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "interval": lambda: spectra.interval_rows(
            config.num_spectra,
            config.num_outputs,
            config.num_batches,
            list(config.failure_probabilities),
            config.seed,
        ),
        "ritz": lambda: spectra.ritz_rows(config.num_ritz_values, config.seed),
        "solvers": lambda: [
            *solvers.network_rows(config.num_images, config.seed),
            *solvers.model_rows(config.num_models, config.seed),
        ],
        "black_box": lambda: blackbox.rows(config.seed, config.num_queried),
    }
    tables = {name: parts[name]() for name in track([*parts], "reliability")}
    setting = {"environment": environment(torch.device("cpu")), "config": settings_of(config)}
    write(folder, "reliability", config, page=as_markdown(tables), record=setting | {"tables": plain(tables)})
    show(as_markdown(tables), folder)
    return tables


def as_markdown(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Return the tables as a page."""
    parts = [
        "# Errors of the estimates on problems with known exact values",
        "Made by `python -m recipes.reliability`.",
    ]
    for name, rows in tables.items():
        frame = pd.DataFrame(rows)
        parts += [f"## {TITLES[name]}", markdown_table(frame)]
    return "\n\n".join(parts) + "\n"
