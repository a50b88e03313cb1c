"""Does a penalty mean the same on other images: ``python -m recipes.penalty_scale``.

Trains each network on each data set without a penalty, with the default step and weight of ``KLPenalty``, and with
those of ``KLPenalty.from_batch``, and attacks each with the length that ``from_batch`` chose for the data set. The
images are of several data sets at two resolutions each, so that half a unit is little on some and much on others.

Leaves ``penalty_scale.csv`` (a row per network), ``penalty_scale.md`` and ``penalty_scale.json`` in Hydra's run folder.

Takes about four minutes on two CPU cores; ``experiment=penalty_scale/three`` was not measured.
"""

from __future__ import annotations

import pandas as pd
from omegaconf import DictConfig

from fisher_reg import KLPenalty
from recipes.data.chosen import prepared_data
from recipes.penalties.training import attack_name, train_and_measure
from recipes.reporting.files import settings_of, show, write
from recipes.reporting.tables import markdown_table
from recipes.runtime.cache import Settings, stamped
from recipes.runtime.command import command
from recipes.runtime.jobs import Workers, execute, folders
from recipes.runtime.settings import merged, resolved

_KEYS = ["data", "model", "method"]


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
    frame = frame.sort_values([*_KEYS, "seed"], ignore_index=True)
    write(folder, "penalty_scale", config, rows=frame, page=markdown(frame), record=settings_of(config))
    show(markdown(frame), folder)
    return frame


def chosen_penalty(config: DictConfig, data: DictConfig) -> KLPenalty:
    """Return the penalty that one training batch of a data set suggests."""
    prepared = prepared_data(merged({"seed": config.seed, "data": resolved(data)}))
    images, labels = next(iter(prepared.train_dataloader()))
    return KLPenalty.from_batch(images, labels, share=config.share)


def plan(config: DictConfig, penalties: dict[str, KLPenalty]) -> list[tuple[str, Settings]]:
    """Return the name of the data set and everything that the numbers depend on, for each network."""
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
    """Return what is compared: the callback of each method."""
    return {"none": None} | {
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
    for names, group in frame.groupby(_KEYS, sort=False):
        first = group.iloc[0]
        setting = ["–", "–"] if names[2] == "none" else [f"{first.step:.3g}", f"{first.weight:.2g}"]
        cells = [_cell(group[key]) for key in ("clean", "robust")]
        lines.append([*names, *setting, *cells, f"{first.radius:.3g}", f"{group.lambda_mean.mean():.3g}"])
    return markdown_table(pd.DataFrame(lines, columns=titles)) + "\n"


def _cell(values: pd.Series) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.sem():.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
