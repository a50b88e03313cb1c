"""Compare regularisers by robust accuracy and cost: ``python -m recipes.compare_penalties``.

Trains each model with each method at several strengths and seeds, and measures on the test images: accuracy, robust
accuracy under projected gradient attacks of maintained libraries, the largest Fisher eigenvalue, the expected
calibration error, and the seconds of the training (processor time on a CPU, so that simultaneous runs do not affect
it). The best setting of each method, by the first of ``attacks``, is also attacked by AutoAttack, since a penalty may
only mask gradients. A method that is null is left out.

Writes ``penalties.csv`` (a row per network), ``penalties.md``, ``penalties.json`` and ``penalties.png`` to Hydra's run
folder. Finished networks are cached in ``cache_dir``, so that an interrupted run resumes where it was; it writes the
first two files for the networks that it finished.

Takes about half an hour on two CPU cores, and AutoAttack at the end was not measured; nor was
``experiment=compare_penalties/cifar10_gpu``.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from recipes.data.chosen import prepared_data
from recipes.penalties.report import KEYS, draw, finalists, markdown, short, summarize
from recipes.penalties.training import attack_again, attack_name, callbacks, train_and_measure
from recipes.reporting.files import settings_of, write
from recipes.runtime.cache import Settings, stamped
from recipes.runtime.command import command
from recipes.runtime.jobs import Workers, execute, folders
from recipes.runtime.settings import merged, resolved

_SETTINGS = ("data", "optimizer", "trainer", "attacks", "num_attack_steps", "num_attacked", "num_probes", "device")


@command("compare_penalties")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    compare_penalties(config)


def compare_penalties(config: DictConfig) -> pd.DataFrame:
    """Train and measure what is not in the cache, and write the files.

    Returns:
        One row per network, as in ``penalties.csv``.

    Raises:
        ValueError: For settings that :func:`check` rejects; before any training.
    """
    workers = Workers.of(config)
    check(config, plan(config))
    folder, cache = folders(config)
    runs = [stamped(run, train_and_measure) for run in plan(config)]
    rows: list[Settings] = []
    try:
        for index, row in execute("training", runs, train_and_measure, workers, _described, cache):
            rows.append(_named(runs[index]) | row)
    finally:  # also after an interrupt
        frame = _written(pd.DataFrame(rows), folder)
    robust = attack_name(config.attacks[0])
    if config.auto_attacks:
        best, auto = finalists(frame, config.max_clean_loss, robust), resolved(config)["auto_attacks"]
        chosen = [run for run in runs if (run["model"], run["method"], run["strength"]) in best]
        again = [stamped({"run": run, "auto": auto}, attack_again) for run in chosen]
        found = execute("AutoAttack on the best", again, attack_again, workers, _described, cache)
        added = pd.DataFrame([_named(chosen[index]) | row for index, row in found])
        frame = _written(frame.merge(added, how="left"), folder)
    cells = summarize(frame)
    settings = settings_of(config)
    shown = {key: settings[key] for key in (*_SETTINGS, "models", "methods", "seeds", "auto_attacks")}
    write(folder, "penalties", config, record=shown, figure=draw(frame, robust))
    console = Console()
    console.print(markdown(short(cells, robust)), soft_wrap=True, highlight=False)
    console.print(f"Files: {folder}", soft_wrap=True)
    return frame


def _written(frame: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write the table and its means over seeds, and return it in order."""
    if len(frame):
        frame = frame.sort_values([*KEYS, "seed"], ignore_index=True)
        frame.to_csv(folder / "penalties.csv", index=False, float_format="%.6g")
        (folder / "penalties.md").write_text(markdown(summarize(frame)), encoding="utf-8")
    return frame


def _described(settings: Settings) -> str:
    run = settings.get("run", settings)
    return f"{run['model']}, {run['method']}"


def _named(run: Settings) -> Settings:
    return {key: run[key] for key in (*KEYS, "seed")}


def plan(config: DictConfig) -> list[Settings]:
    """Return the settings on which the numbers of each network depend, sorted by seed."""
    everything = resolved(config, output_dir=config.cache_dir)
    return [
        {key: everything[key] for key in _SETTINGS}
        | {"model": name, "network": network, "method": method, "strength": strength, "seed": seed}
        | {"parameter": options["parameter"], "callback": options["callback"]}
        for seed in everything["seeds"]
        for name, network in everything["models"].items()
        for method, options in everything["methods"].items()
        if options is not None
        for strength in options["strengths"]
    ]


def check(config: DictConfig, runs: list[Settings]) -> None:
    """Raise an error for settings that would fail after hours of training.

    Raises:
        ValueError: If there is no work, a seed occurs twice, or there are fewer test images than requested. A network
            or a callback that cannot be built raises the error of its constructor.
    """
    if not runs:
        raise ValueError("There is nothing to train: set models, methods with strengths, and seeds.")
    if len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"A seed occurs twice in seeds={list(config.seeds)}; standard errors would be too small.")
    data = prepared_data(merged(runs[0], {"data": config.data}))
    wanted = max(config.num_attacked, config.num_probes)
    if not 1 <= wanted <= len(data.splits["test"]):
        raise ValueError(
            f"num_attacked={config.num_attacked} and num_probes={config.num_probes} must be between 1 and the "
            f"{len(data.splits['test'])} test images."
        )
    for run in runs:
        callbacks(run)
    for network in config.models.values():
        instantiate(network, spec=data.spec)
