"""What the monitor measures on stays what it was, and one bad example of it costs one example."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fisher_reg import FisherMonitor
from fisher_reg.callbacks.measuring import Values, exchange
from fisher_reg.callbacks.probe import Probe, Share
from tests import cases


def _x(count=8):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(5))


class _Refuses(cases.Plain):
    """Cannot take values above 50."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))

    def forward(self, x):
        if x.detach().amax() > 50:
            raise ValueError("a value above 50")
        return super().forward(x)

    def validation_step(self, batch, batch_idx):
        pass


def _fit(folder, monitor, val):
    loader = DataLoader(TensorDataset(val, torch.zeros(len(val))), batch_size=4)
    cases.trainer(folder, callbacks=[monitor]).fit(_Refuses(), cases.tiny_batches(), loader)
    return monitor.history[-1]


@pytest.mark.parametrize("place", [0, 1, 3, 7])
@pytest.mark.parametrize("is_given", [True, False])
def test_an_example_that_fails_costs_that_example_wherever_it_is(tmp_path, place, is_given):
    x = _x()
    x[place] = 99
    monitor = FisherMonitor(probe=x if is_given else None, bounds=())
    with pytest.warns(UserWarning, match="leaves out 1 of the 8 examples"):
        mine = _fit(tmp_path, monitor, _x() if is_given else x)
    rest = FisherMonitor(probe=x[x[:, 0] < 50], bounds=())
    assert_close(mine["fisher/lambda_max_mean"], _fit(tmp_path, rest, _x())["fisher/lambda_max_mean"])


def test_a_probe_that_was_given_is_a_copy(tmp_path):
    x = _x()
    monitor = FisherMonitor(probe=x, bounds=())
    x.zero_()
    expected = _fit(tmp_path, FisherMonitor(probe=_x(), bounds=()), _x())
    assert_close(_fit(tmp_path, monitor, _x())["fisher/lambda_max_mean"], expected["fisher/lambda_max_mean"])


def _taken(num_samples, num_processes, batches, batch_size):
    """Return the first entries of the examples that count, in the order of their places."""
    firsts, places = [], []
    for rank in range(num_processes):
        sampler = DistributedSampler(batches, num_processes, rank, shuffle=False)
        loader = DataLoader(batches, batch_size=batch_size, sampler=sampler)
        probe = Probe(num_samples)
        probe.share = Share.of(rank, num_processes, loader)
        for batch in loader:
            probe.add(batch, None, takes_parts=True)
        firsts += [part.inputs[:, 0] for part in probe]
        places += [part.places for part in probe]
    together = Values(torch.cat(places), {"eigenvalue": torch.cat(firsts)})
    return exchange(together, probe.share.end, num_samples).column("eigenvalue").tolist()


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("num_samples", [1, 3, 5, 10, None])
def test_the_first_examples_count_once_also_where_whole_batches_are_dealt_out(num_processes, num_samples):
    x = torch.arange(10.0)[:, None]
    expected = list(range(10))[:num_samples]
    assert _taken(num_samples, num_processes, list(x.split(2)), None) == expected
    assert _taken(num_samples, num_processes, x, 2) == expected


def test_the_keys_of_a_second_monitor_are_not_those_of_one_that_is_called_so(tmp_path):
    monitors = [FisherMonitor(num_samples=n, prefix=p, bounds=()) for n, p in enumerate(["a", "a", "a_2", "a"], 1)]
    trainer = cases.trainer(tmp_path, callbacks=monitors)
    trainer.fit(_Refuses(), cases.tiny_batches(), cases.tiny_batches())
    for monitor, prefix in zip(monitors, ["a", "a_3", "a_2", "a_4"], strict=True):
        mine = monitor.history[-1][f"{prefix}/lambda_max_mean"]
        assert float(trainer.callback_metrics[f"{prefix}/lambda_max_mean"]) == mine
