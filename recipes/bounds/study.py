"""Measure tightness and run time of the upper bounds: ``python -m recipes.bounds``.

Two parts, each with a switch in ``conf/bounds.yaml``:

* ``tightness`` trains a network of each family and compares its bounds with lambda, the largest eigenvalue of the
  Fisher matrix at test images (:mod:`recipes.bounds.tightness`): the global and the local bound step by step, as
  improvements are added, and the blockwise one by the number of segments.
* ``speed`` times the bounds of torchvision's large networks, and the norms of single convolutions, compared with other
  packages (:mod:`recipes.bounds.speed`).

Writes to Hydra's run folder ``tightness.csv`` (a row per network, level and step), ``balls.csv`` (per network and
radius, :mod:`recipes.bounds.balls`), ``segments.csv`` (per network and number of segments), ``networks.csv`` and
``convolutions.csv``, and from these ``bounds.json`` (with versions, settings and the shares of the layers),
``bounds.md`` and ``bounds.png``.

Takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from rich.console import Console

from recipes.bounds.speed import PEER, available_norms, time_convolution, time_network
from recipes.bounds.tightness import check, draw, tightness
from recipes.reporting.files import settings_of, write
from recipes.reporting.tables import markdown_table, print_table
from recipes.runtime.cache import Settings, Work
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device, environment, installed
from recipes.runtime.jobs import Workers, execute
from recipes.runtime.settings import resolved


@command("bounds")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    measure(config)


def measure(config: DictConfig) -> dict[str, pd.DataFrame]:
    """Run the parts that are switched on and write the files; the CSV files grow with every network and convolution.

    Returns:
        The content of the CSV files, by their stem; the networks with the shares of their layers.

    Raises:
        ValueError: For settings that :func:`recipes.bounds.tightness.check` rejects; before any work.
    """
    workers = Workers.of(config)
    workers.warn_of_timings()
    if config.tightness:
        check(config)
    if config.speed:
        available_norms()
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    frames: dict[str, pd.DataFrame] = {}
    for title, (pieces, work) in _parts(resolved(config)).items():
        tables: dict[int, dict[str, pd.DataFrame]] = {}
        for index, tables[index] in execute(title, pieces, work, workers, _described):
            frames |= _written([tables[index] for index in sorted(tables)], folder)
    device = chosen_device(config.device)
    result = {
        "environment": environment(device) | {PEER: installed(PEER)},
        "config": settings_of(config),
        **{name: json.loads(frame.to_json(orient="records")) for name, frame in frames.items()},
    }
    figure = draw(frames["tightness"], frames["segments"]) if config.tightness else None
    write(folder, "bounds", config, record=result, page=markdown(frames), figure=figure)
    report(frames, folder)
    return frames


def _parts(config: Settings) -> dict[str, tuple[list[Settings], Work]]:
    """Return the tasks of each part that is switched on, and the function that does one task."""
    parts: dict[str, tuple[list[Settings], Work]] = {}
    if config["tightness"]:
        parts["tightness"] = config["families"], tightness
    if config["speed"]:
        parts |= {"convolutions": (config["convolutions"], time_convolution)}
        parts |= {"networks": (config["speed_models"], time_network)}
    return {
        title: ([{"config": config, "piece": piece} for piece in pieces], work)
        for title, (pieces, work) in parts.items()
    }


def _described(settings: Settings) -> str:
    piece = settings["piece"]
    return piece if isinstance(piece, str) else piece.get("name", piece.get("_target_"))


def _written(tables: list[dict[str, pd.DataFrame]], folder: Path) -> dict[str, pd.DataFrame]:
    """Join the tables of all pieces, write them, and return them."""
    frames = {name: pd.concat([table[name] for table in tables], ignore_index=True) for name in tables[0]}
    for name, frame in frames.items():
        rows = frame.drop(columns="layers", errors="ignore")
        rows.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    return frames


def markdown(frames: dict[str, pd.DataFrame]) -> str:
    """Return the tables with their titles, and the shares of the first network's layers."""
    parts = []
    for title, table in tables(frames).items():
        parts.append(f"{title}\n\n" + markdown_table(table, is_right=True))
    if "networks" in frames:
        first = frames["networks"].iloc[0]
        parts.append(f"The shares of the layers of {first.network}.\n\n```text\n{first.layers}\n```")
    return "\n\n".join(parts) + "\n"


def report(frames: dict[str, pd.DataFrame], folder: Path) -> None:
    """Print the tables and the shares of the first network's layers."""
    console = Console()
    for title, cells in tables(frames).items():
        print_table(console, title, cells.map(_broken), num_left=2 if "step" in cells else 1)
    if "networks" in frames:
        first = frames["networks"].iloc[0]
        console.print(f"{first.network}\n{first.layers}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Files: {folder}", soft_wrap=True)


def tables(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the tables with cells as text, by title."""
    result = {}
    if "tightness" in frames:
        for level, rows in frames["tightness"].groupby("level", sort=False):
            result[f"The {level} bound, step by step: log10 of the bound and of its ratio to lambda."] = pd.DataFrame(
                {
                    "network": rows.network,
                    "step": rows.step,
                    "log10": rows.log10_bound.map(_decades),
                    "gained": rows.gained.map(_decades),
                    "since baseline": rows.gained_since_baseline.map(_decades),
                    "gap of max": rows.gap_of_max.map(_decades),
                    "gap of median": rows.gap_of_median.map(_decades),
                    "mean gap": rows.mean_gap.map(_decades),
                    "s": rows.seconds.map("{:.2f}".format),
                }
            )
        gaps = frames["segments"].pivot(index="num_segments", columns="network", values="mean_gap")
        gaps = gaps[frames["segments"].network.unique()].sort_index(ascending=False)
        cells = gaps.map(_decades)
        result["The blockwise bound by number of segments: mean gap in log10."] = pd.concat(
            [pd.DataFrame({"segments": gaps.index.astype(str)}, index=gaps.index), cells], axis=1
        )
    if "balls" in frames:
        rows = frames["balls"]
        result[
            "Bounds in a ball: log10, log10 gained over the global bound, and attacks that tried to exceed them."
        ] = pd.DataFrame(
            {
                "network": rows.network,
                "radius": rows.radius,
                "global": rows.log10_global.map(_decades),
                "in the ball": rows.log10_bound.map(_decades),
                "gained, mean": rows.gained_mean.map(_decades),
                "gained, median": rows.gained_median.map(_decades),
                "found by attack": rows.log10_attacked.map(_decades),
                "attacks": rows.num_attacked.map("{:,}".format),
                "exceeded": rows.num_violations.map(str),
                "by": rows.evidence,
                "s": rows.seconds.map("{:.1f}".format),
            }
        )
    if "networks" in frames:
        rows = frames["networks"]
        result["Bounds of torchvision's networks with random weights, at one image."] = pd.DataFrame(
            {
                "network": rows.network,
                "parameters": (rows.num_parameters / 1e6).map("{:.1f} M".format),
                "level": rows.level,
                "log10": rows.log10_bound.map(_decades),
                "s": rows.seconds.map("{:.2f}".format),
            }
        )
    if "convolutions" in frames:
        rows = frames["convolutions"]
        cells = (100 * rows.excess).map("{:+.2f} %".format) + rows.milliseconds.map(", {:.3g} ms".format)
        wide = rows.assign(cells=cells).pivot(index="convolution", columns="method", values="cells")
        wide = wide.loc[rows.convolution.unique(), rows.method.unique()]
        first = rows.groupby("convolution", sort=False).first()
        head = {"convolution": wide.index, "norm": first.reference.map("{:.4f}".format), "by": first.reference_kind}
        result["Norms of convolutions: the excess over the norm, and the time."] = pd.concat(
            [pd.DataFrame(head, index=wide.index), wide], axis=1
        )
    return result


def _broken(cell: str) -> str:
    return cell.replace(" %, ", " %\n")


def _decades(number: float) -> str:
    return "" if pd.isna(number) else f"{round(number, 2) + 0.0:.2f}"  # no -0.00
