"""A base class of callbacks that works with both Lightning packages."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytorch_lightning as pl


def _callback_classes() -> tuple[type, ...]:
    """Return ``Callback`` of ``pytorch_lightning``, and that of ``lightning.pytorch`` if it is installed.

    The two packages contain the same code. A Trainer accepts the callbacks of either, but ``LightningCLI`` needs a
    subclass of its own ``Callback``.
    """
    if find_spec("lightning") is None:
        return (pl.Callback,)
    try:
        return (pl.Callback, import_module("lightning.pytorch").Callback)
    except (AttributeError, ImportError):  # a package that cannot be imported has no Trainer either
        return (pl.Callback,)


if TYPE_CHECKING:
    Callback = pl.Callback
else:
    Callback = type("Callback", _callback_classes(), {"__doc__": "A callback of every installed Lightning."})
