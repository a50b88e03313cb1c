"""The numbers in the formats of the Hugging Face hub.

``model-index`` belongs in the header of a model card (https://github.com/huggingface/hub-docs, ``modelcard.md``).
``.eval_results/`` belongs in the repository of the model (https://huggingface.co/docs/hub/eval-results). It has one
file per number, because the hub expects one per variant, and only for a data set that is a benchmark on the hub.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipes.evaluate.audit import Audit
from recipes.evaluate.numbers import Number
from recipes.reporting.records import plain


def model_index(audit: Audit, measured: Mapping[str, Number]) -> dict[str, Any]:
    """Return the part of a model card that contains every number that was measured."""
    target = str(audit.settings["data"]["_target_"]).rpartition(".")[2]
    metrics = [
        {
            "type": name,
            "value": number.value,
            "name": number.title,
            "args": {"guarantee": number.guarantee, "unit": number.unit, "images": number.count} | _ends(number),
        }
        for name, number in measured.items()
        if not math.isnan(number.value)
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {
            "type": audit.settings["hub_dataset"] or target.lower(),
            "name": f"{len(audit.images)} test images of {target}",
            "split": "test",
        },
        "metrics": metrics,
    }
    card: dict[str, Any] = plain({"model-index": [{"name": audit.network, "results": [result]}]})
    return card


def eval_results(audit: Audit, measured: Mapping[str, Number]) -> dict[str, list[dict[str, Any]]]:
    """Return the content of each file of ``.eval_results/``: accuracy, and accuracy under each attack in a ball."""
    dataset = audit.settings["hub_dataset"]
    if dataset is None:
        return {}
    count = len(audit.images)
    notes = {"accuracy": f"accuracy on {count} test images"}
    for name, attacked in audit.attacks.items():
        if attacked.ball:
            notes[f"attacks.{name}.accuracy"] = f"accuracy on {count} test images under {name}, {attacked.ball}"
    return {
        name: [
            {
                "dataset": {"id": dataset, "task_id": audit.settings["hub_task"]},
                "value": measured[name].value,
                "date": audit.identity.date,
                "notes": f"{text} ({measured[name].guarantee})",
            }
        ]
        for name, text in notes.items()
    }


def write_for_hub(audit: Audit, measured: Mapping[str, Number], folder: Path) -> None:
    """Write ``model_card.yaml``, and the files of ``.eval_results/`` if there are any."""
    _write(folder / "model_card.yaml", model_index(audit, measured))
    for name, entries in eval_results(audit, measured).items():
        _write(folder / ".eval_results" / f"{name.replace('.', '_')}.yaml", entries)


def check_hub(config: DictConfig) -> None:
    """Check the name of the data set of the hub.

    Raises:
        ValueError: If ``hub_dataset`` does not have the form ``owner/name``.
    """
    dataset = config.hub_dataset
    if dataset is not None and str(dataset).strip("/").count("/") != 1:
        raise ValueError(
            f"hub_dataset must be owner/name of a data set on the Hugging Face hub, or null; got {dataset}."
        )


def _ends(number: Number) -> dict[str, float]:
    if number.interval is None:
        return {}
    return {"low": number.interval.low, "high": number.interval.high, "level": number.interval.level}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(content)), encoding="utf-8")
