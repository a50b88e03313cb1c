"""Every feature of the Trainer: what it does with the callback is what the hand-written loop does."""

import copy
import dataclasses
import itertools
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from fisher_reg import FisherRegularizer, KLPenalty, LabelContrastPenalty, SpectralPenalty
from tests import cases

_KL = KLPenalty(step=0.3)


def _regularizer(penalty=_KL, **options):
    return FisherRegularizer(0.7, penalty, **({"every_n_steps": 1, "batch_fraction": 1.0} | options))


def _module(batch_norm=False, module_type=cases.Plain):
    torch.manual_seed(1)
    return module_type(cases.tiny_network(batch_norm))


def _loss(module, x, y, penalty=_KL, weight=0.7):
    return nn.functional.cross_entropy(module.network(x), y) + weight * penalty(module.network, x)


def _by_hand(module, batches, accumulate=1, clip=None, weight=lambda step: 0.7, penalty=_KL):
    """The loop that a user would write without Lightning; the last window of an epoch may be incomplete."""
    module = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batches, step = list(batches), 0
    for index, (x, y) in enumerate(batches):
        (_loss(module, x, y, penalty, weight(step)) / accumulate).backward()
        if (index + 1) % accumulate == 0 or index + 1 == len(batches):
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return module


def _same(module, expected):
    assert_close(dict(module.network.state_dict()), dict(expected.network.state_dict()), rtol=1e-5, atol=1e-6)


def _fit(folder, module, regularizer, batches=None, callbacks=(), **options):
    trainer = cases.trainer(folder, callbacks=[regularizer, *callbacks], **options)
    trainer.fit(module, batches or cases.tiny_batches(count=24))
    return trainer


def test_the_last_window_of_an_accumulation_may_be_incomplete(tmp_path):
    module, batches = _module(), cases.tiny_batches(count=28)  # seven batches in windows of four and three
    expected = _by_hand(module, batches, accumulate=4)
    _fit(tmp_path, module, _regularizer(), batches, accumulate_grad_batches=4)
    _same(module, expected)


def test_a_lazy_penalty_acts_on_whole_windows(tmp_path):
    module, batches = _module(), cases.tiny_batches(count=28)
    expected = _by_hand(module, batches, accumulate=2, weight=lambda step: 1.4 if step % 2 == 0 else 0.0)
    _fit(tmp_path, module, _regularizer(every_n_steps=2), batches, accumulate_grad_batches=2)
    _same(module, expected)


@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_clipping(tmp_path, clip):
    module, batches = _module(), cases.tiny_batches(count=12)
    expected = _by_hand(module, batches, clip=clip)
    _fit(tmp_path, module, _regularizer(), batches, gradient_clip_val=clip)
    _same(module, expected)


class _Averaging(WeightAveraging):
    def __init__(self):
        super().__init__(avg_fn=lambda averaged, current, count: 0.5 * averaged + 0.5 * current)


def test_averaged_weights(tmp_path):
    module, batches = _module(), cases.tiny_batches(count=12)
    moving, average = copy.deepcopy(module), None
    optimizer = torch.optim.SGD(moving.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        _loss(moving, x, y).backward()
        optimizer.step()
        now = [parameter.detach().clone() for parameter in moving.parameters()]
        average = now if average is None else [0.5 * old + 0.5 * new for old, new in zip(average, now, strict=True)]
    _fit(tmp_path, module, _regularizer(), batches, callbacks=[_Averaging()])
    assert_close([parameter.detach() for parameter in module.parameters()], average, rtol=1e-5, atol=1e-6)
    assert "training_step" not in vars(module)


class _TwoOptimizers(cases.Plain):
    """Manual optimisation of the two halves of a network, each with its own optimizer."""

    def __init__(self, network):
        super().__init__(network)
        self.automatic_optimization = False

    def configure_optimizers(self):
        parts = (self.network[:3], self.network[3:])
        return [torch.optim.SGD(part.parameters(), lr=rate) for part, rate in zip(parts, (0.1, 0.05), strict=True)]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_several_optimizers_in_manual_optimisation(tmp_path, every_n_steps):
    module, batches = _module(batch_norm=True, module_type=_TwoOptimizers), cases.tiny_batches(count=16)
    expected = copy.deepcopy(module).train()
    own = expected.configure_optimizers()
    for step, (x, y) in enumerate(batches):
        expected.zero_grad()
        weight = 0.7 * every_n_steps if step % every_n_steps == 0 else 0.0
        _loss(expected, x, y, SpectralPenalty(), weight).backward()
        for optimizer in own:
            optimizer.step()
    _fit(tmp_path, module, _regularizer(SpectralPenalty(), every_n_steps=every_n_steps), batches)
    _same(module, expected)
    assert not {"training_step", "manual_backward"} & set(vars(module))


def test_the_penalty_is_not_observed_itself_in_manual_optimisation(tmp_path):
    # its forwards on a part of the batch would be taken for those of the step, with statistics of their own
    values = []
    for module_type in (cases.Plain, _TwoOptimizers):
        module = _module(batch_norm=True, module_type=module_type)
        trainer = _fit(tmp_path, module, _regularizer(batch_fraction=0.5), limit_train_batches=1)
        values.append(trainer.callback_metrics["fisher/penalty"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_labels_of_a_part_are_those_of_its_inputs(tmp_path):
    module, (x, y) = _module(), next(iter(cases.tiny_batches()))
    pairs = itertools.combinations(range(4), 2)
    possible = [LabelContrastPenalty()(module, x[list(pair)], labels=y[list(pair)]).item() for pair in pairs]
    regularizer = _regularizer(LabelContrastPenalty(), batch_fraction=0.5)
    trainer = _fit(tmp_path, module, regularizer, cases.tiny_batches(), limit_train_batches=1)
    value = trainer.callback_metrics["fisher/penalty"].item()
    assert min(abs(value / one - 1) for one in possible) < 1e-5


@dataclasses.dataclass
class _Batch:
    image: torch.Tensor
    label: torch.Tensor


class _OfFields(cases.Plain):
    def training_step(self, batch, batch_idx):
        image, label = (batch.image, batch.label) if isinstance(batch, _Batch) else (batch["image"], batch["label"])
        return nn.functional.cross_entropy(self(image), label)


@pytest.mark.parametrize("penalty", [_KL, LabelContrastPenalty()])
@pytest.mark.parametrize("kind", ["dict", "dataclass"])
def test_batches_that_are_no_tuples(tmp_path, kind, penalty):
    module = _module(module_type=_OfFields)
    labelled = (lambda x, y: {"labels": y}) if penalty.needs_labels else (lambda x, y: {})
    expected = copy.deepcopy(module)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for x, y in cases.tiny_batches():
        loss = nn.functional.cross_entropy(expected(x), y) + 0.1 * penalty(expected.network, x, **labelled(x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    make = {"dict": lambda x, y: {"image": x, "label": y}, "dataclass": _Batch}[kind]
    loader = DataLoader([make(x, y) for x, y in cases.tiny_batches()], batch_size=None)
    where = {"inputs_fn": lambda batch: batch.image, "labels_fn": lambda batch: batch.label}
    regularizer = FisherRegularizer(
        0.1, penalty, every_n_steps=1, batch_fraction=1.0, **(where if kind == "dataclass" else {})
    )
    _fit(tmp_path, module, regularizer, loader)
    _same(module, expected)


class _Mixup(cases.Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        mixed = 0.7 * x + 0.3 * x.flip(0)
        return sum(share * nn.functional.cross_entropy(self(mixed), to) for share, to in ((0.7, y), (0.3, y.flip(0))))


def test_inputs_that_the_step_mixes_are_penalised_where_the_batch_has_them(tmp_path, caplog):
    module = _module(module_type=_Mixup)
    expected = copy.deepcopy(module)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for batch in cases.tiny_batches():
        optimizer.zero_grad()
        (expected.training_step(batch, 0) + 0.7 * _KL(expected.network, batch[0])).backward()
        optimizer.step()
    with caplog.at_level("INFO"):
        _fit(tmp_path, module, _regularizer(), cases.tiny_batches())
    _same(module, expected)
    assert caplog.text.count("runs a forward of its own: the training step did not call forward") == 1


class _Transferred(_Mixup):
    training_step = cases.Plain.training_step

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return 0.7 * batch[0] + 0.3 * batch[0].flip(0), batch[1]


def test_inputs_that_are_mixed_before_the_step_are_penalised_as_they_are(tmp_path):
    module = _module(module_type=_Transferred)
    batches = [module.on_after_batch_transfer(batch, 0) for batch in cases.tiny_batches(count=12)]
    expected = _by_hand(module, batches)
    _fit(tmp_path, module, _regularizer(), cases.tiny_batches(count=12))
    _same(module, expected)


def _recording(module):
    fed = []
    original = module.training_step

    def training_step(batch, batch_idx):
        fed.append(batch)
        return original(batch, batch_idx)

    module.training_step = training_step
    return fed


def test_a_training_that_goes_on_from_the_middle_of_an_epoch_keeps_its_place_in_the_schedule(tmp_path):
    module, batches = _module(), cases.tiny_batches(count=24)
    regularizer = _regularizer(warmup_steps=8, every_n_steps=2)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    options = {"enable_checkpointing": True, "max_epochs": 2}
    _fit(tmp_path, module, copy.deepcopy(regularizer), batches, [saving], **options)
    resumed = _module()
    fed = _recording(resumed)
    trainer = cases.trainer(tmp_path, callbacks=[copy.deepcopy(regularizer)], max_epochs=2)
    trainer.fit(resumed, batches, ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    expected = _module().train()
    expected.load_state_dict(torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"])
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    assert 0 < len(fed) < 12
    for step, (x, y) in enumerate(fed, 3):
        optimizer.zero_grad()
        _loss(expected, x, y, weight=0.0 if step % 2 else 2 * 0.7 * min(1, step / 8)).backward()
        optimizer.step()
    _same(resumed, expected)


def test_fast_dev_run(tmp_path):
    module, batches = _module(), cases.tiny_batches(count=12)
    expected = _by_hand(module, list(batches)[:2])
    _fit(tmp_path, module, _regularizer(), batches, fast_dev_run=2)
    _same(module, expected)


def test_overfit_batches(tmp_path):
    module, batches = _module(), cases.tiny_batches(count=12)
    expected = _by_hand(module, 3 * list(batches)[:2])
    _fit(tmp_path, module, _regularizer(), batches, overfit_batches=2, max_epochs=3)
    _same(module, expected)


def test_the_sanity_check_and_validation_are_not_penalised(tmp_path):
    module, batches = _module(batch_norm=True), cases.tiny_batches(count=12)
    expected = _by_hand(module, batches, penalty=SpectralPenalty())
    num_hooks = []

    class Watch(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            num_hooks.extend(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in pl_module.modules())

    trainer = cases.trainer(tmp_path, callbacks=[_regularizer(SpectralPenalty()), Watch()], num_sanity_val_steps=2)
    trainer.fit(module, batches, cases.tiny_batches(seed=1))
    _same(module, expected)
    assert num_hooks
    assert not any(num_hooks)


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_module_is_penalised_in_eager_mode(tmp_path, whole, caplog):
    module, batches = _module(batch_norm=True), cases.tiny_batches(count=12)
    expected = _by_hand(module, batches)
    if whole:
        fitted = torch.compile(module, backend="eager")
    else:
        fitted = module
        module.network.compile(backend="eager")
    with caplog.at_level("INFO"):
        _fit(tmp_path, fitted, _regularizer(), batches)
    _same(module, expected)
    assert caplog.text.count("the training step is compiled") == 1


def test_two_processes_take_the_mean_of_the_penalised_gradients(tmp_path):
    script = [sys.executable, "-m", "tests.callbacks.ddp_step", str(tmp_path), "kl"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{devices}.pt", weights_only=True) for devices in (1, 2))
    assert_close(two["parameters"], one["parameters"], rtol=1e-5, atol=1e-7)
    for key in ("fisher/penalty", "fisher/penalty_weight", "fisher/penalty_skipped", "fisher/lambda_control"):
        assert_close(two["logged"][key], one["logged"][key], rtol=1e-4, atol=1e-6)


def test_sharded_weights_give_the_steps_of_whole_ones(tmp_path):
    script = [sys.executable, "-m", "tests.callbacks.fsdp_step", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    (batch,) = cases.tiny_batches(count=8, batch_size=8)
    expected = _by_hand(_module(), 2 * [batch])
    assert_close(sharded, {name: p.detach() for name, p in expected.network.named_parameters()}, rtol=1e-5, atol=1e-6)


# What a step may return


class _Returns(cases.Plain):
    what = staticmethod(lambda loss: loss)

    def training_step(self, batch, batch_idx):
        return self.what(super().training_step(batch, batch_idx))


@pytest.mark.parametrize("detach", [lambda loss: loss.detach(), lambda loss: {"loss": loss.detach()}])
def test_a_loss_without_gradient_is_refused_instead_of_training_on_the_penalty_alone(tmp_path, detach):
    module = _module(module_type=_Returns)
    module.what = detach
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match="carries no gradient.*without .detach"):
        _fit(tmp_path, module, _regularizer())
    assert_close(module.state_dict(), before, rtol=0, atol=0)


class _BrokenAt:
    """A penalty that is not finite at some of its calls."""

    def __init__(self, calls, value):
        self.calls, self.value, self.count = calls, value, 0

    def __call__(self, model, inputs, *, generator=None):
        self.count += 1
        penalty = _KL(model, inputs, generator=generator)
        return penalty * self.value if self.count in self.calls else penalty


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_penalty_that_is_not_finite_is_left_out_and_counted(tmp_path, value):
    module, batches = _module(), cases.tiny_batches(count=16)
    expected = _by_hand(module, batches, weight=lambda step: 0.0 if step in (1, 2) else 0.7)
    regularizer = _regularizer(_BrokenAt({2, 3}, value))
    with pytest.warns(UserWarning, match=r"not finite out of the loss \(1 so far, logged as fisher/penalty_skipped\)"):
        trainer = _fit(tmp_path, module, regularizer, batches)
    _same(module, expected)
    assert regularizer.num_skipped == 2
    assert trainer.callback_metrics["fisher/penalty_skipped"] == 2
    assert torch.isfinite(trainer.callback_metrics["fisher/penalty"])


class _NaNInputs(cases.Plain):
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0].nan_to_num()), batch[1])


def test_logits_that_are_not_finite_are_left_out_too(tmp_path):
    module = _module(module_type=_NaNInputs)
    batches = [(x.clone(), y) for x, y in cases.tiny_batches(count=12)]
    batches[1][0][0, 0] = torch.nan
    with pytest.warns(UserWarning, match="1 so far.*The logits of 1 of 4 examples are NaN"):
        trainer = _fit(tmp_path, module, _regularizer(), DataLoader(batches, batch_size=None))
    assert trainer.callback_metrics["fisher/penalty_skipped"] == 1
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
