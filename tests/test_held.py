"""What is kept of many examples are numbers per example: nothing that grows with the size of an input."""

import pytest
import torch
from torch import nn

from fisher_reg import Categorical, Exact, FisherSpectralNorm, FisherTrace
from fisher_reg.callbacks.measuring import NUM_PICTURES, Subject, exchange, measure_probe
from fisher_reg.callbacks.probe import Part
from fisher_reg.geometry import L2

NUM_EXAMPLES, BATCH, SHAPE = 50_000, 2_000, (3, 6, 6)
BYTES_OF_AN_INPUT = 4 * 3 * 6 * 6


class Parts:
    """50,000 images, made anew whenever they are asked for: they stay in memory only where somebody holds them."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for begin in range(0, NUM_EXAMPLES, BATCH):
            inputs = torch.randn(BATCH, *SHAPE, generator=generator)
            yield Part(inputs, None, torch.arange(begin, begin + BATCH))


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 3))


def _held_bytes(root):
    """Return the bytes of the storages of all tensors that can be reached from an object's attributes."""
    storages, seen, waiting = {}, set(), [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
        waiting += getattr(value, "__dict__", {}).values()
    return sum(storages.values())


@pytest.mark.parametrize("kind", [FisherSpectralNorm, FisherTrace])
def test_a_metric_keeps_one_number_per_example(kind):
    metric, network = kind(), _network()
    for part in Parts():
        metric.update(network, part.inputs)
    assert 4 * NUM_EXAMPLES <= _held_bytes(metric) < 4 * NUM_EXAMPLES + 1000
    metric.compute()
    assert _held_bytes(metric) < 2 * 4 * NUM_EXAMPLES


def test_a_monitor_keeps_numbers_per_example_and_eight_pictures():
    subject = Subject(_network(), Parts(), torch.device("cpu"), True, True, Exact(), Categorical(), None, L2())
    values = measure_probe(subject)
    assert len(values.pictures) == NUM_PICTURES
    numbers = 8 * NUM_EXAMPLES * (1 + len(subject.columns))
    pictures = 2 * NUM_PICTURES * BYTES_OF_AN_INPUT
    assert numbers + pictures <= _held_bytes(values) < numbers + pictures + 1000
    assert _held_bytes(exchange(values, float("inf"), None)) < numbers + pictures + 1000
