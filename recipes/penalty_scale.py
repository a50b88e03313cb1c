"""Test whether a penalty has the same effect at other scales of images: ``python -m recipes.penalty_scale``.

Trains each network on each data set without a penalty, with the default step and weight of ``KLPenalty``, and with
those of ``KLPenalty.from_batch``, and attacks each with the length that ``from_batch`` chose for the data set. The
images are from several data sets at two resolutions each, so that a distance of 0.5 is small for some and large for
others.

Writes ``penalty_scale.csv`` (a row per network), ``penalty_scale.md`` and ``penalty_scale.json`` to Hydra's run folder.

Takes about four minutes on two CPU cores; ``experiment=penalty_scale/three`` was not measured.
"""

from __future__ import annotations

import pandas as pd
from omegaconf import DictConfig

from fisher_reg import KLPenalty
from recipes.data.chosen import prepared_data
from recipes.penalties.training import attack_name, train_and_measure
from recipes.reporting.files import settings_of, show, write
from recipes.reporting.tables import baseline_first, markdown_table, with_error
from recipes.runtime.cache import Settings, stamped
from recipes.runtime.command import command
from recipes.runtime.jobs import Workers, execute, folders
from recipes.runtime.settings import merged, resolved

_KEYS = ["data", "model", "method"]
_MEASURED = ("clean", "robust", "lambda_mean")
PLAIN = "none"


@command("penalty_scale")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    penalty_scale(config)


def penalty_scale(config: DictConfig) -> pd.DataFrame:
    """Train and measure what is not in the cache, and write the files.

    Returns:
        One row per network.
    """
    workers = Workers.of(config)
    folder, cache = folders(config)
    penalties = {name: chosen_penalty(config, data) for name, data in config.datasets.items()}
    names, plain = zip(*plan(config, penalties), strict=True)
    runs = [stamped(run, train_and_measure) for run in plain]
    rows = execute("training", runs, train_and_measure, workers, _described, cache)
    frame = pd.DataFrame([_row(names[index], runs[index], row) for index, row in rows])
    frame = baseline_first(frame, PLAIN, [*_KEYS, "seed"])
    write(folder, "penalty_scale", config, rows=frame, page=markdown(frame), record=settings_of(config))
    show(markdown(frame), folder)
    return frame


def chosen_penalty(config: DictConfig, data: DictConfig) -> KLPenalty:
    """Return the penalty of ``from_batch`` for one training batch of a data set."""
    prepared = prepared_data(merged({"seed": config.seed, "data": resolved(data)}))
    images, labels = next(iter(prepared.train_dataloader()))
    return KLPenalty.from_batch(images, labels, share=config.share)


def plan(config: DictConfig, penalties: dict[str, KLPenalty]) -> list[tuple[str, Settings]]:
    """Return for each network the name of the data set and all settings on which the numbers depend."""
    everything = resolved(config)
    shared = {key: everything[key] for key in ("optimizer", "num_attack_steps", "num_attacked", "num_probes", "device")}
    runs = []
    for seed in everything["seeds"]:
        for name, data in everything["datasets"].items():
            own = penalties[name]
            trainer = everything["trainer"] | {"max_epochs": everything["epochs"][name]}
            attacks = [{"norm": 2, "epsilon": own.step}]
            for model, network in everything["models"].items():
                for method, callback in methods(own).items():
                    weight = 0.0 if callback is None else callback["weight"]
                    run = {"data": data, "trainer": trainer, "attacks": attacks, "model": model, "network": network}
                    run |= {"method": method, "strength": weight, "seed": seed, "parameter": "weight"}
                    runs.append((name, shared | run | {"callback": callback}))
    return runs


def methods(own: KLPenalty) -> dict[str, Settings | None]:
    """Return the callback of each method."""
    return {PLAIN: None} | {
        name: {
            "_target_": "fisher_reg.FisherRegularizer",
            "weight": penalty.default_weight,
            "penalty": {"_target_": "fisher_reg.KLPenalty", "step": penalty.step},
        }
        for name, penalty in (("default", KLPenalty()), ("from_batch", own))
    }


def _described(run: Settings) -> str:
    return f"{run['model']}, {run['method']}"


def _row(name: str, run: Settings, result: Settings) -> Settings:
    penalty = run["callback"]["penalty"]["step"] if run["callback"] else float("nan")
    (attack,) = run["attacks"]
    measured = {key: result[key] for key in ("clean", "lambda_mean", "lambda_median")}
    found = {"radius": attack["epsilon"], "robust": result[attack_name(attack)]}
    named = {"data": name, "model": run["model"], "method": run["method"], "seed": run["seed"]}
    return named | {"step": penalty, "weight": run["strength"]} | measured | found


def markdown(frame: pd.DataFrame) -> str:
    """Return a table: a row per data set, model and method, with means and standard errors over the seeds."""
    titles = ("data", "model", "method", "step", "weight", "clean", "attacked", "radius", "mean λ")
    lines = []
    for names, group in baseline_first(frame, PLAIN, [*_KEYS, "seed"]).groupby(_KEYS, sort=False):
        first = group.iloc[0]
        setting = ["–", "–"] if names[2] == PLAIN else [f"{first.step:.3g}", f"{first.weight:.2g}"]
        clean, robust, mean = (with_error(group[key].mean(), group[key].sem()) for key in _MEASURED)
        lines.append([*names, *setting, clean, robust, f"{first.radius:.3g}", mean])
    return markdown_table(pd.DataFrame(lines, columns=titles)) + "\n"


if __name__ == "__main__":
    main()
