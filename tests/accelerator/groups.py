"""Groups of cases, each run by a process of its own; nothing here touches the simulated device itself."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

IS_SUPPORTED = hasattr(torch._C, "_acc")
needs_hooks = pytest.mark.skipif(
    not IS_SUPPORTED,
    reason="needs a torch whose hooks let a backend be written in Python (torch._C._acc, from 2.14 on)",
)


def module_of(group):
    """Return the module of a group: ``CASES`` by their names, and in ``ROUGH`` the names of those that agree less."""
    return importlib.import_module(f"tests.accelerator.{group}")


@functools.cache
def failures(group):
    """Run a group in a new process, and return what went wrong by the name of the case, None for nothing."""
    return _told(group)


@functools.cache
def waits():
    """Return, of each task of :mod:`tests.accelerator.counted`, how often the host waits by line of fisher_reg."""
    return _told("counts")


def _told(what):
    command = [sys.executable, "-W", "ignore", "-m", "tests.accelerator", what]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parametrize(group):
    """Give a test each case of a group in turn, without importing the device."""
    return pytest.mark.parametrize("case", module_of(group).CASES)


def check(group, case):
    """Fail with what went wrong in a case; the whole group is run by the first that asks."""
    failure = failures(group)[case]
    assert failure is None, failure
