"""Values on the command line: of the type that a parameter or a default has, or refused."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function or of a class's ``__init__``; none where a name in them is not known."""
    try:
        return typing.get_type_hints(vars(function)["__init__"] if isinstance(function, type) else function)
    except (NameError, TypeError, AttributeError, KeyError):
        return {}


def check_hint(key: str, value: Any, hint: Any) -> None:
    """Refuse a value that an annotation excludes.

    Raises:
        ValueError: With the key, the value and what it must be.
    """
    if not _is_open(value) and not _fits(value, hint):
        raise ValueError(f"{key}={_shown(value)} must be {_said(hint)}.")


def check_default(key: str, value: Any, default: Any) -> None:
    """Refuse a value that cannot take the place of a default; ``null`` can take any place.

    Raises:
        ValueError: With the key, the value and what it must be.
    """
    if _is_open(value) or value is None or default is None:
        return
    nodes = bool(default) and isinstance(default, list) and all(isinstance(item, dict) for item in default)
    numbers = bool(default) and isinstance(default, list) and all(_fits(item, float) for item in default)
    if isinstance(default, list) and not isinstance(value, list):
        raise ValueError(f"{key}={_shown(value)} must be a list, as in {key}=[{_shown(value)}].")
    if isinstance(default, dict) and not isinstance(value, dict):
        raise ValueError(f"{key}={_shown(value)} must be a mapping, as in '{key}={{name: value}}'.")
    if numbers and not all(_is_open(item) or _fits(item, float) for item in value):
        raise ValueError(f"{key}={_shown(value)} must be a list of numbers.")
    if nodes and not all(_is_open(item) or isinstance(item, dict) for item in value):
        raise ValueError(f"{key}={_shown(value)} must be a list of mappings, as {_shown(default[0])}.")
    if isinstance(default, bool | int | float) and not _fits(value, type(default)):
        raise ValueError(f"{key}={_shown(value)} must be {_WORDS[type(default)]}; the default is {_shown(default)}.")


def _is_open(value: Any) -> bool:
    """Whether a value is known only later: an interpolation, or an object to be built."""
    return (isinstance(value, str) and "${" in value) or (isinstance(value, dict) and "_target_" in value)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML fits an annotation; of what is not understood, yes."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, str | int | float)
    kind = typing.get_origin(hint) or hint
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if isinstance(value, str) and kind is not object:
        return False  # which is a sequence, but of letters
    if isinstance(value, list) and issubclass(kind, Sequence | set):
        (item, *others) = typing.get_args(hint) or (Any,)
        return bool(others) or all(_is_open(one) or _fits(one, item) for one in value)
    return isinstance(value, kind)


def _said(hint: Any) -> str:
    """Return an annotation in words."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        said = dict.fromkeys(_said(member) for member in typing.get_args(hint))
        return " or ".join([words for words in said if not words.startswith("an object")] or said)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    kind = typing.get_origin(hint) or hint
    if isinstance(kind, type) and issubclass(kind, Sequence) and kind is not str:
        items = [_said(item) for item in typing.get_args(hint)]
        return f"a list (each {items[0]})" if len(items) == 1 else "a list"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping"
    return _WORDS.get(kind) or f"an object of {inspect.formatannotation(hint).rsplit('.', 1)[-1]}"


def _shown(value: Any) -> str:
    """Return a value as a YAML has it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
