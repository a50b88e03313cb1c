"""The copy that runs instead of a user's module: what it shares, and what it owns."""

import dataclasses
import functools
import gc
import os
import random
import tempfile
import threading
import weakref

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import Exact, FisherMonitor, FisherRegularizer, KLPenalty, LogitsOf, fisher_spectral_norm
from fisher_reg.evaluation import SharedCopy
from tests import cases

_GLOBAL = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4))


def _copied(model, **options):
    return SharedCopy(model, **({"is_deployed": True} | options)).model


def test_parameters_are_shared_and_all_else_is_its_own():
    model = cases.tiny_network(batch_norm=True).train()
    copied = _copied(model)
    assert type(copied) is type(model)
    assert all(one is other for one, other in zip(model.parameters(), copied.parameters(), strict=True))
    for one, other in zip(model.buffers(), copied.buffers(), strict=True):
        assert one is not other
        assert one.data_ptr() != other.data_ptr()
    assert not any(part.training for part in copied.modules())
    assert all(part.training for part in model.modules())


def test_tied_weights_stay_tied_also_where_they_are_promoted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    model[1].weight = model[0].weight
    copied = _copied(model)
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight.dtype == torch.float32
    copied(torch.randn(2, 4)).sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


class _Full(nn.Module):
    """Holds one of everything."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 4)
        self.again = [self.net]
        self.by_name = {"net": self.net}
        self.method = self.net.forward
        self.part = functools.partial(nn.Module.__call__, self.net)
        self.closure = lambda x: self.net(x)
        self.parent = weakref.ref(self)
        self.lock = threading.Lock()
        self.dtype_inside = torch.float16
        self.generators = (torch.Generator().manual_seed(1), random.Random(1), np.random.default_rng(1))
        self.loop = self
        self.cache = {}


def test_what_holds_a_module_holds_its_copy():
    model = _Full()
    copied = _copied(model)
    assert copied.again[0] is copied.by_name["net"] is copied.net is not model.net
    assert copied.method.__self__ is copied.net
    assert copied.part.args[0] is copied.net
    assert copied.closure.__closure__[0].cell_contents is copied
    assert copied.parent() is copied.loop is copied
    assert copied.cache is not model.cache
    assert copied.lock is model.lock  # it cannot be copied
    assert copied.dtype_inside == torch.float32
    assert all(one is not other for one, other in zip(copied.generators, model.generators, strict=True))
    assert copied.generators[0].initial_seed() == 1


def test_a_function_that_names_a_module_runs_its_copy():
    x = torch.randn(8, 6)
    _GLOBAL.train()
    before = _GLOBAL[1].running_mean.clone()
    expected = fisher_spectral_norm(_GLOBAL, x, solver=Exact()).eigenvalue
    wrapped = LogitsOf(_GLOBAL, lambda module, inputs: _GLOBAL(inputs))  # not by its argument
    assert_close(fisher_spectral_norm(wrapped, x, solver=Exact()).eigenvalue, expected)
    assert_close(_GLOBAL[1].running_mean, before, rtol=0, atol=0)


def _by_a_helper(x):
    return _GLOBAL(x)


def test_a_function_whose_helper_names_a_module_leaves_it_as_it_is():
    _GLOBAL.train()
    before = [buffer.clone() for buffer in _GLOBAL.buffers()]
    KLPenalty()(lambda x: _by_a_helper(x), torch.randn(8, 6))
    assert_close(list(_GLOBAL.buffers()), before, rtol=0, atol=0)


def test_a_forward_that_is_replaced_on_the_instance_runs_the_copied_layers():
    model = cases.tiny_network(batch_norm=True).train()
    expected = fisher_spectral_norm(model, torch.ones(3, 6)).eigenvalue
    inner = list(model)
    model.forward = lambda x: functools.reduce(lambda hidden, layer: layer(hidden), inner, x)
    assert_close(fisher_spectral_norm(model, torch.ones(3, 6)).eigenvalue, expected)
    assert model[1].num_batches_tracked == 0


def test_wrappers_of_one_module_are_taken_off():
    model, x = cases.tiny_network(batch_norm=True), torch.randn(3, 6)
    expected = fisher_spectral_norm(model, x).eigenvalue
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert_close(fisher_spectral_norm(wrapped, x).eigenvalue, expected)
    model.compile(backend="eager")
    assert_close(fisher_spectral_norm(model, x).eigenvalue, expected)


def test_the_trainer_is_shared():
    model = cases.Plain(cases.tiny_network())
    model.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert _copied(model).trainer is model.trainer


def test_lazy_layers_are_refused_before_and_taken_after_their_first_call():
    model, x = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(4)), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"lazy layers.*model\(inputs\)"):
        fisher_spectral_norm(model, x)
    model(x)
    assert (fisher_spectral_norm(model, x).eigenvalue > 0).all()


def test_each_call_finds_the_buffers_and_generators_as_they_were_copied():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x):
            self.count += 1
            return self.count + torch.rand(len(x), generator=self.generator)

    source = SharedCopy(Moving(), is_deployed=False)
    found = []
    for _ in range(2):
        with source.opened():
            found.append(source.model(torch.zeros(3)))
    assert torch.equal(found[0], found[1])
    assert (found[0] >= 1).all()
    assert source.draws


def test_a_frozen_script_gives_the_numbers_of_the_network():
    model, x = cases.tiny_network().eval(), torch.randn(3, 6)
    expected = fisher_spectral_norm(model, x).eigenvalue
    scripted = torch.jit.script(model)
    for one in (scripted, torch.jit.trace(model, x), torch.jit.freeze(torch.jit.script(model))):
        assert_close(fisher_spectral_norm(one, x).eigenvalue, expected)
    penalty = KLPenalty()(scripted, x)
    gradients = torch.autograd.grad(penalty, list(scripted.parameters()))  # which reach the user's own
    assert_close(gradients, torch.autograd.grad(KLPenalty()(model, x), list(model.parameters())))


@dataclasses.dataclass(slots=True)
class _Slots:
    net: nn.Module


class _InSlots(nn.Module):
    def __init__(self):
        super().__init__()
        self.holder = _Slots(nn.Linear(6, 4))
        self.net = self.holder.net

    def forward(self, x):
        return self.holder.net(x)


def test_a_module_in_slots_is_copied_once_and_gets_its_gradient():
    model = _InSlots()
    copied = _copied(model)
    assert copied.holder.net is copied.net is not model.net
    (gradient,) = torch.autograd.grad(KLPenalty()(model, torch.randn(4, 6)), [model.net.weight])
    assert gradient.abs().sum() > 0


class _CleansUp:
    closed = 0

    def __del__(self):
        type(self).closed += 1


def test_what_cleans_up_after_itself_is_shared():
    model = nn.Sequential(nn.Linear(6, 4))
    model.resource = _CleansUp()
    model.file = tempfile.NamedTemporaryFile()  # noqa: SIM115
    fisher_spectral_norm(model, torch.randn(2, 6))
    gc.collect()
    assert _CleansUp.closed == 0
    assert os.path.exists(model.file.name)


_SEEN = {}


class _Recorder:
    def __init__(self):
        self.seen = []

    def hook(self, part, args, output):
        self.seen.append(output)


def test_hooks_write_to_what_the_copy_holds():
    def hook(part, args, output):
        _SEEN["logits"] = output

    model, recorder = nn.Sequential(nn.Linear(6, 4)), _Recorder()
    model[0].register_forward_hook(hook)
    model[0].register_forward_hook(recorder.hook)
    fisher_spectral_norm(model, torch.randn(2, 6))
    KLPenalty()(model, torch.randn(2, 6))
    assert _SEEN == {}
    assert recorder.seen == []


class _Ensemble:
    """No module, and holds some deep inside."""

    def __init__(self, nets):
        self.members = {"nets": nets}

    def __call__(self, x):
        return sum(net(x) for net in self.members["nets"])


def test_a_callable_object_runs_copies_of_the_modules_in_it():
    nets = [cases.tiny_network(batch_norm=True).train() for _ in range(2)]
    ensemble, x = _Ensemble(nets), torch.randn(8, 6)
    for model in (ensemble, ensemble.__call__, functools.partial(ensemble), lambda x: ensemble(x)):
        KLPenalty()(model, x)
    assert all(net[1].num_batches_tracked == 0 for net in nets)


class _Logs(cases.Plain):
    def forward(self, x):
        self.log("calls", 1.0, on_epoch=True, on_step=False, reduce_fx="sum")
        return super().forward(x)


def test_a_measurement_logs_nothing_of_the_module(tmp_path):
    found = []
    for callbacks in ([], [FisherRegularizer(0.1, every_n_steps=1, batch_fraction=1.0), FisherMonitor(bounds=())]):
        trainer = cases.trainer(tmp_path, callbacks=callbacks)
        trainer.fit(_Logs(cases.tiny_network()), cases.tiny_batches(), cases.tiny_batches())
        found.append(trainer.callback_metrics["calls"].item())
    assert found[0] == found[1] > 0


def test_each_call_finds_the_attributes_as_they_were_copied():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = nn.Linear(6, 4), None

        def forward(self, x):
            hidden = self.net(x) + (0 if self.last is None else self.last)
            self.last = hidden.detach()
            return hidden

    model, x = Remembers(), torch.randn(4, 6)
    assert_close(KLPenalty(step=1e-2)(model, x), KLPenalty(step=1e-2)(model.net, x))
    assert model.last is None


def test_a_penalty_of_the_users_finds_the_names_of_the_model(tmp_path):
    names = []

    def penalty(model, inputs, generator=None):
        names.append(sorted(dict(model.named_parameters())))
        return dict(model.named_parameters())["network.0.weight"].square().sum() + model(inputs).square().mean()

    module = cases.Plain(cases.tiny_network())
    cases.trainer(tmp_path, callbacks=[FisherRegularizer(0.1, penalty)]).fit(module, cases.tiny_batches())
    assert names[0] == sorted(dict(module.named_parameters()))


def test_modules_with_slots_are_copied():
    class Slotted(nn.Linear):
        __slots__ = ("scale",)

    model = Slotted(6, 4)
    model.scale = 2.0
    assert _copied(model).scale == 2.0
