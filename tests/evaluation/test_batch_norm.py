"""Batch norm in training: the function that is being trained, made per-example."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fisher_reg import BoundPenalty, KLPenalty, SpectralPenalty, fisher_bound, fisher_spectral_norm
from fisher_reg.evaluation import trained
from fisher_reg.evaluation.batch_norm import running_rules
from fisher_reg.evaluation.rules import Rules
from tests import cases


class _Functional(nn.Module):
    """What many repositories have instead of a module of torch."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.mean, self.variance, training=self.training)


class _Builtin(_Functional):
    def forward(self, x):
        return torch.batch_norm(x, None, None, self.mean, self.variance, self.training, 0.1, 1e-5, False)


class _Computed(nn.BatchNorm1d):
    """As networks whose scale is one plus a parameter."""

    def forward(self, x):
        mean, variance = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, mean, variance, 1 + 0.5 * self.weight, self.bias, self.training)


class _WithActivation(nn.BatchNorm1d):
    """As timm's BatchNormAct2d."""

    def forward(self, input):
        return super().forward(input).relu()


class _Named(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(input=x)


_NORMS = {
    "module": lambda: nn.BatchNorm1d(5),
    "without affine": lambda: nn.BatchNorm1d(5, affine=False),
    "without running statistics": lambda: nn.BatchNorm1d(5, affine=False, track_running_stats=False),
    "functional": lambda: _Functional(5),
    "builtin": lambda: _Builtin(5),
    "subclass": lambda: _WithActivation(5),
    "by keyword": lambda: _Named(5),
    "computed weight": lambda: _Computed(5),
    "synchronised, in one process": lambda: nn.SyncBatchNorm(5),
}


def _model(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), _NORMS[name](), nn.Tanh(), nn.Linear(5, 4)).train()


@pytest.mark.parametrize("name", _NORMS)
def test_the_trained_function_is_that_of_the_module_and_per_example(name):
    model, x = _model(name), torch.randn(8, 6)
    function = trained(model, x)
    got, part = function(x), function(x[:3])
    buffers = [buffer.clone() for buffer in model.buffers()]
    assert_close(buffers, list(_model(name).buffers()), rtol=0, atol=0)
    expected = model(x)
    assert_close(got, expected)
    assert_close(part, expected[:3])


def test_images_are_normalised_by_channel():
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).train(), torch.randn(4, 2, 5, 5)
    function = trained(model, x)
    assert_close([function(x), function(x[:1])], [model(x), model(x)[:1]])


def test_a_batch_norm_used_twice_has_the_statistics_of_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(5 * self.norm(x) ** 2 + 1)

    model, x = Twice().train(), torch.randn(8, 6)
    function = trained(model, x)
    assert_close([function(x), function(x), function(x[:2])], [model(x), model(x), model(x)[:2]])
    with pytest.raises(ValueError, match="called 2 times and has no unique scale"):
        BoundPenalty()(model, x)


@pytest.mark.parametrize("name", ["functional", "builtin"])
def test_penalties_of_functional_batch_norm_are_those_of_the_module(name):
    same, model, x = _model("module"), _model(name), torch.randn(8, 6)
    for penalty in (KLPenalty(), SpectralPenalty(), SpectralPenalty(3)):
        values = [penalty(one, x) for one in (same, model)]
        assert_close(values[1], values[0])
        gradients = [
            torch.autograd.grad(value, [one[0].weight, one[3].weight])
            for value, one in zip(values, (same, model), strict=True)
        ]
        assert_close(gradients[1], gradients[0])


def test_a_subclass_runs_the_rest_of_its_forward():
    model, x = _model("subclass"), torch.randn(8, 6)
    same = nn.Sequential(model[0], nn.BatchNorm1d(5), nn.ReLU(), model[2], model[3]).train()
    assert_close(SpectralPenalty()(model, x), SpectralPenalty()(same, x))


def test_the_statistics_carry_the_gradient_of_mean_and_variance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).double().train()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    recording = trained(model, x).record(x)
    mean, variance, _ = recording.of(model[1].weight, model[1].running_mean, id)
    first, second = torch.randn(2, 3, dtype=torch.float64)
    hidden = model[0](x)
    expected = hidden.mean((0, 2, 3)) @ first + hidden.var((0, 2, 3), unbiased=False) @ second
    ours = torch.autograd.grad(mean @ first + variance @ second, model[0].weight)
    assert_close(ours, torch.autograd.grad(expected, model[0].weight))


def test_the_bound_penalty_has_the_scale_of_the_batch():
    model, x = _model("module"), torch.randn(8, 6)
    hidden = model[0](x)
    same = _model("module").eval()
    same[1].running_mean.copy_(hidden.mean(0).detach())
    same[1].running_var.copy_(hidden.var(0, unbiased=False).detach())
    same.load_state_dict({**model.state_dict(), **{k: v for k, v in same.state_dict().items() if "running" in k}})
    value = BoundPenalty()(model, x)
    unbalanced = BoundPenalty()(same, x)
    assert_close(value, unbalanced)
    assert value.exp() >= fisher_bound(same, x).value * (1 - 1e-6)
    (slope,) = torch.autograd.grad(value, model[0].weight)
    assert abs((slope * model[0].weight).sum()) < 1e-2  # a weight that is rescaled anyway brings nothing by shrinking


class _Calls:
    """Is no container: a hook of the copy has a list of its own where it names or holds one."""

    def __init__(self):
        self.sizes = []


_CALLS = _Calls()


def test_no_forward_is_added_without_batch_norm_in_training():
    model = cases.tiny_network(batch_norm=True).eval()
    model.register_forward_pre_hook(lambda part, args: _CALLS.sizes.append(len(args[0])))
    KLPenalty()(model, torch.randn(8, 6))
    assert _CALLS.sizes == [8, 8]
    _CALLS.sizes.clear()
    KLPenalty()(model.train(), torch.randn(8, 6))
    assert _CALLS.sizes == [8, 8, 8]  # one more for the statistics


def test_checkpointed_batch_norm_gives_the_same_gradient():
    class Checkpointed(nn.Module):
        def __init__(self, network, on):
            super().__init__()
            self.network, self.on = network, on

        def forward(self, x):
            return checkpoint(self.network, x, use_reentrant=False) if self.on else self.network(x)

    x = torch.randn(8, 6)
    for penalty in (KLPenalty(), SpectralPenalty(), SpectralPenalty(2)):
        found = []
        for on in (False, True):
            model = Checkpointed(_model("module"), on)
            penalty(model, x).backward()
            found.append([parameter.grad for parameter in model.parameters()])
        assert_close(found[1], found[0])


def test_synchronised_batch_norm_is_refused_in_a_process_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="SyncBatchNorm.*GroupNorm"):
        KLPenalty()(_model("synchronised, in one process"), torch.randn(8, 6))


def test_batch_norm_inside_a_script_is_refused_in_training_only():
    scripted, x = torch.jit.script(_model("module")), torch.randn(8, 6)
    with pytest.raises(ValueError, match="BatchNorm1d constant in a TorchScript module.*model.eval"):
        KLPenalty()(scripted, x)
    expected = KLPenalty()(_model("module").eval(), x)
    assert_close(KLPenalty()(scripted.eval(), x), expected)


def test_a_batch_norm_that_always_couples_the_batch_is_refused_by_estimates():
    class Coupled(nn.Module):
        def forward(self, x):
            return nn.functional.batch_norm(x, None, None, training=True)

    with pytest.raises(ValueError, match="A batch norm over 6 channels.*whole batch"):
        fisher_spectral_norm(Coupled().eval(), torch.randn(8, 6))


def test_the_scale_of_a_deployed_batch_norm_follows_its_statistics_and_weights():
    norm, x = nn.BatchNorm1d(5).eval(), torch.randn(4, 5)
    with Rules(running_rules()):
        for change in (lambda: norm.running_mean.add_(1), lambda: norm.running_var.mul_(3), lambda: norm.eval()):
            change()
            with torch.no_grad():
                norm.weight.mul_(1.5)
            assert_close(norm(x), torch.nn.functional.batch_norm(x.double(), *_statistics(norm)).float())
        norm.running_var = norm.running_var * 2  # another tensor
        assert_close(norm(x), torch.nn.functional.batch_norm(x.double(), *_statistics(norm)).float())


def _statistics(norm):
    return (t.detach().double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))


def test_the_scale_of_a_deployed_batch_norm_is_computed_once_for_all_calls():
    norm, x = nn.BatchNorm1d(5).eval(), torch.randn(4, 5)
    rules = running_rules()
    counts = []
    for _ in range(2):
        with _Roots() as roots, Rules(rules):
            norm(x)
        counts.append(roots.count)
    assert counts == [1, 0]


class _Roots(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.rsqrt.default
        return function(*args, **(kwargs or {}))
