import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import KLPenalty, SpectralPenalty
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


class _WithActivation(nn.BatchNorm1d):
    """As timm's BatchNormAct2d."""

    def forward(self, input):
        return super().forward(input).relu()


def test_a_subclass_runs_the_rest_of_its_forward():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), _WithActivation(5), nn.Linear(5, 3)).train(), torch.randn(8, 6)
    with record(model) as recording:
        expected = model(x)
    with replay(recording):
        assert_close(model(x), expected)
        assert_close(model(x[:3]), expected[:3])
    same = nn.Sequential(model[0], nn.BatchNorm1d(5), nn.ReLU(), model[2]).train()
    assert_close(SpectralPenalty()(model, x), SpectralPenalty()(same, x))


def test_a_batch_norm_called_by_keyword_is_recorded():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(input=x)

    model, x = Named().train(), torch.randn(8, 6)
    with record(model) as recording:
        expected = model(x)
    with replay(recording):
        assert_close(model(x[:3]), expected[:3])


def test_the_statistics_carry_the_gradient_of_mean_and_variance():
    norm, hidden = nn.BatchNorm2d(3).double().train(), torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    with record(norm) as recording:
        norm(hidden)
    ((mean, variance),) = recording[norm]
    first, second = torch.randn(2, 3, dtype=torch.float64)
    expected = hidden.mean((0, 2, 3)) @ first + hidden.var((0, 2, 3), unbiased=False) @ second
    ours = torch.autograd.grad(mean @ first + variance @ second, hidden)
    assert_close(ours, torch.autograd.grad(expected, hidden))


def test_running_statistics_of_instance_norm_do_not_move():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten()).train()
    before = model[1].running_mean.clone()
    KLPenalty()(model, torch.randn(4, 2, 5))
    assert_close(model[1].running_mean, before, rtol=0, atol=0)
    assert model[1].momentum == 0.1
