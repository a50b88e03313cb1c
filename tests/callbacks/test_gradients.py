"""The gradient of a penalty: the loss gets it as it is, shortened, or not at all."""

import copy
import gc

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fisher_reg import FisherRegularizer, KLPenalty, SpectralPenalty
from fisher_reg.callbacks.gradients import Cut, SeparateGradient
from tests import cases

_KL = KLPenalty(step=0.3)
_CE = nn.functional.cross_entropy
_RATIO = "fisher/penalty_gradient_ratio"


def _regularizer(weight=0.7, penalty=_KL, **options):
    return FisherRegularizer(weight, penalty, **({"every_n_steps": 1, "batch_fraction": 1.0} | options))


def _module(batch_norm=False, module_type=cases.Plain):
    torch.manual_seed(1)
    return module_type(cases.tiny_network(batch_norm))


def _fit(folder, module, regularizer, batches=None, **options):
    trainer = cases.trainer(folder, callbacks=[regularizer], **options)
    trainer.fit(module, batches or cases.tiny_batches())
    return trainer


def _gradients(network, x, y, penalty=_KL):
    parameters = list(network.parameters())
    of_loss = torch.autograd.grad(_CE(network(x), y), parameters)
    of_penalty = torch.autograd.grad(penalty(network, x), parameters, allow_unused=True)
    of_penalty = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, of_penalty, strict=True)]
    return [torch.cat([one.flatten() for one in some]) for some in (of_loss, of_penalty)]


# KLPenalty with small batches


def _deep_batch_norm(width=16, depth=8):
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())]
    return nn.Sequential(nn.Linear(6, width), *layers, nn.Linear(width, 4))


def test_batch_norm_over_few_values_does_not_let_the_gradient_explode():
    torch.manual_seed(0)
    network, x, y = _deep_batch_norm(), torch.randn(4, 6), torch.arange(4)
    of_loss, of_penalty = _gradients(network, x, y, KLPenalty())
    assert of_penalty.norm() < 10 * of_loss.norm()  # 1.6 times; 328 times where the values may leave their range


# The ratio


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("penalty", [_KL, SpectralPenalty()])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_ratio_is_that_of_the_norms(tmp_path, batch_norm, penalty, precision):
    options = {"limit_train_batches": 1, "precision": precision}
    begin, alone, penalised = (_module(batch_norm) for _ in range(3))
    cases.trainer(tmp_path, **options).fit(alone, cases.tiny_batches())
    trainer = _fit(tmp_path, penalised, _regularizer(penalty=penalty), **options)
    flat = [nn.utils.parameters_to_vector(module.parameters()).detach() for module in (begin, alone, penalised)]
    expected = (flat[1] - flat[2]).norm() / (flat[0] - flat[1]).norm()
    rounding = 1e-3 if precision == "32-true" else 2**-7  # of bfloat16, otherwise in another order
    assert_close(trainer.callback_metrics[_RATIO], expected, rtol=rounding, atol=0)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_measuring_the_ratio_changes_nothing(tmp_path, batch_norm, options):
    states = []
    for every in (None, 1):
        module = _module(batch_norm)
        trainer = _fit(tmp_path, module, _regularizer(gradient_ratio_every=every), **options)
        states.append(module.state_dict())
        assert (_RATIO in trainer.callback_metrics) == (every == 1)
    assert_close(states[1], states[0], rtol=0, atol=0)


def test_the_ratio_is_measured_at_the_first_penalised_step_and_then_rarely(tmp_path, monkeypatch):
    regularizer, measured = _regularizer(every_n_steps=2, gradient_ratio_every=3), []
    original = type(regularizer.guard).ratio

    def ratio(guard, module, *args):
        measured.append(module.trainer.global_step)
        return original(guard, module, *args)

    monkeypatch.setattr(type(regularizer.guard), "ratio", ratio)
    _fit(tmp_path, _module(), regularizer, cases.tiny_batches(count=80))
    assert measured == [0, 6, 12, 18]


def test_measuring_leaves_the_statistics_of_checkpointed_batch_norm(tmp_path):
    class Checkpointed(cases.Plain):
        def forward(self, x):
            return checkpoint(self.network, x, use_reentrant=False)

    states = []
    for every in (None, 1):
        module = _module(True, Checkpointed)
        _fit(tmp_path, module, _regularizer(gradient_ratio_every=every))
        states.append(module.state_dict())
    assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_gradient_that_dwarfs_that_of_the_loss_is_told_once_with_the_remedies(tmp_path):
    with pytest.warns(UserWarning, match="times that of the loss.*warmup_steps.*max_gradient_ratio.*GroupNorm") as told:
        _fit(tmp_path, _module(), _regularizer(1e5, gradient_ratio_every=1), max_epochs=2)
    assert sum("times that of the loss" in str(one.message) for one in told) == 1


# The limit


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_limit_shortens_the_gradient_of_the_penalty(tmp_path, batch_norm):
    module, (x, y) = _module(batch_norm), next(iter(cases.tiny_batches()))
    before = copy.deepcopy(module.network).train()
    of_loss, _ = _gradients(before, x, y)
    _fit(tmp_path, module, _regularizer(1e3, max_gradient_ratio=0.5), limit_train_batches=1)
    steps = [one - two for one, two in zip(before.parameters(), module.network.parameters(), strict=True)]
    added = torch.cat([one.flatten().detach() for one in steps]) / 0.1 - of_loss
    assert_close(added.norm(), 0.5 * of_loss.norm(), rtol=1e-3, atol=0)


def test_a_limit_that_is_not_reached_changes_nothing(tmp_path):
    states = []
    for limit in (None, 1e6):
        module = _module(True)
        _fit(tmp_path, module, _regularizer(max_gradient_ratio=limit))
        states.append(module.state_dict())
    assert_close(states[1], states[0], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "value"), [("max_gradient_ratio", 0.0), ("gradient_ratio_every", 0)])
def test_limits_are_positive(name, value):
    with pytest.raises(ValueError, match=f"needs .*{name} >.*got {value}"):
        FisherRegularizer(**{name: value})


# Gradients that are not finite


class _Root:
    """A finite value whose gradient is infinite at some of its calls."""

    def __init__(self, calls):
        self.calls, self.count = calls, 0

    def __call__(self, model, inputs, *, generator=None):
        self.count += 1
        penalty = _KL(model, inputs)
        return penalty + (penalty - penalty.detach()).sqrt() if self.count in self.calls else penalty


def _by_hand(module, batches, skipped):
    expected = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for index, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss = _CE(expected(x), y)
        (loss if index in skipped else loss + 0.7 * _KL(expected.network, x)).backward()
        optimizer.step()
    return expected


def test_a_finite_penalty_whose_gradient_is_not_is_left_out_and_counted(tmp_path):
    module, batches = _module(), cases.tiny_batches(count=16)
    expected = _by_hand(module, batches, skipped={0, 2})
    regularizer = _regularizer(penalty=_Root({1, 3}))
    with pytest.warns(UserWarning, match=r"1 so far.*The penalty is .*, but its gradient is not finite"):
        trainer = _fit(tmp_path, module, regularizer, batches)
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
    assert regularizer.num_skipped == trainer.callback_metrics["fisher/penalty_skipped"] == 2


@pytest.mark.parametrize("penalty", [_KL, SpectralPenalty()])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_gradient_taken_by_itself_is_that_of_the_whole(tmp_path, penalty, batch_norm):
    # a hook on a weight keeps the gradients together
    states = []
    for has_hook in (True, False):
        module = _module(batch_norm)
        if has_hook:
            module.network[0].weight.register_hook(lambda gradient: gradient)
        _fit(tmp_path, module, _regularizer(penalty=penalty))
        states.append(module.state_dict())
    assert_close(states[1], states[0], rtol=1e-5, atol=1e-6)


def test_a_hook_that_changes_a_gradient_sees_the_sum_once(tmp_path):
    module = _module()
    expected = copy.deepcopy(module)
    module.network[0].weight.register_hook(lambda gradient: -gradient)
    x, y = next(iter(cases.tiny_batches()))
    (_CE(expected(x), y) + 0.7 * _KL(expected.network, x)).backward()
    weight = expected.network[0].weight
    with pytest.warns(UserWarning, match="max_gradient_ratio has no effect on Plain: a hook"):
        _fit(tmp_path, module, _regularizer(max_gradient_ratio=1.0), limit_train_batches=1)
    assert_close(module.network[0].weight, weight + 0.1 * weight.grad, rtol=1e-5, atol=1e-6)


class _LiveTensors(pl.Callback):
    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in (20, 200):
            gc.collect()
            self.counts.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))


def test_penalised_steps_leave_no_tensors_behind(tmp_path):
    watch, batch = _LiveTensors(), next(iter(cases.tiny_batches()))
    regularizer = _regularizer(1e-3, gradient_ratio_every=7)
    trainer = cases.trainer(tmp_path, callbacks=[regularizer, watch], max_steps=200)
    trainer.fit(_module(True), DataLoader([batch] * 200, batch_size=None))
    assert watch.counts[1] <= watch.counts[0]


def test_a_resumed_training_measures_at_the_steps_of_the_undisturbed_one(tmp_path):
    def fit(max_epochs, ckpt_path=None):
        torch.manual_seed(1)
        module, regularizer = cases.Plain(cases.tiny_network()), FisherRegularizer(every_n_steps=1, batch_fraction=1.0)
        trainer = cases.trainer(tmp_path, callbacks=[regularizer], max_epochs=max_epochs)
        trainer.fit(module, cases.tiny_batches(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
        return regularizer.guard.num_penalised

    assert fit(2) == 4
    assert fit(3, tmp_path / "2.ckpt") == 6


@pytest.mark.parametrize("direct", [None, "sparse", "dense"])
def test_a_sparse_gradient_goes_through_the_step(direct):
    embedding = nn.Embedding(4, 3, sparse=True)
    indices = torch.tensor([0, 1, 1])
    terms = {None: lambda: 0.0, "sparse": lambda: embedding(indices).sum(), "dense": lambda: embedding.weight.sum()}
    cut = Cut([embedding.weight], None)
    leaf = cut.leaf(embedding(indices))
    (found,) = SeparateGradient.take(leaf.square().sum() + terms[direct](), cut).at_parameters(cut, 8.0)
    (embedding(indices).square().sum() + terms[direct]()).backward()
    assert_close(found.to_dense(), embedding.weight.grad.to_dense())
