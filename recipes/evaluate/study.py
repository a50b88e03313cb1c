r"""Audit a classifier: ``python -m recipes.evaluate run=FOLDER`` for one that ``recipes.train`` trained in this folder.

Data, network and checkpoint are then those of the training. For another classifier, name each of them::

    python -m recipes.evaluate checkpoint=model.ckpt data=cifar10 model=resnet

The network can come from any importable factory, with its own arguments (``~model`` drops those of the group)::

    python -m recipes.evaluate checkpoint=weights.pt data=npz data.path=images.npz \
        ~model model._target_=torchvision.models.resnet18 model.num_classes=10 \
        'normalize={mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}'

Writes to Hydra's run folder: ``audit.html`` (one self-contained page), ``audit.json`` (every number of
every image, as ``audit.schema.json`` describes it), ``audit.sarif`` (the verdicts for CI), ``model_card.yaml`` (for the
Hugging Face hub) and TensorBoard events.

``'thresholds={accuracy: {min: 0.9}, lambda_p95: {max: 50}}'`` sets limits, for the names of
:func:`recipes.evaluate.numbers.names`. If a number has an interval, its less favourable end is compared with the limit.
If a threshold fails, the command ends with status 3 after all files are written; a sweep continues.

Takes about half a minute on two CPU cores for the network and the images of ``recipes.train``'s defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from fisher_reg import summarize
from recipes.data.chosen import prepared_data
from recipes.evaluate.audit import Audit, outcome
from recipes.evaluate.hub import check_hub, write_for_hub
from recipes.evaluate.identity import check_people
from recipes.evaluate.measuring import audited, audited_images
from recipes.evaluate.numbers import numbers
from recipes.evaluate.page import figures, page
from recipes.evaluate.reading import reading
from recipes.evaluate.record import record, write_json
from recipes.evaluate.sarif import FAILED, sarif
from recipes.evaluate.tables import summary, verdict_table
from recipes.evaluate.thresholds import Threshold, failure, judged, parsed
from recipes.models.checkpoints import built_network, check_network
from recipes.models.runs import with_run
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device
from recipes.runtime.mistakes import end_unless_swept


@command("evaluate")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    failed = failure(evaluate(config)["thresholds"])
    if failed:
        end_unless_swept(failed, FAILED)


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Audit the network and write the files.

    Returns:
        The content of ``audit.json``.

    Raises:
        FileNotFoundError: If ``run`` is not the folder of a training.
        ValueError: Before any measurement, for invalid settings, and for data, a checkpoint or a network that do not
            fit together.
    """
    config = with_run(config)
    thresholds = parsed(config.thresholds, [name for name, node in (config.attacks or {}).items() if node])
    check_people(config)
    check_hub(config)
    data = prepared_data(config)
    device = chosen_device(config.device)
    network = built_network(config, data.spec).to(device)
    examples = audited_images(config, data).to(device)
    check_network(network, examples.images[:1], data.spec.num_classes)
    return written(audited(config, data, network, examples), thresholds, Path(config.output_dir))


def written(audit: Audit, thresholds: Sequence[Threshold], folder: Path) -> dict[str, Any]:
    """Compare an audit with its thresholds, write and print the results, and return the content of ``audit.json``."""
    measured, texts = numbers(audit), reading(audit)
    verdicts = judged(thresholds, measured)
    result = record(audit, measured, verdicts, texts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.html").write_text(page(audit, measured, verdicts, texts), encoding="utf-8")
    write_json(folder / "audit.json", result)
    write_json(folder / "audit.sarif", sarif(audit.identity, verdicts))
    write_for_hub(audit, measured, folder)
    log(audit, texts, folder)
    report(audit.title, summary(audit, measured), verdict_table(verdicts), texts)
    Console().print(f"Files: {folder}", soft_wrap=True)
    return result


def log(audit: Audit, texts: list[str], folder: Path) -> None:
    """Write scalars, the histogram of log10 λ, the figures and the sentences for TensorBoard."""
    values = audit.measurement.values["lambda"]
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("audit/accuracy", audit.correct.double().mean())
        for name, value in summarize(values).items():
            writer.add_scalar(f"fisher/lambda_max_{name}", value)
        for name in ("global", "local", "blockwise"):
            bound = float(audit.measurement.values[f"log10_{name}"].nanmean())
            if bound == bound:
                writer.add_scalar(f"fisher/log10_bound_{name}", bound)
        for name in audit.attacks:
            found = outcome(audit, name)
            writer.add_scalar(f"attack/{name}/accuracy", found["accuracy"]["value"])
            if found["num_adversarial"]:
                writer.add_scalar(f"attack/{name}/median_distance", found["median_distance"])
        if bool((values > 0).any()):
            writer.add_histogram("fisher/log10_lambda_max", values[values > 0].log10())
        for name, figure in figures(audit).items():
            writer.add_figure(f"audit/{name}", figure)
        writer.add_text("audit/reading", "\n\n".join(texts))


def report(title: str, numbers: pd.DataFrame, verdicts: pd.DataFrame, texts: list[str]) -> None:
    """Print the summary, the verdicts and the sentences."""
    console = Console()
    for name, frame in ((title, numbers), ("Thresholds", verdicts.drop(columns="why", errors="ignore"))):
        table = Table(*frame.columns, title=name, box=SIMPLE, padding=(0, 1, 0, 0))
        for row in frame.itertuples(index=False):
            table.add_row(*row)
        if len(frame):
            console.print(table)
    for text in texts:
        console.print(text, highlight=False, markup=False)
