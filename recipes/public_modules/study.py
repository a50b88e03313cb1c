"""Attach both callbacks to unchanged public LightningModules: ``python -m recipes.public_modules``.

Each of ``modules`` in ``conf/public_modules.yaml`` is built with random weights, in a small configuration, and trained
for two steps on batches of random numbers with the structure of its data. First the callbacks get no argument that
depends on the module. If that raises an error or measures nothing, they get the arguments in ``needs``. The logged
lambda is compared with the largest eigenvalue of the Fisher matrix from an explicit Jacobian of the module's network. A
package that is not installed has a row with this status.

Writes to Hydra's run folder ``public_modules.csv`` (a row per module), ``public_modules.json`` (with versions and
settings) and ``public_modules.md``.

Takes about two minutes on two CPU cores, the more the more packages are installed.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fisher_reg
from fisher_reg import FisherMonitor, FisherRegularizer, ForwardError, KLPenalty
from recipes.public_modules import Public
from recipes.reporting.files import show, write
from recipes.reporting.tables import markdown_table
from recipes.runtime.command import command
from recipes.runtime.environment import environment, installed
from recipes.runtime.progress import track
from recipes.runtime.settings import resolved

_EQUAL = 0.05  # the tolerance of the default solver
_LENGTH = 100  # of a message in the table


@command("public_modules")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    public_modules(config)


def public_modules(config: DictConfig) -> pd.DataFrame:
    """Test every module, write the files, and return the rows of ``public_modules.csv``, which grows row by row."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pytorch_lightning", "lightning"):
        for part in ("", ".utilities.rank_zero", ".pytorch.utilities.rank_zero"):
            logging.getLogger(name + part).setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    for entry in track(config.modules, "modules", lambda entry: f"{entry.package} {entry.name}"):
        rows.append(tried(entry, config))
        pd.DataFrame(rows).to_csv(folder / "public_modules.csv", index=False)
    frame = pd.DataFrame(rows)
    settings = resolved(config)
    packages = dict.fromkeys(entry.get("distribution", entry.package) for entry in config.modules)
    versions = environment(torch.device("cpu")) | {name: installed(name) for name in packages}
    result = {"environment": versions, "config": settings, "rows": json.loads(frame.to_json(orient="records"))}
    write(folder, "public_modules", config, page=markdown(frame), record=result)
    show(summary(frame), folder)
    return frame


def tried(entry: DictConfig, config: DictConfig) -> dict[str, Any]:
    """Return the row of one module."""
    needs = dict(entry.get("needs", {}))
    row: dict[str, Any] = {"package": entry.package, "version": installed(entry.get("distribution", entry.package))}
    row |= {"module": entry.name, "batch": "", "status": "", "untouched": "", "needed": ""}
    row |= {"lambda": math.nan, "by_hand": math.nan, "is_equal": None, "bound": "", "warning": "", "seconds": 0.0}
    if find_spec(entry.package) is None:
        return row | {"status": "not installed"}
    begin = time.perf_counter()
    try:
        row["batch"] = described(_built(entry, config).batch)
        trained(_built(entry, config), config, callbacks=[])
    except Exception as error:  # another version of the package may have other names and arguments
        return row | {"status": f"does not train by itself: {_line(error)}"}
    found = attached(_built(entry, config), {}, config)
    row["untouched"] = found.message or "works"
    if found.message and needs:
        row["needed"] = ", ".join(f"{name}={value}" for name, value in needs.items())
        found = attached(_built(entry, config), needs, config)
    status = "works" if not found.message else "refused" if found.is_refused else f"fails: {found.message}"
    status = "works with arguments" if status == "works" and row["needed"] else status
    row |= {"status": status, "lambda": found.eigenvalue, "by_hand": found.by_hand, "bound": found.bound}
    if not found.message:
        row["is_equal"] = math.isclose(found.eigenvalue, found.by_hand, rel_tol=_EQUAL)
    return row | {"warning": found.warning, "seconds": time.perf_counter() - begin}


def _built(entry: DictConfig, config: DictConfig) -> Public:
    torch.manual_seed(config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages, about their own arguments
        built: Public = instantiate({"_target_": entry.build})
    return built


@dataclass(frozen=True)
class Attached:
    """The result of a training with both callbacks.

    Attributes:
        message: Why there is no eigenvalue; empty if there is one.
        is_refused: Whether the message is a named error of fisher_reg.
        eigenvalue: ``fisher/lambda_max_mean`` after the last step.
        by_hand: The eigenvalue from an explicit Jacobian.
        bound: The logged ``fisher/log10_bound_global``, or why there is none.
        warning: The first warning of a callback about anything else.
    """

    message: str = ""
    is_refused: bool = False
    eigenvalue: float = math.nan
    by_hand: float = math.nan
    bound: str = ""
    warning: str = ""


def attached(public: Public, needs: Mapping[str, str], config: DictConfig) -> Attached:
    """Train with both callbacks, and compare the logged values with the explicit Jacobian."""
    names = vars(fisher_reg) | {"torch": torch, "module": public.module, "batch": public.batch} | public.names
    options = {name: eval(text, names) for name, text in needs.items()}  # the same text is in the table
    monitor = FisherMonitor(num_samples=config.num_samples, **options)
    options.pop("probe", None)
    likelihood = {"likelihood": options.pop("likelihood")} if "likelihood" in options else {}
    regularizer = FisherRegularizer(penalty=KLPenalty(**likelihood), every_n_steps=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trained(public, config, callbacks=[monitor, regularizer])
        except Exception as error:  # the module may raise any error in the callbacks
            return Attached(message=_line(error), is_refused=isinstance(error, _NAMED))
    said = [str(one.message) for one in caught if str(one.message).startswith(("FisherMonitor", "FisherRegularizer"))]
    eigenvalue = monitor.history[-1]["fisher/lambda_max_mean"]
    message = "" if math.isfinite(eigenvalue) else next((one for one in said if "leaves out" in one), "NaN")
    log10_bound = next((e[_BOUND] for e in monitor.history if _BOUND in e), math.nan)
    no_bound = next((one for one in said if "bound" in one), "none")
    return Attached(
        message=_short(message),
        eigenvalue=eigenvalue,
        by_hand=by_hand(public, monitor.likelihood, len(public.inputs()) if monitor.given else config.num_samples),
        bound=f"{log10_bound:.2f}" if math.isfinite(log10_bound) else _short(no_bound),
        warning=_short(next((one for one in said if "bound" not in one and one != message), "")),
    )


_NAMED = (MisconfigurationException, ForwardError, ValueError)
_BOUND = "fisher/log10_bound_global"


def trained(public: Public, config: DictConfig, callbacks: list[pl.Callback]) -> None:
    """Fit a module on its batch, which is also the validation batch."""
    loader: DataLoader[Any] = DataLoader(
        cast("Dataset[Any]", [public.batch] * config.num_steps), batch_size=None, collate_fn=_as_it_is
    )
    trainer = _namespace(public.module).Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=DummyLogger(),  # asteroid asks for one
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
    )
    with warnings.catch_warnings():
        if not callbacks:
            warnings.simplefilter("ignore")
        trainer.fit(public.module, loader, loader)


def _namespace(module: Any) -> Any:
    """Return the Lightning package of a module, since a Trainer accepts only modules of its own package."""
    return pl if isinstance(module, pl.LightningModule) else import_module("lightning.pytorch")


def _as_it_is(batch: Any) -> Any:
    return batch


def by_hand(public: Public, likelihood: Any, num_samples: int) -> float:
    """Return the mean over the first examples of the largest eigenvalue, from every row of the Jacobian.

    With logits ``z``, ``J = dz/dx`` and the covariance ``S`` of the likelihood, the eigenvalues of ``J^T S J`` above
    zero are those of ``S J J^T``.
    """
    was_training = {part: part.training for part in public.module.modules()}
    public.module.eval()
    inputs = public.inputs().detach().requires_grad_()
    logits = public.network(inputs)
    rows = [torch.autograd.grad(logits[:, k].sum(), inputs, retain_graph=True)[0] for k in range(logits.shape[1])]
    jacobian = torch.stack([row.flatten(1) for row in rows], 1)[:num_samples].double()
    gram = jacobian @ jacobian.mT
    covariance = _COVARIANCES[type(likelihood).__name__](logits.detach()[:num_samples].double())
    for part, mode in was_training.items():
        part.training = mode
    return float(torch.linalg.eigvals(covariance @ gram).real.amax(1).mean())


def _categorical(logits: Tensor) -> Tensor:
    p = logits.softmax(1)
    return p.diag_embed() - p[:, :, None] * p[:, None, :]


def _bernoulli(logits: Tensor) -> Tensor:
    return (logits.sigmoid() * (-logits).sigmoid()).diag_embed()


def _gaussian(logits: Tensor) -> Tensor:
    return torch.ones_like(logits).diag_embed()


_COVARIANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "Categorical": _categorical,
    "Bernoulli": _bernoulli,
    "Gaussian": _gaussian,
}


def _line(error: Exception) -> str:
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return _short(f"{type(error).__name__}: {error}")


def _short(text: str) -> str:
    line = re.sub(r" \(/[^)]*\)", "", " ".join(text.split()))  # where a file is on this machine
    return line if len(line) <= _LENGTH else line[:_LENGTH] + "…"


def described(value: Any) -> str:
    """Return the structure of a batch, with the shapes of its tensors.

    Example:
        >>> described({"image": torch.zeros(2, 3), "names": ["a", "b"]})
        '{image: float32 (2, 3), names: list of str}'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple) and value and not isinstance(value[0], str):
        begin, end = "[]" if type(value) is list else "()"
        return begin + ", ".join(described(item) for item in value) + end
    return "list of str" if isinstance(value, list) and value else type(value).__name__


def summary(frame: pd.DataFrame) -> str:
    """Return the counts in words."""
    counts = frame.status.map(lambda status: status.split(":")[0]).value_counts()
    parts = "; ".join(f"{status}: {count}" for status, count in counts.items())
    compared = frame.is_equal.dropna()
    return (
        f"{len(frame)} modules. {parts}. Logged lambda equal to that by hand: {int(compared.sum())} of {len(compared)}."
    )


def markdown(frame: pd.DataFrame) -> str:
    """Return the counts, and a line per module."""
    cells = frame[["package", "module", "batch", "untouched", "needed", "status"]].copy()
    cells["package"] = cells.package + frame.version.map(
        lambda version: f" {version}" if isinstance(version, str) else ""
    )
    for name in ("needed", "batch"):
        cells[name] = cells[name].map(lambda text: f"`{text}`" if text else "")
    cells["λ"] = frame["lambda"].map(_number)
    cells["λ by hand"] = frame.by_hand.map(_number)
    cells["log10 bound"] = frame.bound
    cells["warning"] = frame.warning
    return summary(frame) + "\n\n" + markdown_table(cells.fillna("")) + "\n"


def _number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.4g}"
