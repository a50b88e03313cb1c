r"""Ask whether the spectral bounds rank networks by their sensitivity: ``python -m recipes.rank``.

Every network (each of ``models`` with each of ``seeds``) is trained alike and measured on the same test images, in
float64: lambda, the largest eigenvalue of its Fisher matrix, per image, and three upper bounds: the global one, and the
local and the blockwise one per image. A little noise keeps the images off the kinks of max pooling. Then each bound's
order of the networks is compared with lambda's, by Kendall's tau-b and Spearman's rho: the median of lambda with the
mean of the bound's log10, the maximum with the maximum, over the same images (``_few``: those of the blockwise
bound).

* ``over = models`` compares means of log10 over seeds, ``networks`` all networks, ``models of vgg`` those of a family.
* Intervals are 95 % percentile bootstrap intervals with a fixed generator: models are drawn with replacement, and seeds
  within each, the same for bound and lambda. Seeds alone would say only how these very models come out when trained
  again; the question is about architectures, so that their choice belongs to the uncertainty.
* p-values permute whole models, since the seeds of one model are no independent witnesses.
* A verdict claims an order only if its interval excludes 0 and p is at most 0.05. Nothing is corrected for the number
  of comparisons. Four models or fewer cannot reach that p.

Leaves ``rank.csv`` (a row per network), ``rank.json`` (correlations, verdicts), ``rank.md`` and ``rank.png`` in Hydra's
run folder. Finished networks are kept in ``cache_dir`` under a digest of their settings and of the versions of torch
and fisher-reg, so that a run that was killed goes on where it was; delete the folder after a change to the library.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fisher_reg import blockwise_fisher_bound, fisher_bound, fisher_spectral_norm
from fisher_reg.metrics import summarize
from recipes.competitors.measures import product_bound
from recipes.data.chosen import check_noise, fixed_images, prepared_data
from recipes.models.training import share_correct, trained_network
from recipes.rank.agreement import (
    comparison_table,
    correlations,
    draw,
    markdown,
    model_table,
    notes,
    reproducibility,
)
from recipes.runtime.cache import cached
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device, provenance
from recipes.statistics.agreement import MIN_MODELS

_ROUND_OFF = 1e-6  # decades by which a bound may seem to lie below what it bounds
_SETTINGS = ("data", "trainer", "optimizer", "solver", "num_images", "num_blockwise_images", "noise", "device")


@command("rank")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # its greetings and hints, once per network
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    rank(config)


def rank(config: DictConfig) -> pd.DataFrame:
    """Train and measure what is not in the cache, analyse it, and write the files.

    Returns:
        The correlations, as in ``rank.json``.

    Raises:
        ValueError: For settings that :func:`check` refuses; before any training.
    """
    networks = [(model, seed, settings(config, model, seed)) for seed in config.seeds for model in config.models]
    check(config, [part for _, _, part in networks])
    folder, cache = Path(config.output_dir), Path(config.cache_dir)
    for path in (folder, cache):
        path.mkdir(parents=True, exist_ok=True)
    rows = []
    with Progress() as progress:
        task = progress.add_task("", total=len(networks))
        for model, seed, part in networks:
            progress.update(task, description=f"{model.name}, seed {seed}")
            known = cached(OmegaConf.to_container(part), cache, partial(measure, part))
            rows.append({"model": model.name, "family": model.family, "seed": seed} | known)
            progress.advance(task)
        progress.update(task, description="comparing the orders")
        frame = pd.DataFrame(rows)
        found = correlations(frame, config.num_resamples)
    frame.to_csv(folder / "rank.csv", index=False, float_format="%.6g")
    agreements = {target: reproducibility(frame, target) for target in ("lambda_median", "lambda_max")}
    result = {
        "config": OmegaConf.to_container(config, resolve=True),
        "notes": notes(frame),
        "reproducibility": json.loads(pd.Series(agreements).to_json()),
        "correlations": json.loads(found.to_json(orient="records")),
    }
    (folder / "rank.json").write_text(json.dumps(result | {"provenance": provenance(config)}, indent=2) + "\n")
    (folder / "rank.md").write_text(markdown(frame, found), encoding="utf-8")
    draw(frame, found).savefig(folder / "rank.png", dpi=120)
    report(frame, found, folder)
    return found


def settings(config: DictConfig, model: DictConfig, seed: int) -> DictConfig:
    """Return everything that the numbers of one network depend on.

    Raises:
        ValueError: If there is no such family.
    """
    if model.family not in config.networks:
        raise ValueError(f"{model.name} is of an unknown family {model.family!r}; there are {list(config.networks)}.")
    everything = OmegaConf.to_container(OmegaConf.merge(config, {"output_dir": config.cache_dir}), resolve=True)
    network = everything["networks"][model.family] | OmegaConf.to_container(
        model.get("overrides") or OmegaConf.create()
    )
    kept = {key: everything[key] for key in _SETTINGS}
    return OmegaConf.create(kept | {"model": network, "seed": seed, "checkpoint": None})


def check(config: DictConfig, networks: list[DictConfig]) -> None:
    """Refuse what would fail or mislead after hours of training.

    Raises:
        ValueError: For fewer than three models, names or seeds that occur twice, no seeds, or numbers of images that
            the data or each other do not allow. Networks that cannot be built raise what their constructor says.
    """
    names = [model.name for model in config.models]
    if len(names) < MIN_MODELS:
        raise ValueError(f"An order needs at least {MIN_MODELS} models; got {names}. Add some to models=[…].")
    for key, values in (("models", names), ("seeds", list(config.seeds))):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{key} must have at least one entry, and none twice; got {values}.")
    check_noise(config.noise)
    data = prepared_data(networks[0])
    num_test = len(data.splits["test"])
    if not 1 <= config.num_blockwise_images <= config.num_images <= num_test:
        raise ValueError(
            f"1 <= num_blockwise_images={config.num_blockwise_images} <= num_images={config.num_images} <= {num_test} "
            "(the test images of the data) must hold; change the first two."
        )
    for part in networks[: len(names)]:
        instantiate(part.model, spec=data.spec)


def measure(config: DictConfig) -> dict[str, float]:
    """Train one network and measure it."""
    begin = time.perf_counter()
    device = chosen_device(config.device)
    data = prepared_data(config)
    network = trained_network(config, data).to(device)
    accuracy = share_correct(network, data, device)
    trained = time.perf_counter()
    network = network.double()
    images = fixed_images(data, config.num_images, config.noise).to(device)
    few = images[: config.num_blockwise_images]
    values = fisher_spectral_norm(network, images, solver=instantiate(config.solver)).eigenvalue
    overall = fisher_bound(network, images).log10_value
    local = product_bound(network, images).log10_value
    blockwise = blockwise_fisher_bound(network, few).log10_value
    exceeded = [values.log10() - bound > _ROUND_OFF for bound in (overall, local)]
    exceeded.append(values[: len(few)].log10() - blockwise > _ROUND_OFF)
    return {
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "accuracy": accuracy,
        **{f"lambda_{name}": float(value) for name, value in summarize(values).items()},
        "lambda_median_few": float(values[: len(few)].quantile(0.5)),
        "lambda_max_few": float(values[: len(few)].max()),
        "log10_global": overall,
        "log10_local_mean": float(local.mean()),
        "log10_local_max": float(local.max()),
        "log10_blockwise_mean": float(blockwise.mean()),
        "log10_blockwise_max": float(blockwise.max()),
        "num_violations": int(torch.cat(exceeded).sum()),
        "seconds_training": trained - begin,
        "seconds_measuring": time.perf_counter() - trained,
    }


def report(rows: pd.DataFrame, found: pd.DataFrame, folder: Path) -> None:
    """Print the networks, the correlations over models and the verdicts."""
    console = Console()
    over_models = found[found.over == "models"]
    tables = {
        "means over seeds (rank, 1 is the smallest)": model_table(rows),
        "agreement of the orders of the models": comparison_table(over_models).drop(columns="over"),
    }
    for title, cells in tables.items():
        table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
        for index, name in enumerate(cells.columns):
            style = {"justify": "right", "overflow": "fold"} if index else {"no_wrap": True}
            table.add_column(name.replace("_", "\n"), **style)
        for row in cells.itertuples(index=False):
            table.add_row(*row)
        console.print(table)
    for text in [*dict.fromkeys(over_models.verdict), *notes(rows)]:
        console.print(text, highlight=False)
    console.print(f"Files: {folder}", soft_wrap=True)
