"""The trainer's training step is wrapped, and nobody else's: neither the module nor a copy of it knows of a penalty."""

import copy
import pickle

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fisher_reg import FisherMonitor, FisherRegularizer, KLPenalty, fisher_spectral_norm
from tests import cases

_KL = KLPenalty(step=0.3)
_CE = nn.functional.cross_entropy


def _regularizer(**options):
    return FisherRegularizer(0.7, _KL, **({"every_n_steps": 1, "batch_fraction": 1.0} | options))


def _fit(folder, module, callbacks, batches=None, **options):
    trainer = cases.trainer(folder, callbacks=callbacks, **options)
    trainer.fit(module, batches or cases.tiny_batches())
    return trainer


def _module(module_type=cases.Plain, **options):
    torch.manual_seed(1)
    return module_type(cases.tiny_network(**options))


class _Snapshots(pl.Callback):
    """Copies the module wherever a user's callback may."""

    def __init__(self):
        self.copies = []

    def _take(self, trainer, pl_module, *_):
        self.copies += [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]

    on_train_batch_start = on_before_zero_grad = on_after_backward = on_train_batch_end = on_train_end = _take


class _CopiesInTheStep(cases.Plain):
    copies = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        type(self).copies += (copy.deepcopy(self.network), pickle.loads(pickle.dumps(self.network)))
        return loss


def test_a_copy_that_is_made_in_fit_trains_by_itself_and_without_the_penalty(tmp_path):
    snapshots = _Snapshots()
    module = _module()
    _fit(tmp_path, module, [_regularizer(), snapshots])
    assert len(snapshots.copies) == 18
    for copied in snapshots.copies:
        assert "training_step" not in vars(copied)
        assert copied.training_step.__self__ is copied
        before, kept = copy.deepcopy(copied), copy.deepcopy(module.state_dict())
        _fit(tmp_path, copied, [])
        expected = before.train()
        optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
        for x, y in cases.tiny_batches():
            optimizer.zero_grad()
            _CE(expected(x), y).backward()
            optimizer.step()
        assert_close(copied.state_dict(), expected.state_dict())
        assert_close(module.state_dict(), kept, rtol=0, atol=0)


def test_what_is_copied_inside_the_step_has_no_hooks(tmp_path):
    _fit(tmp_path, _module(_CopiesInTheStep), [_regularizer()])
    assert len(_CopiesInTheStep.copies) == 4
    for network in _CopiesInTheStep.copies:
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
        assert not any("forward" in vars(part) for part in network.modules())


class _ValidatesByTraining(cases.Plain):
    losses = ()

    def validation_step(self, batch, batch_idx):
        type(self).losses += (self.training_step(batch, batch_idx),)


def test_a_validation_step_that_calls_the_training_step_is_not_penalised(tmp_path):
    module = _module(_ValidatesByTraining)
    trainer = cases.trainer(tmp_path, callbacks=[_regularizer()])
    trainer.fit(module, cases.tiny_batches(), cases.tiny_batches(seed=1))
    with torch.no_grad():
        expected = [_CE(module(x), y) for x, y in cases.tiny_batches(seed=1)]
    assert_close(list(_ValidatesByTraining.losses[-2:]), expected)


def test_the_strategy_gets_its_methods_back(tmp_path):
    class Fails(cases.Plain):
        def training_step(self, batch, batch_idx):
            raise KeyError("in the step")

    trainer = _fit(tmp_path, _module(), [_regularizer(), _regularizer()])
    assert not {"training_step", "backward"} & set(vars(trainer.strategy))
    trainer = cases.trainer(tmp_path, callbacks=[_regularizer()])
    with pytest.raises(KeyError, match="in the step"):
        trainer.fit(_module(Fails), cases.tiny_batches())
    assert not {"training_step", "backward"} & set(vars(trainer.strategy))


class _Manual(cases.Plain):
    """Manual optimisation with a loss per backward pass."""

    def __init__(self, network):
        super().__init__(network)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for loss in self.losses(*batch):
            self.manual_backward(loss)
        optimizer.step()

    def losses(self, x, y):
        yield _CE(self(x), y)
        yield self.network[0].weight.square().sum()


def _by_hand(module, losses):
    expected = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for x, y in cases.tiny_batches():
        optimizer.zero_grad()
        losses(expected, x, y).backward()
        optimizer.step()
    return expected


def test_several_backward_passes_need_a_choice(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"manual_backward more than once.*backward_pass=1"):
        _fit(tmp_path, _module(_Manual), [_regularizer()])
    with pytest.raises(ValueError, match="counts backward_pass from 0; got -1"):
        _regularizer(backward_pass=-1)


@pytest.mark.parametrize("chosen", [0, 1])
def test_the_chosen_backward_pass_gets_the_penalty(tmp_path, chosen):
    module = _module(_Manual)
    expected = _by_hand(
        module, lambda one, x, y: _CE(one(x), y) + one.network[0].weight.square().sum() + 0.7 * _KL(one.network, x)
    )
    trainer = _fit(tmp_path, module, [_regularizer(backward_pass=chosen)])
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
    assert "fisher/penalty" in trainer.callback_metrics


def test_a_backward_pass_that_does_not_come_is_told(tmp_path):
    with pytest.warns(UserWarning, match="The penalty was not added.*but 2 times"):
        _fit(tmp_path, _module(_Manual), [_regularizer(backward_pass=2)])


class _SharpnessAware(_Manual):
    """Two passes: up the gradient, and from there the step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer, parameters = self.optimizers(), list(self.parameters())
        self.manual_backward(_CE(self(x), y))
        climb = [0.05 * parameter.grad / parameter.grad.norm() for parameter in parameters]
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_add_(parameters, climb)
        self.manual_backward(_CE(self(x), y))
        with torch.no_grad():
            torch._foreach_sub_(parameters, climb)
        optimizer.step()
        optimizer.zero_grad()


def test_the_second_pass_of_sharpness_aware_minimisation_is_penalised_at_its_weights(tmp_path):
    module = _module(_SharpnessAware)
    expected = copy.deepcopy(module).train()
    optimizer, parameters = torch.optim.SGD(expected.parameters(), lr=0.1), list(expected.parameters())
    for x, y in cases.tiny_batches():
        gradients = torch.autograd.grad(_CE(expected(x), y), parameters)
        climb = [0.05 * gradient / gradient.norm() for gradient in gradients]
        with torch.no_grad():
            torch._foreach_add_(parameters, climb)
        optimizer.zero_grad()
        (_CE(expected(x), y) + 0.7 * _KL(expected.network, x)).backward()
        with torch.no_grad():
            torch._foreach_sub_(parameters, climb)
        optimizer.step()
    _fit(tmp_path, module, [_regularizer(backward_pass=1)])
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


class _Accumulates(_Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(_CE(self(batch[0]), batch[1]) / 2)
        if batch_idx % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()


def test_accumulation_by_hand_is_told(tmp_path):
    with pytest.warns(
        UserWarning, match="without a step of the optimizer.*divide the weight of FisherRegularizer by k"
    ):
        _fit(tmp_path, _module(_Accumulates), [_regularizer()])


def test_the_adapted_weight_starts_anew_in_each_fit(tmp_path):
    regularizer, weights = _regularizer(target_lambda=0.01), []
    for _ in range(2):
        _fit(tmp_path, _module(), [regularizer], max_epochs=2)
        weights.append(regularizer.control.weight)
    assert weights[0] == weights[1] != 0.7


class _Conditional(cases.Plain):
    """Needs a scale per example beside the inputs."""

    def forward(self, x, scale):
        return self.network(x * scale[:, None])

    def training_step(self, batch, batch_idx):
        return _CE(self(batch[0], batch[2]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass


def _with_scales():
    return DataLoader([(x, y, torch.linspace(0.5, 2, len(x))) for x, y in cases.tiny_batches()], batch_size=None)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("named", [False, True])
def test_side_inputs_follow_their_examples_through_the_callbacks(tmp_path, fraction, named):
    module = _module(_Conditional)
    (x, _, scale), *_ = _with_scales()
    whole = {(0, 1, 2, 3)} if fraction == 1 else {(a, b) for a in range(4) for b in range(a + 1, 4)}
    possible = [_KL(module, x[list(part)], side_inputs=(scale[list(part)],)).item() for part in whole]
    side = (lambda batch: {"scale": batch[2]}) if named else (lambda batch: (batch[2],))
    logits_fn = (lambda module, x, scale: module(x, scale)) if named else None
    options = {"side_inputs_fn": side, "logits_fn": logits_fn}
    monitor = FisherMonitor(num_samples=6, bounds=(), **options)
    regularizer = _regularizer(batch_fraction=fraction, target_lambda=1.0, **options)
    trainer = cases.trainer(tmp_path, callbacks=[regularizer, monitor], limit_train_batches=1)
    trainer.fit(module, _with_scales(), _with_scales())
    value = trainer.callback_metrics["fisher/penalty"].item()
    assert min(abs(value / one - 1) for one in possible) < 1e-5
    batches = list(_with_scales())
    inputs = torch.cat([batches[0][0], batches[1][0][:2]])
    scales = torch.cat([batches[0][2], batches[1][2][:2]])
    expected = fisher_spectral_norm(module, inputs, side_inputs=(scales,)).eigenvalue
    assert trainer.callback_metrics["fisher/lambda_max_max"].item() == pytest.approx(expected.max().item(), rel=1e-2)


class _FixedBatch(cases.Plain):
    def forward(self, x):
        return self.network(x.view(4, 6))


def test_a_model_that_takes_only_whole_batches_is_measured_on_whole_batches(tmp_path):
    module, batches = _module(_FixedBatch), cases.tiny_batches()
    monitor = FisherMonitor(num_samples=6, bounds=())
    trainer = cases.trainer(tmp_path, callbacks=[monitor, _regularizer()])
    trainer.fit(module, batches, batches)
    inputs = torch.cat([x for x, _ in batches])
    expected = fisher_spectral_norm(module.network, inputs).eigenvalue.max().item()
    assert trainer.callback_metrics["fisher/lambda_max_max"].item() == pytest.approx(expected, rel=1e-2)


class _Coupled(cases.Plain):
    def forward(self, x):
        return self.network(x - x.mean(0))


@pytest.mark.parametrize("make", [lambda: FisherMonitor(bounds=()), _regularizer])
def test_a_model_that_is_not_the_function_meant_is_told_once_with_the_remedy(tmp_path, make):
    trainer = cases.trainer(tmp_path, callbacks=[make()], max_epochs=2)
    with pytest.warns(UserWarning, match="The numbers of .* may be wrong") as warned:
        trainer.fit(_module(_Coupled), cases.tiny_batches(), cases.tiny_batches())
    told = [str(one.message) for one in warned if "may be wrong" in str(one.message)]
    assert len(told) == 1
    assert "independence       FAILED" in told[0]


def test_a_strategy_that_was_wrapped_by_somebody_else_stays_so(tmp_path):
    class Wraps(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            original = trainer.strategy.training_step
            self.wrapper = trainer.strategy.training_step = lambda *args: original(*args)

    wraps = Wraps()
    trainer = _fit(tmp_path, _module(), [wraps, _regularizer()])
    assert trainer.strategy.training_step is wraps.wrapper


def test_checkpointed_batch_norm_trains_as_without_checkpoints(tmp_path):
    class Checkpointed(cases.Plain):
        on = True

        def forward(self, x):
            return checkpoint(self.network, x, use_reentrant=False) if self.on else self.network(x)

    found = []
    for on, fraction in ((False, 0.999), (True, 1.0)):  # all examples, by a forward of the penalty's own
        module = _module(Checkpointed, batch_norm=True)
        module.on = on
        _fit(tmp_path, module, [_regularizer(batch_fraction=fraction)])
        found.append(module.state_dict())
    plain = _module(Checkpointed, batch_norm=True)
    _fit(tmp_path, plain, [])
    moved = [state.pop("network.1.num_batches_tracked") for state in (*found, plain.state_dict())]
    assert moved[1] == moved[2] == 2 * moved[0]  # torch itself moves them twice
    for state in found:
        del state["network.1.running_mean"], state["network.1.running_var"]
    assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_running_statistics_that_are_not_kept_are_refused(tmp_path):
    module = _module()
    module.network[1] = nn.BatchNorm1d(5, track_running_stats=False)
    with pytest.raises(ValueError, match="over 5 channels.*track_running_stats=True"):
        _fit(tmp_path, module, [_regularizer(use_running_statistics=True)])
