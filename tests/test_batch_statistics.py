import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg.batch_statistics import frozen, record, replay, training_batch_norms
from tests import cases


def test_replay_gives_the_recorded_function():
    model, x = cases.tiny_network(batch_norm=True).train(), torch.randn(8, 6)
    with record(model) as recording:
        expected = model(x)
    with replay(recording):
        assert_close(model(x), expected)
        assert_close(model(x[:3]), expected[:3])  # per example now


def test_replay_works_on_images_and_without_affine_parameters():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False)).train()
    x = torch.randn(4, 2, 5, 5)
    with record(model) as recording:
        expected = model(x)
    with replay(recording):
        assert_close(model(x), expected)


def test_a_batch_norm_used_twice_replays_each_call_with_its_own_statistics():
    norm = nn.BatchNorm1d(6).train()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(5 * self.norm(x) ** 2 + 1)

    model, x = Twice(), torch.randn(8, 6)
    with record(model) as recording:
        expected = model(x)
    with replay(recording):
        assert_close(model(x), expected)
        assert_close(model(x), expected)


def test_everything_comes_back_after_an_exception():
    model, x = cases.tiny_network(batch_norm=True).train(), torch.randn(8, 6)

    def leave_early():
        with frozen(model, model, x):
            assert not model[1].training
            raise KeyError("early")

    with pytest.raises(KeyError, match="early"):
        leave_early()
    assert model[1].training
    assert model[1].track_running_stats
    assert "forward" not in vars(model[1])
    own = model[1].forward = lambda hidden: 2 * hidden
    with record(model) as recording:
        model(x)
    with replay(recording):
        assert model[1].forward is not own
    assert model[1].forward is own
    assert not model[1]._forward_pre_hooks
    assert model[1].num_batches_tracked == 0


def test_nothing_is_run_without_training_batch_norm():
    def function(x):
        raise AssertionError("called")

    with frozen(cases.tiny_network(batch_norm=True).eval(), function, torch.randn(8, 6)):
        pass


def test_synchronised_batch_norm_is_refused_in_a_process_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="SyncBatchNorm.*GroupNorm"):
        training_batch_norms(nn.SyncBatchNorm(3).train())
