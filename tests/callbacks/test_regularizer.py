"""One step with the callback against the same step written by hand."""

import copy
import csv
import subprocess
import sys

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler

from fisher_reg import BoundPenalty, FisherRegularizer, ForwardError, SpectralPenalty, TracePenalty
from tests import cases

_TWO_CLASS = SpectralPenalty()


def _every_step(weight, penalty=_TWO_CLASS, **options):
    return FisherRegularizer(weight, penalty, **({"every_n_steps": 1, "batch_fraction": 1.0} | options))


def _fit(folder, module, regularizer=None, batches=None, **kwargs):
    callbacks = [] if regularizer is None else [regularizer]
    trainer = cases.trainer(folder, callbacks=callbacks, **kwargs)
    trainer.fit(module, batches or cases.tiny_batches())
    return trainer


def _module(batch_norm=False, dropout=False):
    torch.manual_seed(1)
    return cases.Plain(cases.tiny_network(batch_norm, dropout))


def _by_hand(module, weight, accumulate=1, penalty=_TWO_CLASS, batches=None, clip=None):
    """The loop that a user would write without Lightning."""
    module = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for index, (x, y) in enumerate(batches or cases.tiny_batches()):
        loss = nn.functional.cross_entropy(module.network(x), y) + weight * penalty(module.network, x)
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return module


@pytest.mark.parametrize("penalty", [SpectralPenalty(), SpectralPenalty(num_steps=3), BoundPenalty()])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_steps_equal_the_hand_written_ones(tmp_path, accumulate, batch_norm, penalty):
    module, batches = _module(batch_norm), cases.tiny_batches(count=32)
    expected = _by_hand(module, 0.7, accumulate, penalty, batches)
    plain = _by_hand(module, 0.0, accumulate, penalty, batches)
    _fit(tmp_path, module, _every_step(0.7, penalty), batches, accumulate_grad_batches=accumulate)
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(module.network[0].weight, plain.network[0].weight, rtol=1e-3)


def test_gradient_clipping_sees_the_penalty(tmp_path):
    module = _module()
    expected = _by_hand(module, 5.0, clip=0.1)
    _fit(tmp_path, module, _every_step(5.0), gradient_clip_val=0.1)
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_real_gradient_scaler_scales_the_penalty_too(tmp_path):
    module = _module()
    by_hand = copy.deepcopy(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for x, y in cases.tiny_batches():
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.cross_entropy(by_hand(x), y)
        scaler.scale(loss + 0.7 * SpectralPenalty()(by_hand, x)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    _fit(tmp_path, module, _every_step(0.7), plugins=[precision])
    assert_close(module.state_dict(), by_hand.state_dict(), rtol=1e-5, atol=1e-6)


def test_bf16_mixed_precision_computes_the_penalty_in_float32(tmp_path):
    module, seen = _module(), []

    def penalty(model, inputs, *, generator=None):
        seen.append((inputs.dtype, SpectralPenalty()(model, inputs)))
        return seen[-1][1]

    expected = SpectralPenalty()(module, next(iter(cases.tiny_batches()))[0])
    _fit(tmp_path, module, _every_step(0.7, penalty), precision="bf16-mixed", limit_train_batches=1)
    assert_close(seen[0][1].detach(), expected.detach(), rtol=1e-6, atol=0)


def test_two_processes_equal_one(tmp_path):
    script = [sys.executable, "-m", "tests.callbacks.ddp_step", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{devices}.pt", weights_only=True) for devices in (1, 2))
    assert_close(two["parameters"], one["parameters"], rtol=1e-5, atol=1e-7)
    assert set(one["logged"]) == set(two["logged"])
    for key, value in one["logged"].items():
        if not key.startswith("fisher/seconds"):
            assert_close(two["logged"][key], value, rtol=1e-5, atol=1e-6)
    assert two["logged"]["fisher/wide_interval_share"] == 1
    halves = torch.load(tmp_path / "batch_norm.pt", weights_only=True)
    module, data = _module(batch_norm=True), cases.tiny_batches(count=8).dataset
    gradients = []
    for rank in range(2):  # each process normalises with the statistics of its own half
        part = data[list(DistributedSampler(data, 2, rank))]
        loss = nn.functional.cross_entropy(module.train()(part[0]), part[1]) + 0.7 * SpectralPenalty()(module, part[0])
        gradients.append(torch.autograd.grad(loss, list(module.parameters())))
    for (name, parameter), first, second in zip(module.named_parameters(), *gradients, strict=True):
        assert_close(
            halves["parameters"][name], (parameter - 0.1 * (first + second) / 2).detach(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dropout", [False, True])
def test_weight_zero_is_bit_identical_to_no_callback(tmp_path, dropout):
    first, second = _module(batch_norm=True, dropout=dropout), _module(batch_norm=True, dropout=dropout)
    torch.manual_seed(5)
    _fit(tmp_path, first)
    torch.manual_seed(5)
    _fit(tmp_path, second, _every_step(0.0))
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_running_statistics_are_penalised_where_they_are_asked_for(tmp_path):
    module, (x, _) = _module(batch_norm=True, dropout=True), next(iter(cases.tiny_batches()))
    nn.init.normal_(module.network[1].running_mean)
    step = copy.deepcopy(module).train()
    step(x)  # the step moves the statistics before it is penalised
    expected, trained = SpectralPenalty()(step.eval(), x).item(), SpectralPenalty()(step.train(), x).item()
    regularizer = FisherRegularizer(0.7, _TWO_CLASS, every_n_steps=1, batch_fraction=1.0, use_running_statistics=True)
    trainer = _fit(tmp_path, module, regularizer, limit_train_batches=1)
    assert trainer.callback_metrics["fisher/penalty"].item() == pytest.approx(expected, rel=1e-5)
    assert abs(expected / trained - 1) > 0.05
    assert module.training


def test_running_statistics_move_once_per_step(tmp_path):
    with_penalty, without = _module(batch_norm=True), _module(batch_norm=True)
    _fit(tmp_path, with_penalty, _every_step(0.7), limit_train_batches=1)
    _fit(tmp_path, without, limit_train_batches=1)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(with_penalty.network[1], name), getattr(without.network[1], name), rtol=0, atol=0)


def _gradients(tmp_path, regularizer, module, steps, batches):
    """The gradients that the callback gives at fixed parameters, one per optimiser step."""
    collected = []

    class Collect(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            collected.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())
            optimizer.zero_grad()

    trainer = cases.trainer(tmp_path, callbacks=[regularizer, Collect()], max_steps=steps, max_epochs=-1)
    trainer.fit(module, batches)
    return torch.stack(collected)


def test_a_lazy_penalty_keeps_the_mean_gradient(tmp_path):
    module, batches = _module(), cases.tiny_batches(count=4)
    every = _gradients(tmp_path, _every_step(0.7), copy.deepcopy(module), 4, batches)
    lazy = _gradients(tmp_path, _every_step(0.7, every_n_steps=4), copy.deepcopy(module), 4, batches)
    assert_close(lazy.mean(0), every.mean(0))
    assert not torch.allclose(lazy[0], lazy[1])
    assert_close(lazy[1], lazy[3])


def test_a_part_of_the_batch_keeps_the_expected_gradient(tmp_path):
    # 200 draws of 2 of 4 examples; batch statistics are those of the whole batch for every draw
    module, batches = _module(batch_norm=True), cases.tiny_batches(count=4)
    full = _gradients(tmp_path, _every_step(0.7), copy.deepcopy(module), 1, batches)[0]
    part = _gradients(tmp_path, _every_step(0.7, batch_fraction=0.5), copy.deepcopy(module), 200, batches)
    plain = _gradients(tmp_path, _every_step(0.0), copy.deepcopy(module), 1, batches)[0]
    error = (part.mean(0) - full).norm() / (full - plain).norm()
    spread = (part.std(0).norm() / 200**0.5) / (full - plain).norm()
    assert spread > 0
    assert error < 4 * spread


class _TwoForwards(cases.Plain):
    """A teacher without gradient on other inputs, and a second view with gradient."""

    def __init__(self, network, teacher, views):
        super().__init__(network)
        self.teacher, self.views = teacher, views

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            for _ in range(self.teacher):
                self(3 * x + 5)
        return sum(nn.functional.cross_entropy(self(x + 2 * view), y) for view in range(self.views)) / self.views


@pytest.mark.parametrize(("teacher", "views"), [(1, 1), (0, 2)])
def test_batch_statistics_are_those_of_the_inputs_also_where_the_step_runs_several_forwards(tmp_path, teacher, views):
    torch.manual_seed(1)
    module = _TwoForwards(cases.tiny_network(batch_norm=True), teacher, views)
    x = next(iter(cases.tiny_batches()))[0]
    expected = SpectralPenalty()(copy.deepcopy(module).train(), x).item()
    trainer = _fit(tmp_path, module, _every_step(0.7), limit_train_batches=1)
    assert_close(trainer.callback_metrics["fisher/penalty"].item(), expected, rtol=1e-5, atol=0)


def test_two_regularizers_add_both_and_leave_nothing_behind(tmp_path):
    module, both = _module(batch_norm=True), SpectralPenalty(num_steps=3)
    expected = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for x, y in cases.tiny_batches():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(expected(x), y)
        (loss + 0.7 * SpectralPenalty()(expected, x) + 0.3 * both(expected, x)).backward()
        optimizer.step()
    before = _fingerprint(module)
    callbacks = [_every_step(0.7), _every_step(0.3, both)]
    trainer = cases.trainer(tmp_path, callbacks=callbacks)
    trainer.fit(module, cases.tiny_batches())
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
    assert _fingerprint(module) == before
    assert {"fisher/penalty", "fisher/penalty_2"} <= set(trainer.callback_metrics)
    failing = _Failing(cases.tiny_network())
    before = _fingerprint(failing)
    with pytest.raises(KeyError, match="in the step"):
        cases.trainer(tmp_path, callbacks=callbacks).fit(failing, cases.tiny_batches())
    assert _fingerprint(failing) == before


def test_a_compiled_network_gives_the_same_steps(tmp_path):
    module = _module(batch_norm=True)
    expected = _by_hand(module, 0.7)
    module.network = torch.compile(module.network, backend="eager")
    _fit(tmp_path, module, _every_step(0.7))
    compiled = {name.replace("_orig_mod.", ""): tensor for name, tensor in module.state_dict().items()}
    assert_close(compiled, dict(expected.state_dict()), rtol=1e-5, atol=1e-6)


def test_warm_up_rises_linearly_with_the_optimiser_steps():
    regularizer = _every_step(2.0, warmup_steps=4)
    assert [regularizer.weight_at(step) for step in range(6)] == [0, 0.5, 1.0, 1.5, 2.0, 2.0]


def _fingerprint(module):
    hooks = [
        (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks)) for part in module.modules()
    ]
    methods = [sorted(name for name, value in vars(part).items() if callable(value)) for part in module.modules()]
    return [part.training for part in module.modules()], hooks, methods, list(module.state_dict())


@pytest.mark.parametrize("detailed", [False, True])
def test_the_loggers_get_the_penalty_and_with_details_everything(tmp_path, detailed):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = _fit(tmp_path, _module(), _every_step(0.7, detailed=detailed), logger=logger)
    with (tmp_path / "metrics.csv").open() as file:
        sent = {key for key in next(csv.DictReader(file)) if key.startswith("fisher/")}
    known = {key for key in trainer.callback_metrics if key.startswith("fisher/")}
    main = {"fisher/penalty", "fisher/penalty_weighted"}
    assert known == main | {"fisher/penalty_weight", "fisher/penalty_skipped", "fisher/penalty_gradient_ratio"}
    assert sent == (known if detailed else main)


class _Failing(cases.Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise KeyError("in the step")
        return loss


def test_the_module_is_what_it_was_after_fit_and_validate(tmp_path):
    module = _module(batch_norm=True, dropout=True)
    module.network[1].eval()
    before = _fingerprint(module)
    trainer = _fit(tmp_path, module, _every_step(0.7))
    assert _fingerprint(module) == before
    trainer.validate(module, cases.tiny_batches(), verbose=False)
    assert _fingerprint(module) == before


def test_the_module_is_what_it_was_after_an_exception_inside_fit(tmp_path):
    module = _Failing(cases.tiny_network(batch_norm=True))
    before = _fingerprint(module)
    with pytest.raises(KeyError, match="in the step"):
        _fit(tmp_path, module, _every_step(0.7))
    assert _fingerprint(module) == before
    assert module.training_step.__func__ is _Failing.training_step


def test_an_instance_that_has_its_own_training_step_keeps_it(tmp_path):
    module = _module()
    own = lambda batch, batch_idx: cases.Plain.training_step(module, batch, batch_idx)  # noqa: E731
    module.training_step = own
    _fit(tmp_path, module, _every_step(0.7))
    assert module.training_step is own


class _DictStep(cases.Plain):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            return None
        return {"loss": super().training_step(batch, batch_idx), "extra": 1}


def test_a_step_that_returns_a_dict_or_nothing(tmp_path):
    torch.manual_seed(1)
    module = _DictStep(cases.tiny_network())
    expected = _by_hand(module, 0.7, batches=[next(iter(cases.tiny_batches()))])
    _fit(tmp_path, module, _every_step(0.7))
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_what_is_logged_is_what_was_added(tmp_path):
    module = _module()
    expected = SpectralPenalty()(module, next(iter(cases.tiny_batches()))[0]).item()
    trainer = _fit(tmp_path, module, _every_step(0.7), limit_train_batches=1)
    assert_close(trainer.callback_metrics["fisher/penalty"].item(), expected)
    assert_close(trainer.callback_metrics["fisher/penalty_weighted"].item(), 0.7 * expected)


def test_works_in_a_trainer_of_the_other_namespace(tmp_path):
    torch.manual_seed(1)
    module = cases.OtherPlain(cases.tiny_network())
    expected = _by_hand(module, 0.7)
    trainer = cases.trainer(tmp_path, lightning.pytorch.Trainer, callbacks=[_every_step(0.7)])
    trainer.fit(module, cases.tiny_batches())
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


def test_resuming_from_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path):
    penalty = _every_step(0.7, TracePenalty(), batch_fraction=0.5, every_n_steps=2, warmup_steps=3)
    whole = _module()
    _fit(tmp_path, whole, copy.deepcopy(penalty), max_epochs=2)
    half, resumed = _module(), _module()
    trainer = _fit(tmp_path, half, copy.deepcopy(penalty), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = cases.trainer(tmp_path, callbacks=[copy.deepcopy(penalty)], max_epochs=2)
    trainer.fit(resumed, cases.tiny_batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_close(resumed.state_dict(), whole.state_dict())


class _TwoOutputs(cases.Plain):
    def forward(self, x):
        return {"logits": self.network(x["features"])}

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch)["logits"], batch["label"])


def test_inputs_fn_and_logits_fn_reach_unusual_modules(tmp_path):
    torch.manual_seed(1)
    module = _TwoOutputs(cases.tiny_network())
    expected = _by_hand(module, 0.7)
    batches = [{"features": x, "mask": torch.ones(4, 6), "label": y} for x, y in cases.tiny_batches()]
    loader = DataLoader(batches, batch_size=None)
    with pytest.raises(MisconfigurationException, match="'mask'.*inputs_fn"):
        _fit(tmp_path, copy.deepcopy(module), _every_step(0.7), loader)
    choose = {"inputs_fn": lambda batch: batch["features"]}
    with pytest.raises(ForwardError, match=r"_TwoOutputs.forward, called with inputs \(4, 6\).*logits_fn=lambda"):
        _fit(tmp_path, copy.deepcopy(module), _every_step(0.7, **choose), loader)
    logits_fn = lambda module, x: module({"features": x})["logits"]  # noqa: E731
    _fit(tmp_path, module, _every_step(0.7, logits_fn=logits_fn, **choose), loader)
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


class _NoLogits(cases.Plain):
    def forward(self, x):
        return {"logits": self.network(x)}

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0])["logits"], batch[1])


def test_a_forward_without_logits_is_told_of_logits_fn(tmp_path):
    with pytest.raises(ValueError, match="it returned dict.*logits_fn=lambda"):
        _fit(tmp_path, _NoLogits(cases.tiny_network()), _every_step(0.7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -0.1}, "finite weight >= 0; got -0.1"),
        ({"weight": float("nan")}, "finite weight >= 0; got nan"),
        ({"weight": 1, "every_n_steps": 0}, "every_n_steps >= 1; got 0"),
        ({"weight": 1, "batch_fraction": 0.0}, "0 < batch_fraction <= 1; got 0.0"),
        ({"weight": 1, "batch_fraction": 1.5}, "got 1.5"),
        ({"weight": 1, "warmup_steps": -1}, "warmup_steps >= 0; got -1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        FisherRegularizer(**settings)


@pytest.mark.parametrize(("num_steps", "interval"), [(3, 1), (250, 2), (950, 9), (2000, 10)])
def test_the_default_penalises_each_tenth_step_and_oftener_in_a_short_training(tmp_path, num_steps, interval):
    regularizer = FisherRegularizer(1e-20)
    for steps, expected in ((num_steps, interval), (2000, 10)):  # a second fit finds out anew
        trainer = cases.trainer(tmp_path, callbacks=[regularizer], max_steps=steps, max_epochs=-1)
        regularizer.on_train_start(trainer, _module())
        assert regularizer.every_n_steps == expected
    assert FisherRegularizer(every_n_steps=7).every_n_steps == 7


def test_the_default_counts_the_steps_of_the_training_itself(tmp_path):
    regularizer = FisherRegularizer(1e-20)
    _fit(tmp_path, _module(), regularizer, cases.tiny_batches(count=80), max_epochs=10)  # 200 steps
    assert regularizer.every_n_steps == 2
    assert regularizer.guard.num_penalised == 100
