"""Ask how tight the upper bounds are, and how fast: ``python -m recipes.bounds``.

Two parts, each with a switch in ``conf/bounds.yaml``:

* ``tightness`` trains a network of each family and compares its bounds with lambda, the largest eigenvalue of the
  Fisher matrix at test images (:mod:`recipes.bounds.tightness`): the global and the local bound step by step, as
  improvements are added, and the blockwise one by the number of segments.
* ``speed`` times the bounds of torchvision's large networks, and the norms of single convolutions beside other people's
  (:mod:`recipes.bounds.speed`).

Leaves in Hydra's run folder ``tightness.csv`` (a row per network, level and step), ``balls.csv`` (per network and
radius, :mod:`recipes.bounds.balls`), ``segments.csv`` (per network and number of segments), ``networks.csv`` and
``convolutions.csv``, and of them ``bounds.json`` (with versions, settings and the shares of the layers), ``bounds.md``
and ``bounds.png``.
"""

from __future__ import annotations

import json
import logging
import warnings
from itertools import chain
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recipes.bounds.speed import PEER, available_norms, time_convolutions, time_networks
from recipes.bounds.tightness import draw, tightness
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device, environment, installed, provenance


@command("bounds")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # its greetings and hints, once per network
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    measure(config)


def measure(config: DictConfig) -> dict[str, pd.DataFrame]:
    """Run the parts that are switched on and write the files; the CSV files grow with every network and convolution.

    Returns:
        What the CSV files hold, by their stem; the networks with the shares of their layers.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = chosen_device(config.device)
    frames: dict[str, pd.DataFrame] = {}
    with Progress() as progress:
        parts = [tightness(config, device, progress)] if config.tightness else []
        if config.speed:
            parts.append(time_convolutions(config, available_norms(), device, progress))
            parts.append(time_networks(config, device, progress))
        for name, rows in chain(*parts):
            frames[name] = pd.concat([frames[name], rows], ignore_index=True) if name in frames else rows
            frames[name].drop(columns="layers", errors="ignore").to_csv(
                folder / f"{name}.csv", index=False, float_format="%.6g"
            )
    result = {
        "environment": environment(device) | {PEER: installed(PEER)},
        "config": OmegaConf.to_container(config, resolve=True),
        **{name: json.loads(frame.to_json(orient="records")) for name, frame in frames.items()},
    }
    (folder / "bounds.json").write_text(json.dumps(result | {"provenance": provenance(config)}, indent=2) + "\n")
    (folder / "bounds.md").write_text(markdown(frames), encoding="utf-8")
    if config.tightness:
        draw(frames["tightness"], frames["segments"]).savefig(folder / "bounds.png", dpi=120)
    report(frames, folder)
    return frames


def markdown(frames: dict[str, pd.DataFrame]) -> str:
    """Return the tables, each under what it says, and the shares of the first network's layers."""
    parts = []
    for title, table in tables(frames).items():
        lines = ["| " + " | ".join(cells) + " |" for cells in (table.columns, *table.itertuples(index=False))]
        lines.insert(1, "|---" + "|---:" * (len(table.columns) - 1) + "|")
        parts.append(f"{title}\n\n" + "\n".join(lines))
    if "networks" in frames:
        first = frames["networks"].iloc[0]
        parts.append(f"The shares of the layers of {first.network}.\n\n```text\n{first.layers}\n```")
    return "\n\n".join(parts) + "\n"


def report(frames: dict[str, pd.DataFrame], folder: Path) -> None:
    """Print the tables and the shares of the first network's layers."""
    console = Console()
    for title, cells in tables(frames).items():
        table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
        for index, name in enumerate(cells.columns):
            is_text = not index or name == "step"
            table.add_column(name, justify="left" if is_text else "right", no_wrap=is_text, overflow="fold")
        for row in cells.itertuples(index=False):
            table.add_row(*(cell.replace(" %, ", " %\n") for cell in row))
        console.print(table)
    if "networks" in frames:
        first = frames["networks"].iloc[0]
        console.print(f"{first.network}\n{first.layers}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Files: {folder}", soft_wrap=True)


def tables(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the tables for people, cells as text, by title."""
    result = {}
    if "tightness" in frames:
        for level, rows in frames["tightness"].groupby("level", sort=False):
            result[f"The {level} bound, step by step: log10 and decades (max, median, mean over images)."] = (
                pd.DataFrame(
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
            )
        gaps = frames["segments"].pivot(index="num_segments", columns="network", values="mean_gap")
        gaps = gaps[frames["segments"].network.unique()].sort_index(ascending=False)
        cells = gaps.map(_decades)
        result["The blockwise bound by number of segments: mean gap in decades."] = pd.concat(
            [pd.DataFrame({"segments": gaps.index.astype(str)}, index=gaps.index), cells], axis=1
        )
    if "balls" in frames:
        rows = frames["balls"]
        result["Bounds in a ball: log10, decades below the global bound, and points that tried to exceed them."] = (
            pd.DataFrame(
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


def _decades(number: float) -> str:
    return "" if pd.isna(number) else f"{round(number, 2) + 0.0:.2f}"  # no -0.00
