"""Compare this package with others in one run: ``python -m recipes.benchmark``.

Every case is a network that is trained first. On its test images all methods alternate, each directly after a forward
pass without gradient of the whole batch: once as warm-up, unless that takes longer than the limit for all rounds, and
then in timed rounds. ``forwards`` is the median ratio of the two times, per image. Errors are relative to the exact
eigenvalue. Methods without batches run on ``num_peer_images``. ``memory_ratio`` is the peak of the memory that a call
allocates divided by that of a training step (forward and backward) on the images that the method handles at once; on a
CPU, where every allocation must be traced, it is left out for calls that take more than ``max_seconds``.

Writes ``benchmark.csv``, ``benchmark.json`` (with versions and settings) and ``benchmark.png`` to Hydra's run folder.
``python -m recipes.benchmark --config-name benchmark_gpu`` is a larger version.

Takes about three minutes on two CPU cores; ``benchmark_gpu`` was not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn

from fisher_reg import (
    BlackBox,
    BlackBoxMax,
    Exact,
    HutchinsonMax,
    Lanczos,
    PowerIteration,
    blackbox_spectral_norm,
    fisher_spectral_norm,
)
from fisher_reg.style import HIGHLIGHT, legend_below, look, panels, style
from recipes.competitors import estimators as peers
from recipes.data.chosen import prepared_data
from recipes.models.training import trained_network
from recipes.reporting.files import settings_of, write
from recipes.reporting.tables import print_table
from recipes.runtime.cache import Result, Settings
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device, environment, installed
from recipes.runtime.jobs import Workers, execute
from recipes.runtime.settings import merged, resolved
from recipes.runtime.timing import peak_memory, timed

T = TypeVar("T")
Estimate = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A method for the eigenvalues.

    Attributes:
        name: Name in tables.
        source: Its package.
        estimate: Maps a network and images ``(B, C, H, W)`` to eigenvalues ``(B,)``.
        batched: Whether it processes a whole batch at once.
    """

    name: str
    source: str
    estimate: Estimate
    batched: bool = True


def _ours(model: nn.Module, images: Tensor, **options: Any) -> Tensor:
    return fisher_spectral_norm(model, images, **options).eigenvalue


def _interval(model: nn.Module, images: Tensor, num_exact: int = 16) -> Tensor:
    """Enclose the eigenvalues except with probability 1e-6; with certainty for few classes, where that is cheaper."""
    with torch.no_grad():
        is_small = model(images[:1]).shape[1] <= num_exact
    solver = Exact() if is_small else Lanczos(num_steps=20, is_exact=True, failure_probability=1e-6)
    result = fisher_spectral_norm(model, images, solver=solver)
    result.interval()
    return result.eigenvalue


def _queries(model: nn.Module, images: Tensor, estimator: BlackBox | BlackBoxMax) -> Tensor:
    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        return logits.softmax(1)

    return blackbox_spectral_norm(predict, images, estimator=estimator).eigenvalue


DEFAULT = "default"
REFERENCE = "Exact"
METHODS = (
    Method(DEFAULT, "fisher_reg", _ours),
    Method(REFERENCE, "fisher_reg", partial(_ours, solver=Exact())),
    Method("interval at 1e-6", "fisher_reg", _interval),
    Method("Lanczos, 2 steps", "fisher_reg", partial(_ours, solver=Lanczos(num_steps=2, rtol=0))),
    Method("PowerIteration", "fisher_reg", partial(_ours, solver=PowerIteration())),
    Method("HutchinsonMax", "fisher_reg", partial(_ours, solver=HutchinsonMax())),
    Method("BlackBox", "fisher_reg", partial(_queries, estimator=BlackBox())),
    Method("BlackBoxMax", "fisher_reg", partial(_queries, estimator=BlackBoxMax())),
    Method("paper, white box", "paper", peers.paper_white_box, batched=False),
    Method("paper, black box", "paper", peers.paper_black_box, batched=False),
    Method("curvlinops, eigsh", "curvlinops-for-pytorch", peers.curvlinops_eigsh, batched=False),
    Method("plenoptic, power", "plenoptic", peers.plenoptic_power, batched=False),
    Method("plenoptic, SVD", "plenoptic", peers.plenoptic_randomized_svd, batched=False),
)


@command("benchmark")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    benchmark(config)


def benchmark(config: DictConfig) -> pd.DataFrame:
    """Run every case, write the files, and return the rows of ``benchmark.csv``."""
    workers = Workers.of(config)
    workers.warn_of_timings()
    names = [method.name for method in available_methods(config.methods)]
    folder, device = Path(config.output_dir), chosen_device(config.device)
    folder.mkdir(parents=True, exist_ok=True)
    plain = resolved(config)
    runs = [{"config": plain, "case": case, "methods": names} for case in plain["cases"]]
    tables: dict[int, pd.DataFrame] = {}
    for index, table in execute("benchmark", runs, run_case, workers, lambda run: run["case"]["name"]):
        tables[index] = table["rows"]
        rows = pd.concat([tables[index] for index in sorted(tables)], ignore_index=True)
        rows.to_csv(folder / "benchmark.csv", index=False, float_format="%.4g")
    result = {
        "environment": environment(device),
        "config": settings_of(config),
        "rows": json.loads(rows.to_json(orient="records")),
    }
    write(folder, "benchmark", config, record=result, figure=draw(rows))
    report(rows, folder)
    return rows


def available_methods(names: list[str] | None) -> list[Method]:
    """Return the methods called ``names``, or all, without those whose package is missing.

    Raises:
        ValueError: If there is no method with a given name.
    """
    known = {method.name: method for method in METHODS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"There are no methods {unknown}; there are {list(known)}.")
    chosen = [known[name] for name in names] if names else list(METHODS)
    missing = sorted({method.source for method in chosen if _absent(method.source)})
    if missing:
        Console().print(f"Not installed, left out: {', '.join(missing)}")
    return [method for method in chosen if method.source not in missing]


def run_case(settings: Settings, _: Path) -> Result:
    """Train the network of a case and measure all methods on its first test images.

    Returns:
        ``rows``, one per method.

    Raises:
        ValueError: If a test batch has fewer than ``num_images``.
    """
    case, methods = settings["case"], [method for method in METHODS if method.name in settings["methods"]]
    model = settings["config"]["networks"][case["network"]]
    config = merged(settings["config"], {"model": model, "data": case["data"]})
    device = chosen_device(config.device)
    data = prepared_data(config)
    network = trained_network(config, data).to(device)
    images, labels = (part.to(device) for part in next(iter(data.test_dataloader())))
    if len(images) < config.num_images:
        raise ValueError(f"num_images={config.num_images} needs data.batch_size of as many; got {len(images)} images.")
    with torch.no_grad():
        accuracy = float((network(images).argmax(1) == labels).float().mean())
    images, labels = images[: config.num_images], labels[: config.num_images]
    inputs = {method.name: images[: None if method.batched else config.num_peer_images] for method in methods}
    found: dict[str, Tensor] = {}
    times: dict[str, list[tuple[float, float]]] = {method.name: [] for method in methods}
    for number in range(config.num_rounds + 1):
        for method in methods:
            spent = sum(seconds for _, seconds in times[method.name])
            if spent < config.max_seconds:
                torch.manual_seed(config.seed)
                forward = timed(lambda: _forward(network, images), device)[1]
                found[method.name], seconds = timed(partial(method.estimate, network, inputs[method.name]), device)
                if number > 0 or seconds > config.max_seconds:
                    times[method.name].append((forward, seconds))
    truth = found[REFERENCE] if REFERENCE in found else _ours(network, images, solver=Exact())
    at_once = {True: slice(None), False: slice(1)}
    steps = {
        batched: peak_memory(partial(_training_step, network, images[part], labels[part]), device)
        for batched, part in at_once.items()
    }
    rows = []
    for method in methods:
        forward, seconds = map(pd.Series, zip(*times[method.name], strict=True))
        count = len(inputs[method.name])
        ratios = seconds / count / (forward / len(images))
        errors = (found[method.name] / truth[:count] - 1).abs().double().cpu()
        together = images[at_once[method.batched]]
        call = partial(method.estimate, network, together)
        traceable = device.type == "cuda" or seconds.median() / count * len(together) < config.max_seconds
        memory = peak_memory(call, device) if traceable else math.nan
        rows.append(
            {
                "case": case["name"],
                "num_classes": data.spec.num_classes,
                "image_size": data.spec.image_size,
                "accuracy": accuracy,
                "method": method.name,
                "source": method.source,
                "batch_size": count if method.batched else 1,
                "num_images": count,
                "num_rounds": len(seconds),
                "median_error": float(errors.nanmedian()),
                "p95_error": float(errors.nanquantile(0.95)),
                "forwards": ratios.median(),
                "forwards_iqr": ratios.quantile(0.75) - ratios.quantile(0.25),
                "images_per_second": count / seconds.median(),
                "peak_memory_mb": memory / 2**20,
                "memory_ratio": memory / steps[method.batched],
            }
        )
    return {"rows": pd.DataFrame(rows)}


@style()
def draw(rows: pd.DataFrame) -> Figure:
    """Draw the error over the cost: a panel per case, on logarithmic axes; a marker per method, open of our peers."""
    cases = list(rows.case.unique())
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure, grid = panels(lines, columns, height=2.6 * lines + 1.4, sharex=True, sharey=True)
    axes = grid.ravel()
    names = list(rows.method.unique())
    for panel, case in zip(axes, cases, strict=False):
        some = rows[rows.case == case].set_index("method")
        for index, name in enumerate(names):
            row = some.loc[name]
            marker = look(index) | {"linestyle": "none", "label": name, "markersize": 6}
            marker |= HIGHLIGHT if name == DEFAULT else {}
            marker |= {} if row.source == "fisher_reg" else {"markerfacecolor": "none"}
            panel.plot(row.forwards, max(row.p95_error, _SMALLEST_ERROR), **marker)
        panel.set(xscale="log", yscale="log", title=f"{case} (K = {some.num_classes.iloc[0]})")
        panel.axhline(0.01, color="gray", linestyle=":", label="1 %")
    for panel in axes[len(cases) :]:
        panel.remove()
    for panel in axes[max(0, len(cases) - columns) : len(cases)]:
        panel.set_xlabel("cost per image, forward passes")
    figure.supylabel(f"relative error, 95th percentile (at least {_SMALLEST_ERROR:g})", fontsize="medium")
    legend_below(figure, ncols=4)
    return figure


_SHOWN = {
    "method": "method",
    "median_error": "median error",
    "p95_error": "p95 error",
    "forwards": "forwards",
    "images_per_second": "images/s",
    "memory_ratio": "memory",
}


def report(rows: pd.DataFrame, folder: Path) -> None:
    """Print one table per case."""
    console = Console()
    for case, some in rows.groupby("case", sort=False):
        first = some.iloc[0]
        table = some[list(_SHOWN)].rename(columns=_SHOWN)
        print_table(console, f"{case}: K = {first.num_classes}, accuracy {first.accuracy:.3f}", table)
    console.print(f"Files: {folder}", soft_wrap=True)


_SMALLEST_ERROR = 1e-7  # where the axis begins


def _absent(source: str) -> bool:
    return source not in ("fisher_reg", "paper") and installed(source) is None


def _forward(network: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        network(images)


def _training_step(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    loss = nn.functional.cross_entropy(network(images), labels)
    torch.autograd.grad(loss, list(network.parameters()))
