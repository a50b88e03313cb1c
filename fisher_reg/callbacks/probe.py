"""The examples that a monitor measures: collected once, identified by their positions in the validation data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DistributedSampler

from fisher_reg.evaluation import SideInputs, select


@dataclass(frozen=True)
class Part:
    """Some examples of a probe, all of one shape.

    Attributes:
        inputs: ``(B, *S)``.
        side_inputs: More arguments of the model.
        places: ``(B,)``, integers: the positions of the examples in the validation data, over all processes.
    """

    inputs: Tensor
    side_inputs: SideInputs
    places: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, index: slice) -> Part:
        """Return the examples at ``index``."""
        return Part(self.inputs[index], select(self.side_inputs, index, len(self)), self.places[index])


@dataclass(frozen=True)
class Share:
    """The positions in the data of the examples of this process.

    Attributes:
        rank: The rank of this process.
        num_processes: Number of processes; the j-th example of process r has the position ``r + j * num_processes``, as
            distributed by :class:`torch.utils.data.DistributedSampler`.
        end: Positions from this one on are repetitions, which the sampler adds so that all processes get the same
            number of examples; infinite if not known.
        deals_batches: Whether the sampler distributes whole batches, as for ``DataLoader(batch_size=None)``; the
            examples of a batch then have consecutive positions.
    """

    rank: int = 0
    num_processes: int = 1
    end: float = math.inf
    deals_batches: bool = False

    @classmethod
    def of(cls, rank: int, num_processes: int, loaders: Any) -> Share:
        """Return the share of this process of the first loader."""
        loader = _first(loaders)
        sampler = _sampler(loader)
        if not isinstance(sampler, DistributedSampler):
            return cls(rank, num_processes)
        deals_batches = getattr(loader, "batch_sampler", None) is None
        end = len(sampler.dataset) * (_LARGEST_BATCH if deals_batches else 1)  # type: ignore[arg-type]
        # the sampler's own numbers: processes that share one model get the same examples
        return cls(sampler.rank, sampler.num_replicas, end, deals_batches)

    def places(self, batch: int, begin: int, count: int) -> Tensor:
        """Return the positions of ``count`` examples of a batch, after the first ``begin`` examples of this process."""
        if self.deals_batches:
            return (self.rank + self.num_processes * batch) * _LARGEST_BATCH + torch.arange(count)
        return self.rank + self.num_processes * torch.arange(begin, begin + count)


class Probe:
    """The first examples of the data, in their batches.

    Args:
        num_samples: Number of examples over all processes; None for all.
    """

    def __init__(self, num_samples: int | None) -> None:
        self.num_samples = num_samples
        self.parts: list[Part] = []
        self.is_complete = False
        self.share = Share()

    @classmethod
    def of(cls, inputs: Tensor, side_inputs: SideInputs, share: Share) -> Probe:
        """Return the share of this process of inputs that are equal on all processes."""
        probe = cls(None)
        whole = Part(inputs, side_inputs, torch.arange(len(inputs)))
        mine = whole.part(slice(share.rank, None, share.num_processes))
        probe.parts = [mine] if len(mine) else []
        probe.is_complete = True
        return probe

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def add(self, inputs: Tensor, side_inputs: SideInputs, takes_parts: bool) -> None:
        """Copy the examples of a batch that the probe still needs.

        Args:
            inputs: ``(B, *S)``.
            side_inputs: More arguments of the model.
            takes_parts: Whether the model takes a part of a batch; else the whole batch is copied, and the surplus is
                not counted.
        """
        begin = sum(len(part) for part in self.parts)
        missing = self._missing(begin)
        if self.is_complete or missing <= 0:
            return
        with torch.inference_mode(False):
            whole = Part(inputs, side_inputs, self.share.places(len(self.parts), begin, len(inputs)))
            # where whole batches are distributed, a part of one would leave a gap before those of other processes
            may_cut = takes_parts and not self.share.deals_batches
            chosen = whole.part(slice(int(min(missing, len(whole))))) if may_cut else whole
            taken, taken_beside = own((chosen.inputs, chosen.side_inputs))
            self.parts.append(Part(taken, taken_beside, chosen.places))

    def _missing(self, have: int) -> float:
        if self.num_samples is None:
            return math.inf
        return math.ceil(self.num_samples / self.share.num_processes) - have


def own(tensors: Any) -> Any:
    """Return copies on the CPU, independent of later changes of the originals."""
    return apply_to_collection(tensors, Tensor, lambda tensor: tensor.detach().cpu().clone())


def _first(loaders: Any) -> Any:
    """Return the first loader of a list or mapping of loaders."""
    while isinstance(loaders, list | tuple | Mapping) and len(loaders):
        loaders = next(iter(_values(loaders)))
    return loaders


def _values(loaders: Any) -> Iterator[Any]:
    return iter(loaders.values() if isinstance(loaders, Mapping) else loaders)


def _sampler(loader: Any) -> Any:
    """Return the sampler of the examples, also that inside a batch sampler."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        return sampler
    return getattr(getattr(loader, "batch_sampler", None), "sampler", sampler)


_LARGEST_BATCH = 2**32
