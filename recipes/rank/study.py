r"""Test whether the spectral bounds rank networks by their sensitivity: ``python -m recipes.rank``.

Every network (each of ``models`` with each of ``seeds``) is trained in the same way and measured on the same test
images, in float64: lambda, the largest eigenvalue of its Fisher matrix, per image, and three upper bounds: the global
one, and the local and the blockwise one per image. A little noise avoids the kinks of max pooling. The ranking by each
bound is compared with that by lambda, by Kendall's tau-b and Spearman's rho: the median of lambda with the
mean of the bound's log10, the maximum with the maximum, over the same images (``_few``: those of the blockwise
bound).

* ``over = models`` compares means of log10 over seeds, ``networks`` all networks, ``models of vgg`` those of a family.
* Intervals are 95 % percentile bootstrap intervals with a fixed generator: models are drawn with replacement, and seeds
  within each, the same for bound and lambda. Seeds alone would show only the variation of these models when they are
  trained again; the question is about architectures, so that their choice is part of the uncertainty.
* p-values permute whole models, since the seeds of one model are not independent.
* A verdict claims an order only if its interval excludes 0 and p is at most 0.05. Nothing is corrected for the number
  of comparisons. Four models or fewer cannot reach that p.

Writes ``rank.csv`` (a row per network), ``rank.json`` (correlations, verdicts), ``rank.md`` and ``rank.png`` to Hydra's
run folder, and ``rank.csv`` also after an interrupt. Finished networks are cached in ``cache_dir`` by their settings,
their data, the versions of torch and fisher-reg, and the source that they use: an interrupted run resumes where it was.

Takes about half an hour on two CPU cores, and half of that with ``num_processes=2``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from recipes.data.chosen import check_noise, prepared_data
from recipes.rank.agreement import (
    comparison_table,
    correlations,
    draw,
    markdown,
    model_table,
    notes,
    reproducibility,
)
from recipes.rank.measuring import measure
from recipes.reporting.files import settings_of, write
from recipes.reporting.tables import print_table
from recipes.runtime.cache import Settings, stamped
from recipes.runtime.command import command
from recipes.runtime.jobs import Workers, execute, folders
from recipes.runtime.settings import merged, resolved
from recipes.statistics.agreement import MIN_MODELS

_SETTINGS = ("data", "trainer", "optimizer", "solver", "num_images", "num_blockwise_images", "noise", "device")


@command("rank")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    rank(config)


def rank(config: DictConfig) -> pd.DataFrame:
    """Train and measure what is not in the cache, analyse it, and write the files.

    Returns:
        The correlations, as in ``rank.json``.

    Raises:
        ValueError: For settings that :func:`check` rejects; before any training.
    """
    workers = Workers.of(config)
    networks = [(model, seed) for seed in config.seeds for model in config.models]
    parts = [settings(config, model, seed) for model, seed in networks]
    check(config, parts)
    folder, cache = folders(config)
    runs = [stamped(part, measure) for part in parts]
    rows: dict[int, Settings] = {}
    try:
        for index, row in execute("networks", runs, measure, workers, lambda run: f"seed {run['seed']}", cache):
            model, seed = networks[index]
            rows[index] = {"model": model.name, "family": model.family, "seed": seed} | row
    finally:  # also after an interrupt
        frame = pd.DataFrame([rows[index] for index in sorted(rows)])
        frame.to_csv(folder / "rank.csv", index=False, float_format="%.6g")
    found = correlations(frame, config.num_resamples)
    agreements = {target: reproducibility(frame, target) for target in ("lambda_median", "lambda_max")}
    result = {
        "config": settings_of(config),
        "notes": notes(frame),
        "reproducibility": json.loads(pd.Series(agreements).to_json()),
        "correlations": json.loads(found.to_json(orient="records")),
    }
    write(folder, "rank", config, record=result, page=markdown(frame, found), figure=draw(frame, found))
    report(frame, found, folder)
    return found


def settings(config: DictConfig, model: DictConfig, seed: int) -> Settings:
    """Return the settings on which the numbers of one network depend.

    Raises:
        ValueError: If there is no such family.
    """
    if model.family not in config.networks:
        raise ValueError(f"{model.name} is of an unknown family {model.family!r}; there are {list(config.networks)}.")
    everything = resolved(config, output_dir=config.cache_dir)
    network = everything["networks"][model.family] | resolved(model.get("overrides") or DictConfig({}))
    kept = {key: everything[key] for key in _SETTINGS}
    return kept | {"model": network, "seed": seed, "checkpoint": None}


def check(config: DictConfig, networks: list[Settings]) -> None:
    """Raise an error for settings that would fail or mislead after hours of training.

    Raises:
        ValueError: For fewer than three models, names or seeds that occur twice, no seeds, or numbers of images that
            do not fit the data or each other. Networks that cannot be built raise the errors of their constructors.
    """
    names = [model.name for model in config.models]
    if len(names) < MIN_MODELS:
        raise ValueError(f"A ranking needs at least {MIN_MODELS} models; got {names}. Add some to models=[…].")
    for key, values in (("models", names), ("seeds", list(config.seeds))):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{key} must have at least one entry, and none twice; got {values}.")
    check_noise(config.noise)
    data = prepared_data(merged(networks[0]))
    num_test = len(data.splits["test"])
    if not 1 <= config.num_blockwise_images <= config.num_images <= num_test:
        raise ValueError(
            f"1 <= num_blockwise_images={config.num_blockwise_images} <= num_images={config.num_images} <= {num_test} "
            "(the test images of the data) must hold; change the first two."
        )
    for part in networks[: len(names)]:
        instantiate(part["model"], spec=data.spec)


def report(rows: pd.DataFrame, found: pd.DataFrame, folder: Path) -> None:
    """Print the networks, the correlations over models and the verdicts."""
    console = Console()
    over_models = found[found.over == "models"]
    tables = {
        "means over seeds (rank, 1 is the smallest)": model_table(rows),
        "agreement of the orders of the models": comparison_table(over_models).drop(columns="over"),
    }
    for title, cells in tables.items():
        print_table(console, title, cells)
    for text in [*dict.fromkeys(over_models.verdict), *notes(rows)]:
        console.print(text, highlight=False)
    console.print(f"Files: {folder}", soft_wrap=True)
