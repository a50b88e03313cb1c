"""How often the host waits for the simulated device, by the line of fisher_reg that asks for it."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

import fisher_reg

_PACKAGE = str(Path(fisher_reg.__file__).parent)

# The results of these are known to the host: numbers, or tensors whose shape depends on values.
_READ = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}
# These look at an error code that the device has written.
_CHECKED = {"_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq", "_linalg_eigvals"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}

_OPEN: list[Counter] = []


@contextmanager
def waits():
    """Count the waits in the block, of all threads.

    A wait is a number that is read (``item``, ``bool``, ``equal``, ``tolist``), a result whose shape depends on values
    (``nonzero``, ``unique``, a boolean mask as an index), a copy to the CPU, and a decomposition whose error code is
    looked at (``eigh``, ``svd``, ``cholesky``). A copy from the CPU to the device is none.

    Yields:
        From ``file.py:line``, the innermost one of fisher_reg, to how often; ``outside`` for the rest.
    """
    counts: Counter = Counter()
    _OPEN.append(counts)
    try:
        yield counts
    finally:
        _OPEN.remove(counts)


def count_wait(name, args, kwargs, is_on_device):
    """Count an operation, given its name and arguments, if the host waits for it.

    Args:
        name: Such as ``aten::item``.
        args: Positional arguments.
        kwargs: Keyword arguments.
        is_on_device: Whether an argument is a tensor of the device.
    """
    if _OPEN and _waits(name.removeprefix("aten::"), args, kwargs, is_on_device):
        line = _asking_line()
        for counts in _OPEN:
            counts[line] += 1


def _waits(name, args, kwargs, is_on_device):
    if name == "_to_copy":
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    if name == "copy_":
        return not is_on_device(args[0])
    if name in _INDEXING:
        return _has_mask(args, is_on_device) and not _is_fill(name, args)
    return name in _READ or name in _CHECKED


def _has_mask(args, is_on_device):
    return any(is_on_device(index) and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1]))


def _is_fill(name, args):
    """Whether a mask chooses where one number is written, which takes no look at the mask."""
    return name != "index" and args[2].numel() == 1 and len([index for index in args[1] if index is not None]) == 1


def _asking_line():
    frame = sys._getframe()
    while frame is not None:
        # a rule that hands the function on asks for nothing itself
        hands_on = frame.f_code.co_name == "__torch_function__"
        if frame.f_code.co_filename.startswith(_PACKAGE) and not hands_on:
            return f"{frame.f_code.co_filename[len(_PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"
