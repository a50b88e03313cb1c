"""The random numbers of a forward: the same ones in every call, without a change of the global generators."""

from __future__ import annotations

import random
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_OTHER_SEED = 0x5EED

_LOCK = threading.RLock()  # the global generators belong to the whole process


@dataclass(frozen=True)
class GlobalState:
    """A snapshot of the global random generators: torch's on the CPU and a device, Python's, NumPy's."""

    device: torch.device
    of_cpu: Tensor
    of_device: Tensor | None
    of_python: Any
    of_numpy: tuple[Any, ...]

    @classmethod
    def read(cls, device: torch.device) -> GlobalState:
        """Take the snapshot; nothing is drawn."""
        of_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_index(device))
        of_numpy = np.random.get_state(legacy=True)
        return cls(device, torch.get_rng_state(), of_device, random.getstate(), tuple(of_numpy))

    @classmethod
    def other(cls, device: torch.device) -> GlobalState:
        """Return another state, which does not depend on the present one; nothing is drawn."""
        with _LOCK:
            present = cls.read(device)
            try:
                torch.manual_seed(_OTHER_SEED)
                random.seed(_OTHER_SEED)
                np.random.seed(_OTHER_SEED)
                return cls.read(device)
            finally:
                present.write()

    def write(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.of_cpu)
        if self.of_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.of_device, *_index(self.device))
        random.setstate(self.of_python)
        np.random.set_state(self.of_numpy)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, GlobalState)
            and torch.equal(self.of_cpu, other.of_cpu)
            and (self.of_device is None or other.of_device is None or torch.equal(self.of_device, other.of_device))
            and self.of_python == other.of_python
            and all(np.array_equal(mine, theirs) for mine, theirs in zip(self.of_numpy, other.of_numpy, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


class Noise:
    """The global random generators in the calls of one function: each call starts from the same state.

    The state of the generators is restored after each call. The first call shows whether the function draws from them
    at all. If not, later calls do not set them. Calls that draw exclude each other in the process, also across threads.

    Args:
        device: Device of the inputs.
        state: State at the start of each call; by default the present state.
    """

    def __init__(self, device: torch.device, state: GlobalState | None = None) -> None:
        with _LOCK:  # another thread may be in a replay
            self.state = GlobalState.read(device) if state is None else state
        self._may_draw = True
        self._has_drawn = False

    @property
    def has_drawn(self) -> bool:
        """Whether a call has drawn from the global generators."""
        return self._has_drawn

    @contextmanager
    def replayed(self) -> Generator[None, None, None]:
        """Run one call of the function in the block."""
        if not self._may_draw:
            yield
            return
        with _LOCK:
            before = GlobalState.read(self.state.device)
            if before != self.state:
                self.state.write()
            try:
                yield
                self._has_drawn |= GlobalState.read(self.state.device) != self.state
                self._may_draw = self._has_drawn or not torch.is_grad_enabled()  # a forward may draw for a gradient
            finally:
                if self._has_drawn or before != self.state or GlobalState.read(self.state.device) != before:
                    before.write()


def state_of(generator: Any) -> Any:
    """Return the state of a generator of torch, Python or NumPy."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    for read in ("getstate", "get_state"):  # of random.Random and of numpy's RandomState
        if hasattr(generator, read):
            return getattr(generator, read)()
    return generator.bit_generator.state


def set_state(generator: Any, state: Any) -> None:
    """Set the state of a generator of torch, Python or NumPy."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
        return
    for write in ("setstate", "set_state"):
        if hasattr(generator, write):
            getattr(generator, write)(state)
            return
    generator.bit_generator.state = state


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """Return the arguments that choose a device among those of its type: there is only one of Apple's."""
    return () if device.type == "mps" else (device,)
