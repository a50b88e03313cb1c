"""The output folder of ``recipes.train``: its configuration and its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from recipes.models.resuming import LAST
from recipes.runtime.command import command_line, overrides

_TAKEN = ("data", "model")


def run_config(folder: Path) -> DictConfig:
    """Return the configuration of a training, with its current folder instead of the original one.

    Raises:
        FileNotFoundError: If the folder has no configuration.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no training: there is no {path.name} in it. Pass the folder that recipes.train printed last."
        )
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict) or "output_dir" not in content:
        raise FileNotFoundError(f"{path} is not of a training. Pass the folder that recipes.train printed last.")
    moved: dict[str, Any] = _moved(content, str(content["output_dir"]), str(folder))
    return OmegaConf.create(moved)


def last_checkpoint(folder: Path) -> Path:
    """Return the last checkpoint of a training.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = folder / "checkpoints" / LAST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {path.relative_to(folder)}: no epoch was finished in it.")
    return path


def with_run(config: DictConfig) -> DictConfig:
    """Return a configuration with the data, the network and the checkpoint of the training in ``config.run``.

    ``config.checkpoint`` alone, if it is in an output folder of ``recipes.train``, also selects its training. Without
    either the configuration is not changed.

    Raises:
        FileNotFoundError: If there is no training in the folder, or no checkpoint.
        ValueError: If the command line also chooses data or a network.
    """
    folder = None if config.run is None else Path(config.run)
    chosen = [text for text in overrides() if text.lstrip("+~").split("=")[0].split(".")[0] in _TAKEN]
    if folder is None and config.checkpoint is not None and not chosen:
        beside = Path(config.checkpoint).absolute().parent.parent
        folder = beside if (beside / "config.yaml").is_file() else None
    if folder is None:
        return config
    if chosen:
        raise ValueError(
            f"run={folder} takes data and network from its own config.yaml; leave out {' '.join(chosen)}, or give "
            f"checkpoint={folder / 'checkpoints' / LAST} with both data=… and model=… instead."
        )
    own = run_config(folder)
    result = config.copy()
    with open_dict(result):
        for name in _TAKEN:
            result[name] = own[name]
        result.checkpoint = str(config.checkpoint or last_checkpoint(folder))
    return result


def check_unused(folder: Path) -> None:
    """Raise an error for a folder that already has a training.

    Raises:
        ValueError: If there is one.
    """
    if (folder / "config.yaml").exists():
        raise ValueError(
            f"{folder} already has a training: resume it with {command_line('train', resume=folder)}, or set "
            "another hydra.run.dir."
        )


def _moved(value: Any, old: str, new: str) -> Any:
    """Return settings in which paths below a folder have another prefix."""
    if isinstance(value, dict):
        return {key: _moved(part, old, new) for key, part in value.items()}
    if isinstance(value, list):
        return [_moved(part, old, new) for part in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value
