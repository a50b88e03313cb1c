"""A copy of a model whose state is restored before each call."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisher_reg.evaluation.copying import Copier
from fisher_reg.evaluation.inputs import LogitsFunction
from fisher_reg.evaluation.noise import set_state, state_of


class SharedCopy:
    """A copy of a model that shares its parameters; each call starts from the state in which it was copied.

    Args:
        model: The model, a module or any callable.
        is_deployed: Whether the copy is in evaluation mode; otherwise it keeps the modes of the model.
        dtype: As in :class:`Copier`.
        has_constant_weights: As there.

    Attributes:
        model: The copy.
        modules: Pairs of a module and its copy.
        is_promoted: Whether the weights have no half precision; weights that a function uses are not checked.
        draws: Whether a call has drawn from a random generator that the model holds.
    """

    def __init__(
        self,
        model: LogitsFunction,
        is_deployed: bool,
        dtype: torch.dtype | None = None,
        has_constant_weights: bool = False,
    ) -> None:
        copier = Copier(dtype, has_constant_weights)
        with _versioned():
            self.model: Any = copier.root(model)
        self.modules = copier.modules
        self.is_promoted = isinstance(self.model, nn.Module) or copier.promoted
        self.draws = False
        self._origins = copier.origins()
        self._generators = [(generator, state_of(generator)) for generator in copier.generators]
        with _versioned():
            self._buffers = [
                _Buffer(part._buffers, name, buffer, self.identity_of(buffer))
                for _, part in copier.modules
                for name, buffer in part._buffers.items()
                if buffer is not None
            ]
        self._lock = threading.RLock()
        if is_deployed and isinstance(self.model, nn.Module):
            for part in self.model.modules():
                if hasattr(part, "training"):  # a frozen TorchScript module has none
                    part.training = False
        plain = [part for _, part in copier.modules if not isinstance(part, torch.jit.ScriptModule)]
        self._states = [(vars(part), dict(vars(part))) for part in plain]

    def identity_of(self, tensor: Tensor) -> int:
        """Return the identity of the original of ``tensor``; its own if it is not a copy."""
        return self._origins.get(id(tensor), id(tensor))

    @contextmanager
    def opened(self) -> Generator[None, None, None]:
        """Restore the attributes, the buffers and the generators to their copied states for the block."""
        with self._lock:
            for state, kept in self._states:
                state.clear()
                state.update(kept)
            for buffer in self._buffers:
                if buffer.has_changed:
                    self._origins[id(buffer.renewed())] = buffer.identity
            for generator, state in self._generators:
                set_state(generator, state)
            before = [pickle.dumps(state_of(generator)) for generator, _ in self._generators]
            yield
            after = [pickle.dumps(state_of(generator)) for generator, _ in self._generators]
            self.draws = self.draws or after != before

    @contextmanager
    def with_other_noise(self) -> Generator[None, None, None]:
        """Give the generators other states for the block."""
        kept = self._generators
        for number, (generator, _) in enumerate(kept):
            _draw_from(generator, 1 + number)
        self._generators = [(generator, state_of(generator)) for generator, _ in kept]
        try:
            yield
        finally:
            self._generators = kept


class _Buffer:
    """A buffer of a copy, and its value at the beginning of each call."""

    def __init__(self, slots: Any, name: str, tensor: Tensor, identity: int) -> None:
        self.slots = slots
        self.name = name
        self.identity = identity
        self.kept = tensor.detach().clone() if tensor.grad_fn is None else tensor
        self.tensor, self.version = tensor, tensor._version

    @property
    def has_changed(self) -> bool:
        """Whether a call has written to it or replaced it."""
        return self.slots[self.name] is not self.tensor or self.tensor._version != self.version

    def renewed(self) -> Tensor:
        """Replace it by a new tensor: an in-place change would modify tensors that a graph has saved."""
        with _versioned():
            self.tensor = self.slots[self.name] = self.kept.clone()
        self.version = self.tensor._version
        return self.tensor


@contextmanager
def _versioned() -> Generator[None, None, None]:
    """Create tensors with version counters, which tensors of inference mode lack; the grad mode is kept."""
    is_enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(is_enabled):
        yield


def _draw_from(generator: Any, count: int) -> None:
    for _ in range(count):
        if isinstance(generator, torch.Generator):
            torch.rand((), generator=generator, device=generator.device)
        else:
            generator.random()
