"""Draw figures and write tables again from kept numbers: ``python -m recipes.redraw folder=FOLDER``.

Writes into the folder the figures and Markdown tables of the files that are in it, under the names that the recipes
give them, also with a suffix (``penalties_vgg.csv``): ``benchmark.csv``, ``tightness.csv`` with ``segments.csv``,
``penalties*.csv`` with their JSON, ``penalty_scale*.csv``, ``rank.csv`` with ``rank.json``, ``theory.csv`` with
``theory.json``, ``bound_versus_empirical.csv``, ``reference.csv``, and ``compare/networks.csv`` with
``compare/examples.csv.gz`` and ``compare/compare.json``. Each part is drawn by the functions of its recipe. Missing
files are left out, with a message. A record keeps the ``provenance`` of the run that measured.

Takes about a minute on two CPU cores, most of it for the statistics of ``recipes.compare``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from rich.console import Console

from fisher_reg import bound_versus_empirical
from recipes import penalty_scale, theory
from recipes.benchmark import study as benchmark
from recipes.bounds import tightness
from recipes.compare.analysis import analyse
from recipes.compare.findings import findings
from recipes.compare.powers import NETWORK
from recipes.compare.report import write as write_comparison
from recipes.penalties import report as penalties
from recipes.penalties.training import attack_name
from recipes.rank import agreement
from recipes.reference import study as reference
from recipes.reporting.files import write
from recipes.runtime.command import command


@command("redraw")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    redraw(Path(config.folder))


def redraw(folder: Path) -> dict[str, str]:
    """Draw what can be drawn.

    Returns:
        What was left out: the part, and the file that it lacks.

    Raises:
        FileNotFoundError: If there is no such folder, or none of the files in it.
    """
    console, missing = Console(), {}
    for name, part in PARTS.items():
        try:
            part(folder)
            console.print(f"{name}: drawn", highlight=False)
        except FileNotFoundError as error:
            missing[name] = Path(str(error.filename)).name
            console.print(f"{name}: left out, there is no {missing[name]}", highlight=False)
    if len(missing) == len(PARTS):
        raise FileNotFoundError(
            f"folder={folder} has nothing to draw: there is none of {', '.join(missing.values())}. Give the folder "
            "that a recipe printed last, or recipes/results of a clone."
        )
    return missing


def _benchmark(folder: Path) -> None:
    write(folder, "benchmark", {}, figure=benchmark.draw(pd.read_csv(folder / "benchmark.csv")))


def _bounds(folder: Path) -> None:
    steps, segments = (pd.read_csv(folder / f"{name}.csv") for name in ("tightness", "segments"))
    write(folder, "bounds", {}, figure=tightness.draw(steps, segments))


def _penalties(folder: Path) -> None:
    """Write the tables; a figure belongs to several strengths of a method, or is there already."""
    for path in _all(folder, "penalties*.csv"):
        rows, settings = pd.read_csv(path), _record(path.with_suffix(".json"))
        figure = None
        if path.with_suffix(".png").exists():
            figure = penalties.draw(rows, attack_name(settings["attacks"][0]))
        page = penalties.markdown(penalties.summarize(rows))
        write(folder, path.stem, {}, page=page, figure=figure)


def _penalty_scale(folder: Path) -> None:
    for path in _all(folder, "penalty_scale*.csv"):
        write(folder, path.stem, {}, page=penalty_scale.markdown(pd.read_csv(path)))


def _rank(folder: Path) -> None:
    rows, found = pd.read_csv(folder / "rank.csv"), pd.DataFrame(_record(folder / "rank.json")["correlations"])
    write(folder, "rank", {}, page=agreement.markdown(rows, found), figure=agreement.draw(rows, found))


def _theory(folder: Path) -> None:
    curves, old = pd.read_csv(folder / "theory.csv"), _record(folder / "theory.json")
    summary = theory.summarize(curves)
    record = summary | {"provenance": old["provenance"]}
    write(folder, "theory", {}, record=record, figure=theory.draw(curves, summary))


def _training(folder: Path) -> None:
    history = pd.read_csv(folder / "bound_versus_empirical.csv").to_dict("records")
    write(folder, "bound_versus_empirical", {}, figure=bound_versus_empirical(history))


def _reference(folder: Path) -> None:
    predicted = pd.read_csv(folder / "reference.csv")
    write(folder, "reference", {}, figure=reference.draw(predicted[predicted.left_out == "model"]))


def _compare(folder: Path) -> None:
    """Analyse the rows anew; ``networks.csv`` has medians of the examples, which the analysis adds again."""
    folder = folder if (folder / "examples.csv.gz").exists() else folder / "compare"
    examples, networks = pd.read_csv(folder / "examples.csv.gz"), pd.read_csv(folder / "networks.csv")
    old = _record(folder / "compare.json")
    settings = old["settings"]
    measured = [*NETWORK, "accuracy", *(name for name in networks if name.startswith("seconds_"))]
    found = analyse(networks[measured], examples, list(settings["attacks"]), settings["num_resamples"])
    write_comparison(found, findings(found), settings, folder, provenance=old.get("provenance"))


PARTS: dict[str, Callable[[Path], None]] = {
    "benchmark": _benchmark,
    "bounds": _bounds,
    "penalties": _penalties,
    "penalty_scale": _penalty_scale,
    "rank": _rank,
    "theory": _theory,
    "bound_versus_empirical": _training,
    "reference": _reference,
    "compare": _compare,
}


def _all(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(2, "No such file", pattern)
    return found


def _record(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


if __name__ == "__main__":
    main()
