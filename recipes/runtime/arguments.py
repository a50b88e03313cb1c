"""Overrides on the command line, checked against the signatures of their targets.

A YAML of this project contains only deviations from defaults. Hydra alone would therefore require
``+data.num_train=300`` instead of ``data.num_train=300``, and also accept ``+data.num_trian=300``. :func:`completed`
checks the signature of the class or function in ``_target_`` instead.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from recipes.runtime.mistakes import told_in_a_line
from recipes.runtime.values import check_default, check_hint, hints

_ADDED = (OverrideType.ADD, OverrideType.FORCE_ADD)
_OF_HYDRA = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
_WITH_VALUE = ("-c", "--cfg", "-i", "--info", "-p", "--package", "--experimental-rerun")
_OTHER_CONFIGURATION = (
    *("-h", "--help", "--hydra-help", "-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir"),
    "hydra.searchpath",
)


def composed(conf: Path, config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose a configuration like the command line, including :func:`completed`."""
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose(config_name, _completed(conf, config_name, overrides))


def completed(conf: Path, config_name: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command line in the form that Hydra accepts.

    - ``node.name=value`` becomes ``++node.name=value`` if the node's ``_target_`` has that parameter and the YAML does
      not name it.
    - ``experiment=name`` becomes ``experiment=recipe/name``.
    - In a sweep, what is the same in all jobs is left out of the names of their folders.
    - A value must be of the type that the parameter or the default has (:mod:`recipes.runtime.values`).

    Args:
        conf: The folder of configurations.
        config_name: The recipe.
        arguments: Flags and overrides.

    Raises:
        ValueError: For a parameter that the target does not have, a top-level key that the recipe does not know, a
            value of another type, another recipe's experiment, or what Hydra cannot compose.
    """
    if any(argument.split("=")[0] in _OTHER_CONFIGURATION for argument in arguments):
        return list(arguments)  # among them those of configurations of the user's own
    places = [place for place in range(len(arguments)) if _is_override(arguments, place)]
    if not places:
        return list(arguments)
    with initialize_config_dir(str(conf), version_base="1.3"):
        is_sweep = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))
        complete = _completed_for_all if is_sweep else _completed
        texts = complete(conf, config_name, [arguments[place] for place in places])
        _check_composed(conf, config_name, texts, is_sweep)
    changed = dict(zip(places, texts, strict=True))
    done = [changed.get(place, text) for place, text in enumerate(arguments)]
    return [*done, *_without_constants(texts), *_numbered(texts)] if is_sweep else done


def run_name(overrides: str, number: int, sweeper: str) -> str:
    """Return a short name of a run in a sweep, which is also its folder and what TensorBoard calls it.

    Args:
        overrides: Hydra's ``override_dirname``: what is swept.
        number: Of the job. It is a part of the name only where a sweeper may try the same values twice.
        sweeper: Choice of ``hydra/sweeper``.

    Example:
        >>> run_name("model=vgg,penalty=kl,++optimizer.lr=0.1,seed=0", 5, "basic")
        'vgg_kl_lr0.1_seed0'
        >>> run_name("model=vgg", 5, "optuna")
        'vgg_5'
    """
    words = [_word(*item.partition("=")[::2]) for item in _ITEM.split(overrides) if item]
    return "_".join(words if words and sweeper == "basic" else [*words, str(number)])


def _word(key: str, value: str) -> str:
    """Return a choice such as ``model=vgg`` by its value alone, and anything else with the last part of its key."""
    is_choice = "." not in key and value[:1].isalpha()
    word = value if is_choice else f"{key.lstrip('+').split('.')[-1]}{value}"
    return re.sub(r"[^\w.+-]+", "-", word).strip("-")


_MOST_JOBS = 10_000
_LONGEST_NAME = 150  # of a folder; file systems allow 255 bytes
_ITEM = re.compile(r",(?=[\w+~@./]+=)")  # a comma that is no part of a value
OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def _without_constants(texts: Sequence[str]) -> list[str]:
    """Return the setting that excludes overrides without a sweep from the names of folders."""
    option = "hydra.job.config.override_dirname.exclude_keys"
    try:
        parsed = OverridesParser.create().parse_overrides(list(texts))
    except HydraException:
        return []
    constant = [one for one in parsed if not (one.is_hydra_override() or one.is_sweep_override())]
    if not constant or any(one.key_or_group == option for one in parsed):
        return []
    return [f"{option}=[{','.join(repr(one.key_or_group) for one in constant)}]"]


def _numbered(texts: Sequence[str]) -> list[str]:
    """Return the setting that numbers the folders of a sweep, if :func:`run_name` would give one name twice."""
    parsed = OverridesParser.create().parse_overrides(list(texts))
    swept = [one for one in parsed if one.is_sweep_override()]
    if any(one.key_or_group == "hydra.sweep.subdir" for one in parsed) or not all(map(_is_listed, swept)):
        return []
    choices = [[f"{one.key_or_group}={value}" for value in one.sweep_string_iterator()] for one in swept]
    names = [run_name(",".join(job), 0, "basic") for job in itertools.islice(itertools.product(*choices), _MOST_JOBS)]
    is_clear = len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST_NAME
    return [] if is_clear else ["hydra.sweep.subdir=${hydra.job.num}"]


def _completed_for_all(conf: Path, config_name: str, texts: Sequence[str]) -> list[str]:
    """Return the overrides of a sweep so that they hold for each choice of each group: ``++`` if one job needs it."""
    with told_in_a_line():
        parsed = OverridesParser.create().parse_overrides(list(texts))
    found = [_completed(conf, config_name, texts)]
    for place, override in enumerate(parsed):
        for value in _values(override)[1:] if (conf / str(override.key_or_group)).is_dir() else []:
            job = [*texts[:place], f"{override.key_or_group}={value}", *texts[place + 1 :]]
            found.append(_completed(conf, config_name, job))
    return [next((text for text in column if text.startswith("++")), column[0]) for column in zip(*found, strict=True)]


def _completed(conf: Path, config_name: str, texts: Sequence[str]) -> list[str]:
    texts = [_experiment(conf, config_name, text) for text in texts]
    with told_in_a_line():
        parsed = OverridesParser.create().parse_overrides(texts)
        _check_choices(conf, parsed)
        # An experiment of the recipe's own may declare keys, as the recipe's YAML does.
        experiments = [text for one in parsed if one.key_or_group == "experiment" for text in _one(one)]
        known = compose(config_name, experiments)
    names = set(map(str, known))
    _check_names(conf, config_name, parsed, names)
    chosen = [override for override in parsed if _is_choice(override)]
    _check_values(conf, known, chosen)
    with told_in_a_line():
        config = compose(config_name, [text for override in chosen for text in _one(override)])
    OmegaConf.set_struct(config, False)
    done = []
    for override in parsed:
        if not _is_choice(override) and _knows_all(parsed):
            _check_place(config, override)
        done.append(override.input_line if _is_choice(override) else _setting(config, override))
    for name in sorted(set(map(str, config)) - names):
        raise ValueError(_unknown(config_name, name, names))
    for name in sorted(names - set(map(str, config))):
        raise ValueError(f"~{name} leaves recipes.{config_name} without {name}, which it needs. Leave ~{name} out.")
    return [str(text) for text in done]


def _check_composed(conf: Path, config_name: str, texts: Sequence[str], is_sweep: bool) -> None:
    """Refuse what Hydra cannot compose, its own settings included; of a sweep, with each choice of each group."""
    with told_in_a_line():
        parsed = OverridesParser.create().parse_overrides(list(texts))
        jobs = [text for override in parsed for text in _first(override)] if is_sweep else list(texts)
        config = compose(config_name, jobs, return_hydra_config=True)
        for override in parsed if is_sweep else []:
            group = str(override.input_line).partition("=")[0]
            others = [text for text in jobs if not text.startswith(f"{group}=")]
            for value in _values(override)[1:] if (conf / str(override.key_or_group)).is_dir() else []:
                compose(config_name, [*others, f"{group}={value}"])
    for override in parsed:
        path, _, name = str(override.key_or_group).rpartition(".")
        kind = OmegaConf.get_type(OmegaConf.select(config, path)) if override.is_hydra_override() else None
        if override.type in _ADDED and is_dataclass(kind) and name not in kind.__dataclass_fields__:
            raise ValueError(f"{path} has no {name}. It has {', '.join(kind.__dataclass_fields__)}.")


def _check_choices(conf: Path, overrides: Iterable[Override]) -> None:
    """Refuse ``group=null``, which Hydra takes in a YAML alone."""
    for override in overrides:
        group = str(override.key_or_group)
        folder = conf / group
        if None in _values(override) and folder.is_dir():
            choices = sorted(path.stem for path in folder.glob("*.yaml"))
            remedy = f"choose one of {', '.join(choices)}" if choices else f"leave {group} out"
            remedy = f"write {group}=none" if "none" in choices else remedy
            raise ValueError(f"{group}=null is no configuration: {remedy}.")


def _check_values(conf: Path, known: DictConfig, overrides: Iterable[Override]) -> None:
    """Refuse values at the top level that are of another type than their defaults."""
    for override in overrides:
        key = str(override.key_or_group)
        if key in known and not (conf / key).is_dir():
            for value in _values(override):
                check_default(key, value, _plain(known)[key])


def _values(override: Override) -> list[Any]:
    """Return the value of an override; of a sweep's, all that it lists."""
    if override.is_delete():
        return []
    if not override.is_sweep_override():
        return [override.value()]
    return list(override.sweep_iterator()) if _is_listed(override) else []


def _is_listed(override: Override) -> bool:
    """Whether it is a sweep with a list of values; ``glob``, ranges and intervals are not."""
    return isinstance(override.value(), ChoiceSweep)


def _check_names(conf: Path, recipe: str, overrides: Iterable[Override], known: set[str]) -> None:
    """Raise an error for a first name that is neither a key of the recipe nor a group of configurations."""
    for override in overrides:
        name = re.split(r"[./@]", str(override.key_or_group))[0]
        if not (override.is_hydra_override() or override.is_delete() or name in known or (conf / name).is_dir()):
            raise ValueError(_unknown(recipe, name, known))


def _unknown(recipe: str, name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.7)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"recipes.{recipe} has no {name}.{meant} It has {', '.join(sorted(known))}."


def _is_override(arguments: Sequence[str], place: int) -> bool:
    """Whether an argument is neither a flag nor a flag's value."""
    return not arguments[place].startswith("-") and (place == 0 or arguments[place - 1] not in _WITH_VALUE)


def _is_choice(override: Override) -> bool:
    """Whether it is for the defaults list, for Hydra itself, a deletion or a top-level value."""
    key = override.key_or_group
    is_setting = "." in key and "/" not in key and override.package is None and not key.startswith("hydra.")
    return not is_setting or override.is_delete()


def _one(override: Override) -> list[str]:
    """Return :func:`_first`; none for Hydra itself."""
    return [] if override.is_hydra_override() else _first(override)


def _first(override: Override) -> list[str]:
    """Return the override; of a sweep's, that of its first value, if it lists them."""
    text = str(override.input_line)
    if not override.is_sweep_override():
        return [text]
    if not _is_listed(override):
        return []
    return [f"{text.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"]


def _knows_all(overrides: Iterable[Override]) -> bool:
    """Whether :func:`_one` has composed all choices of the command line."""
    chosen = [override for override in overrides if _is_choice(override)]
    return all(override.is_hydra_override() or override.is_delete() or bool(_one(override)) for override in chosen)


def _check_place(config: DictConfig, override: Override) -> None:
    """Raise an error for a value below a missing node, and for a new name in a node without ``_target_``."""
    path, _, name = override.key_or_group.rpartition(".")
    node = OmegaConf.select(config, path, throw_on_resolution_failure=False)
    if override.type in _ADDED or name == "_target_" or _has_target(node):
        return
    if not isinstance(node, DictConfig):
        raise ValueError(
            f"{path}.{name} cannot be set: the configuration has no settings below {path}. To add one, write "
            f"+{path}.{name}=…; to build an object there, set {path}._target_=… first."
        )
    if name not in node.keys():  # noqa: SIM118 (`in` resolves the value)
        close = difflib.get_close_matches(name, map(str, node), 1)
        meant = f" Did you mean {path}.{close[0]}?" if close else ""
        raise ValueError(
            f"{path} has no {name}.{meant} It has {', '.join(sorted(map(str, node))) or 'nothing'}. Add one with "
            f"+{path}.{name}=…."
        )


def _setting(config: DictConfig, override: Override) -> str:
    """Check one override of a value and apply it; return it in the form that Hydra accepts."""
    key, text = override.key_or_group, str(override.input_line)
    path, _, name = key.rpartition(".")
    node = OmegaConf.select(config, path, throw_on_resolution_failure=False)
    is_there = isinstance(node, DictConfig) and name in node.keys()  # noqa: SIM118 (`in` resolves the value)
    names = _parameters(node)
    if not is_there and names is not None and name not in names:
        raise ValueError(_refusal(path, name, str(node["_target_"]), list(names)))
    hint = Any if names is None else names.get(name, Any)
    for value in _values(override):
        if hint is not Any:
            check_hint(key, value, hint)
        elif is_there:
            check_default(key, value, _plain(node)[name])
    is_added = override.type in _ADDED
    if is_there or is_added or names is not None or name == "_target_":
        value = None if override.is_sweep_override() else override.value()
        OmegaConf.update(config, key, value, force_add=True)
    has_to_be_added = not is_there and not is_added and (name == "_target_" or _has_target(node))
    return f"++{text}" if has_to_be_added else text


def _plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=False)


def _has_target(node: Any) -> bool:
    return isinstance(node, DictConfig) and isinstance(node.get("_target_"), str)


def _parameters(node: Any) -> dict[str, Any] | None:
    """Return what a node's target takes, with annotations; ``None`` where that is not known."""
    if not _has_target(node):
        return None
    try:
        names = _annotated(pkgutil.resolve_name(node["_target_"]))
    except Exception:  # of an import: Hydra tells it where the target is built
        return None
    return None if names is None else names | dict.fromkeys(_OF_HYDRA, Any)


def _annotated(target: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the parameters, those of base classes included that ``**kwargs`` passes on, with their annotations."""
    owners: Iterable[Any] = target.__mro__ if isinstance(target, type) else [target]
    names: dict[str, Any] = {}
    for owner in owners:
        if isinstance(owner, type) and "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(owner).parameters.values()
        annotations = hints(owner)
        named = (one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))
        names |= {name: annotations.get(name, Any) for name in named if name not in names}
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            return names
    return None


def _refusal(path: str, name: str, target: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    if close:
        return f"{path} has no {name}. Did you mean {path}.{close[0]}?"
    shown = ", ".join(other for other in names if other not in _OF_HYDRA)
    return f"{path} has no {name}. {target} takes {shown}."


def _experiment(conf: Path, config_name: str, text: str) -> str:
    """Add the folder of the recipe to the names of experiments; a ``+`` is not needed."""
    key, _, value = text.partition("=")
    if key.lstrip("+") != "experiment":
        return text
    return f"experiment={','.join(_in_folder(conf / 'experiment', config_name, name) for name in value.split(','))}"


def _in_folder(folder: Path, recipe: str, name: str) -> str:
    if name in ("", "null"):
        return name
    if (folder / recipe / f"{name}.yaml").is_file():
        return f"{recipe}/{name}"
    found = [name] if (folder / f"{name}.yaml").is_file() else []
    found += [f"{path.parent.name}/{path.stem}" for path in sorted(folder.glob(f"*/{name}.yaml"))]
    if found and not found[0].startswith(f"{recipe}/"):
        own = ", ".join(path.stem for path in sorted((folder / recipe).glob("*.yaml"))) or "none"
        raise ValueError(
            f"experiment={name} belongs to another recipe: python -m recipes.{found[0].split('/')[0]} "
            f"experiment={name}. Those of recipes.{recipe}: {own}."
        )
    return name
