"""The network of an audit: built by any factory, with weights from a file that contains only tensors."""

from __future__ import annotations

import inspect
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from fisher_reg import deployed, evaluation_operator
from recipes.data.spec import ImageSpec
from recipes.models.zoo import Normalize

Weights = Mapping[str, Any]

_ENTRIES = ("state_dict", "model_state_dict", "model", "network", "net", "weights", "module")
_REMEDY = "Choose the factory that made it, with its arguments: model=… or ~model model._target_=…"


def built_network(config: DictConfig, spec: ImageSpec) -> nn.Module:
    """Build ``config.model``, load ``config.checkpoint`` and put ``config.normalize`` in front.

    A factory with a parameter ``spec`` gets that of the data; any other factory gets only its own arguments.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: If the factory raises an error or does not return a module; and as in :func:`load_weights`.
    """
    target = config.model._target_
    extra = {"spec": spec} if _takes_spec(get_object(target)) else {}
    try:
        network = instantiate(config.model, **extra)
    except InstantiationException as error:
        given = [name for name in config.model if name != "_target_"]
        raise ValueError(
            f"{target} rejected the arguments {given}: {error.__cause__ or error}. Set its own with model.name=…, "
            "after ~model, which drops those of the group (resnet, if none was chosen)."
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{target} must return a torch.nn.Module; it returned {type(network).__name__}.")
    if config.checkpoint is not None:
        load_weights(network, config.checkpoint, prefix=config.prefix)
    if config.normalize is None:
        return network.eval()
    return nn.Sequential(OrderedDict(normalize=Normalize(**config.normalize), network=network)).eval()


def check_network(network: nn.Module, image: Tensor, num_classes: int) -> None:
    """Evaluate a network on one image ``(1, C, H, W)`` as a check.

    Raises:
        ValueError: If the image has the wrong shape, or the output is not one finite logit for each class.
    """
    try:
        with torch.no_grad():
            deployed(network, image)(image)
    except Exception as error:  # the user's forward may raise any error
        raise ValueError(
            f"The network cannot take an image of shape {tuple(image.shape[1:])} (channels, height, width): "
            f"{error} Use images of its size (data.image_size=…, data.num_channels=3) or build it for these."
        ) from error
    with evaluation_operator(network, image) as fisher:
        num_outputs = fisher.logits.shape[1]
    if num_outputs != num_classes:
        raise ValueError(
            f"The network has K={num_outputs} outputs, the data {num_classes} classes; build the network for them "
            f"(for most factories model.num_classes={num_classes}) or choose the data that it was trained on."
        )


# timm's reader supports only the prefixes of DataParallel and torch.compile. In a LightningModule the prefix is the
# name of any attribute, and the file may contain other networks.
def load_weights(network: nn.Module, path: str | Path, *, prefix: str | None = None) -> None:
    """Load every weight of a network from a file that contains only tensors; no code in it is executed.

    The file is from ``torch.save`` or safetensors: a state dict, or a dict with one, as written by Lightning, timm and
    torchvision. If the network was part of a module, such as a LightningModule or DistributedDataParallel, the keys
    have a prefix; it is determined from the keys of the network, and other keys are ignored.

    Args:
        network: Changed in place; not changed if there is an error.
        path: The file.
        prefix: Prefix of the network's keys in the file, needed only if several networks in it fit.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, contains other objects than tensors or belongs to another network (the
            message names the first key that does not match).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.resolve()}; set its path with checkpoint=…")
    expected = network.state_dict()
    given = _state_dict(path, _read(path))
    if prefix is None:
        prefix = _prefix(given, expected, path)
    chosen = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
    for key, value in expected.items():  # a counter of training steps, missing in batch norms from before 2018
        if key.endswith("num_batches_tracked"):
            chosen.setdefault(key, value)
    _check(chosen, expected, path)
    network.load_state_dict(chosen)


def _takes_spec(factory: Any) -> bool:
    try:
        return "spec" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise ValueError(_damaged(path, error)) from error
        raise ValueError(
            f"{path} contains more than tensors: {refused[1]} was rejected, since loading it could run any code. Load "
            "it where it was made and save only the weights: torch.save(model.state_dict(), path)."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(_damaged(path, error)) from error


def _read_safetensors(path: Path) -> Weights:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the package safetensors: pip install safetensors.") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    # only the first sentence: torch continues with the advice weights_only=False
    first = re.split(r"\.\s|\n", f"{type(error).__name__}: {error}")[0]
    return f"{path} is damaged or not a file of weights by torch.save or safetensors ({first}). Copy or save it again."


def _state_dict(path: Path, content: Any) -> Weights:
    """Find the mapping from names to tensors."""
    if isinstance(content, Mapping):
        entries = [content.get(name) for name in _ENTRIES]
        for found in (*entries, content):
            if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
                return {str(key): value for key, value in found.items()}
    found = f"a dict of {list(content)[:10]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise ValueError(
        f"{path} must hold a state dict, or a dict with one under {', '.join(_ENTRIES[:3])}; it holds {found}. Save it "
        "with torch.save(model.state_dict(), path)."
    )


def _prefix(given: Weights, expected: Weights, path: Path) -> str:
    """Return the most frequent prefix of the network's keys in the file; the shortest of several."""
    counts: Counter[str] = Counter({"": 0})
    for key in given:
        ends = [0, *(match.end() for match in re.finditer(r"\.", key))]
        counts.update(key[:end] for end in ends if key[end:] in expected)
    fitting = [
        prefix for prefix in counts if all(_shape(given, prefix + key) == _shape(expected, key) for key in expected)
    ]
    if "" in fitting:
        return ""
    different = [prefix for prefix in fitting if not _equal(given, prefix, fitting[0], expected)]
    if different:
        raise ValueError(
            f"{path} holds several networks that fit, under {[fitting[0], *different]}; choose one with prefix=…"
        )
    return min(fitting or counts, key=lambda prefix: (-counts[prefix], len(prefix)))


def _equal(given: Weights, one: str, other: str, keys: Weights) -> bool:
    pairs = ((given[one + key], given[other + key]) for key in keys)
    return all(first.equal(second) if isinstance(first, Tensor) else first == second for first, second in pairs)


def _shape(weights: Weights, key: str) -> str:
    if key not in weights:
        return "missing"
    value = weights[key]
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _check(given: Weights, expected: Weights, path: Path) -> None:
    """Raise an error for weights of another network."""
    wrong = [key for key in {**expected, **given} if _shape(given, key) != _shape(expected, key)]
    if not wrong:
        return
    rows = {_rows(given.get(key), expected.get(key)) for key in wrong}
    first = wrong[0]
    only = rows.pop() if len(rows) == 1 else None
    if only is not None:
        in_file, in_network = only
        raise ValueError(
            f"{path} has {in_file} classes, the network was built for {in_network}: only the last layer differs, from "
            f"{first!r} on, {_shape(given, first)} in the file and {_shape(expected, first)} in the network. Choose "
            "the data that it was trained on, or build the network for as many classes."
        )
    if first in expected:
        said = f"{_shape(given, first)} in the file, {_shape(expected, first)} in the network"
    else:
        said = f"unexpected, {_shape(given, first)} in the file and not in the network"
    raise ValueError(
        f"{path} is of another network: {len(wrong)} keys do not match, and the network has {len(expected)}. The first "
        f"is {first!r}: {said}. {_REMEDY}"
    )


def _rows(given: Any, expected: Any) -> tuple[int, int] | None:
    """Return the numbers of rows of two weights whose shapes differ only in them."""
    if not (isinstance(given, Tensor) and isinstance(expected, Tensor) and given.ndim and expected.ndim):
        return None
    return (len(given), len(expected)) if given.shape[1:] == expected.shape[1:] else None
