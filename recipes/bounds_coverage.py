"""Count the image classifiers that have a certified bound: ``python -m recipes.bounds_coverage``.

Each of ``models`` in ``conf/bounds_coverage.yaml``, with random weights and reduced sizes, is bounded over all inputs,
or, if that is not possible, over pixels in ``domain``, and at a few images. At these the bounds are compared with
lambda, the largest eigenvalue of the Fisher matrix. timm and transformers are optional: a model of a library that is
not installed is listed as such.

Parameters with a constant initial value are drawn at random, and batch norms take their statistics from random images;
otherwise residual branches that are initialised with zero would not affect the bound. Everything is in float64.

Writes ``coverage.csv`` (a row per model), ``coverage.json`` (with versions, settings, shares and refusals) and
``coverage.md`` to Hydra's run folder. A refusal names the first operation without a rule; later operations may also
have none.

Takes about three quarters of an hour on two CPU cores, with timm and transformers.
"""

from __future__ import annotations

import inspect
import json
import re
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisher_reg import Exact, LogitsOf, NoBoundError, UpperBound, fisher_bound, fisher_spectral_norm, local_fisher_bound
from recipes.reporting.files import settings_of, show, write
from recipes.reporting.tables import markdown_table
from recipes.runtime.command import command
from recipes.runtime.environment import chosen_device, environment, installed
from recipes.runtime.progress import track

LEVELS = ("global", "domain", "local")
_ROUND_OFF = 1e-6  # rounding tolerance of a bound below the eigenvalue, in log10


@command("bounds_coverage")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    coverage(config)


def coverage(config: DictConfig) -> pd.DataFrame:
    """Measure every model, write the files, and return the rows of ``coverage.csv``, which grows model by model."""
    folder, device = Path(config.output_dir), chosen_device(config.device)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own arguments
        for entry in track(config.models, "bounds", lambda entry: f"{entry.library} {entry.name}"):
            rows.append(measure(entry, config, device))
            pd.DataFrame(rows).to_csv(folder / "coverage.csv", index=False, float_format="%.6g")
    frame = pd.DataFrame(rows)
    result = {
        "environment": environment(device) | {name: installed(name) for name in ("timm", "transformers")},
        "config": settings_of(config),
        "shares": shares(frame),
        "missing": json.loads(missing(frame).to_json(orient="records")),
        "models": json.loads(frame.to_json(orient="records")),
    }
    write(folder, "coverage", config, page=markdown(frame), record=result)
    report(frame, folder)
    return frame


def measure(entry: DictConfig, config: DictConfig, device: torch.device) -> dict[str, Any]:
    """Return the row of one model: per level the bound or why there is none, lambda, and the number of violations."""
    row: dict[str, Any] = {"library": entry.library, "model": entry.name, "image_size": entry.size}
    row |= dict.fromkeys(["num_parameters", "status", "lambda_log10", "lambda_refusal", "num_violations"])
    row |= {f"{name}_{field}": None for name in LEVELS for field in ("log10", "seconds", "refusal")}
    begin = time.perf_counter()
    if find_spec(entry.library) is None:
        return row | {"status": "not installed", "seconds": 0.0}
    torch.manual_seed(config.seed)
    low, high = config.domain
    images = low + (high - low) * torch.rand(config.num_warmup, 3, entry.size, entry.size, dtype=torch.float64)
    try:
        network = instantiate(entry.network, _convert_="all", num_classes=config.num_classes).double()
        network = varied(network, images).to(device)
    except Exception as error:  # another version of the library may have other names and arguments
        return row | {"status": f"not built: {_described(error)}", "seconds": time.perf_counter() - begin}
    row["num_parameters"] = sum(parameter.numel() for parameter in network.parameters())
    images = images[: config.num_images].to(device)
    eigenvalues, row["lambda_refusal"] = _eigenvalues(network, images)
    row["lambda_log10"] = float(eigenvalues.amax().log10())
    exceeded = 0
    for name, bound in bounds(network, images, (low, high)).items():
        if name == "domain" and row["global_log10"] is not None:
            continue
        found, row[f"{name}_seconds"] = _bound_or_refusal(bound)
        if isinstance(found, str):
            row[f"{name}_refusal"] = found
            continue
        values = torch.as_tensor(found.log10_value, dtype=torch.float64)
        row[f"{name}_log10"] = float(values.mean())
        exceeded += int((eigenvalues.log10().cpu() > values.cpu() + _ROUND_OFF).sum())
    known = [name for name in LEVELS if row[f"{name}_log10"] is not None]
    status = ", ".join(known) or "no bound"
    return row | {"status": status, "num_violations": exceeded, "seconds": time.perf_counter() - begin}


def _eigenvalues(network: nn.Module, images: Tensor) -> tuple[Tensor, str | None]:
    """Return the exact eigenvalues, or NaN and why there are none."""
    try:
        return fisher_spectral_norm(network, images, solver=Exact()).eigenvalue, None
    except Exception as error:
        return torch.full(images.shape[:1], torch.nan, dtype=images.dtype), _described(error)


def bounds(network: nn.Module, images: Tensor, domain: tuple[float, float]) -> dict[str, Callable[[], UpperBound]]:
    """Return the bound functions by level; without ``"domain"`` if the library does not support it."""
    found = {
        "global": lambda: fisher_bound(network, images),
        "domain": lambda: fisher_bound(network, images, domain=domain),
        "local": lambda: local_fisher_bound(network, images),
    }
    if "domain" not in inspect.signature(fisher_bound).parameters:
        del found["domain"]
    return found


def _bound_or_refusal(bound: Callable[[], UpperBound]) -> tuple[UpperBound | str, float]:
    begin = time.perf_counter()
    try:
        found: UpperBound | str = bound()
    except Exception as error:  # any other error is a defect, which the table shows
        found = _described(error)
    return found, time.perf_counter() - begin


def _described(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if isinstance(error, NoBoundError) else f"{type(error).__name__}: {line}"


def hugging_face(kind: str, num_classes: int, **options: Any) -> nn.Module:
    """Return an image classifier of transformers, ``ViT`` for ``ViTForImageClassification``, of the given settings."""
    import transformers

    settings = getattr(transformers, f"{kind}Config")(num_labels=num_classes, **options)
    return LogitsOf(getattr(transformers, f"{kind}ForImageClassification")(settings), _logits)


def narrowed(network: Any, width: int, num_classes: int) -> nn.Module:
    """Return a network whose ``classifier`` has only ``width`` features instead of thousands."""
    layers = [module for module in network.classifier if isinstance(module, nn.Linear)]
    sizes = [layers[0].in_features, *[width] * (len(layers) - 1), num_classes]
    linears = iter(nn.Linear(*size) for size in pairwise(sizes))
    network.classifier = nn.Sequential(
        *(next(linears) if isinstance(module, nn.Linear) else module for module in network.classifier)
    )
    result: nn.Module = network
    return result


def _logits(module: nn.Module, pixels: Tensor) -> Tensor:
    logits: Tensor = module(pixel_values=pixels).logits
    return logits


@torch.no_grad()
def varied(network: nn.Module, images: Tensor) -> nn.Module:
    """Draw constant parameters at random and set the statistics of batch norms; return it in evaluation mode."""
    for parameter in network.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            size = 0.5 + torch.rand_like(parameter)
            parameter.copy_(parameter * size if parameter.any() else 0.1 * torch.randn_like(parameter))
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # only the statistics of these images
    network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def operation(refusal: str) -> str:
    """Return the operation of a refusal, without its place in the model.

    Example:
        >>> operation("No bound rule for the function einsum at 'blocks.0' (or it has hooks, …")
        'the function einsum'
        >>> operation("'mul_3' (mul) combines two values that depend on the input, which has …")
        'mul combines two values that depend on the input'
    """
    rule = re.match(r"(?:At '.*?': )?No bound rule for (.*?) at '", refusal)
    if rule:
        return rule[1]
    if "cannot be traced" in refusal:
        return "tracing"
    text = re.sub(r"^At '.*?': ", "", refusal)
    text = re.sub(r"'[^']*' \((\w+)\)", r"\1", text)
    return re.split(r", (?:which|and) |\. |: |; ", text)[0].rstrip(".")


def missing(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the refused operations: ``level``, ``operation``, ``count`` and ``models``, the most common first."""
    rows = [
        {"level": name, "operation": operation(refusal), "model": f"{row.library} {row.model}"}
        for name in LEVELS
        for row, refusal in zip(frame.itertuples(), frame[f"{name}_refusal"], strict=True)
        if isinstance(refusal, str)
    ]
    long = pd.DataFrame(rows, columns=["level", "operation", "model"])
    found = long.groupby(["level", "operation"], sort=False).model.agg(count="size", models=", ".join).reset_index()
    order = {name: index for index, name in enumerate(LEVELS)}
    return found.sort_values(
        ["level", "count"], key=lambda column: column.map(order) if column.name == "level" else -column, kind="stable"
    ).reset_index(drop=True)


def shares(frame: pd.DataFrame) -> dict[str, int]:
    """Return the numbers of models, of bounds by level (``domain``: that or a global one), and of violations."""
    has = {name: frame[f"{name}_log10"].notna() for name in LEVELS}
    return {
        "models": len(frame),
        "not_installed": int((frame.status == "not installed").sum()),
        "global": int(has["global"].sum()),
        "domain": int((has["global"] | has["domain"]).sum()),
        "local": int(has["local"].sum()),
        "compared": int((frame.lambda_log10.notna() & (has["global"] | has["domain"] | has["local"])).sum()),
        "violations": int(frame.num_violations.fillna(0).sum()),
    }


def summary(frame: pd.DataFrame) -> str:
    """Return the shares in words."""
    found = shares(frame)
    text = (
        f"Certified bounds: global {found['global']} of {found['models']}, with a domain {found['domain']} of "
        f"{found['models']}, local {found['local']} of {found['models']}. Violations: {found['violations']}, in "
        f"{found['compared']} models that have a bound and lambda."
    )
    return text + (f" Not installed: {found['not_installed']}." if found["not_installed"] else "")


def markdown(frame: pd.DataFrame) -> str:
    """Return the shares, the refused operations, and a line per model."""
    cells = pd.DataFrame({"model": frame.library + " " + frame.model, "size": frame.image_size.astype(str)})
    for title, column in (("log10 λ", "lambda"), *((name, name) for name in LEVELS)):
        cells[title] = frame[f"{column}_log10"].map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
    cells["s"] = frame.seconds.map("{:.1f}".format)
    cells["first refusal, or why there is no number"] = [_remark(row) for row in frame.itertuples()]
    found = missing(frame).assign(count=lambda rows: rows["count"].astype(str))
    return (
        "\n\n".join(
            [
                summary(frame),
                "The first operation without a rule, by level and number of models.\n\n" + markdown_table(found),
                "log10 of λ, the largest over the images, and of the bounds; the local one is a mean over images.\n\n"
                + markdown_table(cells),
            ]
        )
        + "\n"
    )


def _remark(row: Any) -> str:
    if pd.isna(row.num_parameters):
        return str(row.status)
    refusals = [text for text in (row.global_refusal, row.domain_refusal, row.local_refusal) if isinstance(text, str)]
    no_eigenvalue = [f"λ: {row.lambda_refusal}"] if isinstance(row.lambda_refusal, str) else []
    return "; ".join([operation(text) for text in refusals[:1]] + no_eigenvalue)


def report(frame: pd.DataFrame, folder: Path) -> None:
    """Print the refusals and the shares."""
    console = Console()
    for row in missing(frame).itertuples():
        line = f"{row.level}, {row.count}: {row.operation} ({row.models})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    show(summary(frame), folder)


if __name__ == "__main__":
    main()
