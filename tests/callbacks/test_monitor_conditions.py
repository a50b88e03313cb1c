"""The monitor with odd data, beside other callbacks, and at other times than once an epoch."""

import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from fisher_reg import (
    L2,
    Bernoulli,
    Categorical,
    FisherMonitor,
    FisherRegularizer,
    KLPenalty,
    LInf,
    MarginTempered,
    TracePenalty,
    fisher_bound,
    fisher_kl_ratio,
    fisher_spectral_norm,
    local_fisher_bound,
)
from fisher_reg.estimate import evaluation_operator
from fisher_reg.single_step import step_divergences
from tests import cases


def _module():
    torch.manual_seed(1)
    return cases.Plain(cases.tiny_network())


def _still():
    module = _module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    return module


def _val():
    return cases.tiny_batches(count=10, batch_size=4, seed=1)


def _fit(folder, module, *callbacks, val=_val, train=None, ckpt_path=None, **options):
    trainer = cases.trainer(folder, callbacks=list(callbacks), **options)
    trainer.fit(module, train or cases.tiny_batches(), val() if val is _val else val, ckpt_path=ckpt_path)
    return trainer


def _batches(*inputs):
    return DataLoader([(x, torch.zeros(len(x), dtype=torch.long)) for x in inputs], batch_size=None)


def _x(count=10, seed=5):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


class _Mean(cases.Plain):
    """Takes sequences of any length."""

    def forward(self, x):
        return self.network(x.mean(1))


def test_a_probe_with_fewer_examples_than_asked_for_is_said_once_and_does_not_grow(tmp_path, caplog):
    monitor = FisherMonitor(num_samples=16)
    with caplog.at_level("INFO"):
        _fit(tmp_path, _still(), monitor, max_epochs=3)
    assert [len(part) for part in monitor._probe] == [4, 4, 2]
    values = [entry["fisher/lambda_max_mean"] for entry in monitor.history]
    assert values == [values[0]] * 3
    assert sum("the 10 examples that it has found; num_samples is 16" in line for line in caplog.messages) == 1


def test_all_of_the_validation_data_can_be_measured(tmp_path):
    monitor, val = FisherMonitor(num_samples=None), cases.tiny_batches(count=300, batch_size=64, seed=1)
    module = _still()
    _fit(tmp_path, module, monitor, val=val)
    expected = fisher_spectral_norm(module, val.dataset.tensors[0]).eigenvalue.double().mean().item()
    assert_close(monitor.history[0]["fisher/lambda_max_mean"], expected, rtol=1e-6, atol=0)


def test_batches_of_two_shapes_are_one_probe(tmp_path):
    first, second = torch.randn(8, 6, 6), torch.randn(5, 7, 6)
    module, monitor = _Mean(cases.tiny_network()), FisherMonitor(bounds=(fisher_bound, local_fisher_bound))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    _fit(tmp_path, module, monitor, train=_batches(first), val=_batches(first, second))
    (entry,) = monitor.history
    found = torch.cat([fisher_spectral_norm(module, x).eigenvalue.double() for x in (first, second)])
    assert_close(entry["fisher/lambda_max_mean"], found.mean().item(), rtol=1e-6, atol=0)
    uppers = [fisher_bound(module, x).log10_value for x in (first, second)]
    assert_close(entry["fisher/log10_bound_global"], max(uppers))
    local = torch.cat([local_fisher_bound(module, x).log10_value for x in (first, second)])
    assert_close(entry["fisher/log10_bound_local"], local.mean().item())


@pytest.mark.parametrize(
    ("probe", "error"),
    [
        (torch.randn(5, 7), "cannot be multiplied"),
        (torch.randn(0, 6), "non-empty batch"),
        (torch.zeros(5, 6, dtype=torch.uint8), "floating-point"),
        ((torch.randn(5, 6), 0), r"got tuple.*batch\[0\].*inputs_fn"),
        ([torch.randn(6)], "got list"),
        ({"image": torch.randn(5, 6)}, "got dict"),
    ],
)
def test_a_given_probe_that_cannot_work_is_refused_before_training(tmp_path, probe, error):
    class Counts(pl.Callback):
        steps = 0

        def on_train_batch_start(self, *args):
            self.steps += 1

    counts = Counts()
    with pytest.raises(Exception, match=error):
        _fit(tmp_path, _module(), FisherMonitor(probe=probe), counts)
    assert counts.steps == 0


def test_a_given_probe_may_be_a_batch_with_side_inputs(tmp_path):
    class Scaled(cases.Plain):
        def forward(self, x, scale=None):
            return self.network(x if scale is None else x * scale[:, None])

    torch.manual_seed(1)
    module, batch = Scaled(cases.tiny_network()), {"x": _x(5), "scale": torch.arange(1.0, 6.0)}
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    options = {"inputs_fn": lambda batch: batch["x"], "side_inputs_fn": lambda batch: (batch["scale"],)}
    monitor = FisherMonitor(probe=batch, **options)
    with pytest.warns(UserWarning, match="no bound is known with side inputs"):
        _fit(tmp_path, module, monitor)
    expected = fisher_spectral_norm(module, batch["x"], side_inputs=(batch["scale"],)).eigenvalue.mean()
    assert_close(monitor.history[0]["fisher/lambda_max_mean"], expected.item(), rtol=1e-6, atol=0)


def test_a_given_probe_is_cast_as_a_batch(tmp_path):
    monitor, module = FisherMonitor(probe=_x()), _module().double()
    train = DataLoader(TensorDataset(_x(8).double(), torch.arange(8) % 4), 4)
    _fit(tmp_path, module, monitor, train=train, val=train, precision="64-true")
    assert monitor.history[0]["fisher/num_left_out"] == 0


class _FailsForLarge(cases.Plain):
    def forward(self, x):
        if bool((x > 90).any()):
            raise RuntimeError("too large")
        return self.network(x)

    def validation_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 99.0])
def test_an_example_that_fails_costs_that_example(tmp_path, bad):
    x = _x(16)
    x[3, 2] = bad
    torch.manual_seed(1)
    module, monitor = _FailsForLarge(cases.tiny_network()), FisherMonitor(bounds=(fisher_bound, local_fisher_bound))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    val = DataLoader(TensorDataset(x, torch.arange(16) % 4), 8)
    with pytest.warns(UserWarning, match="FisherMonitor leaves out 1 of the 16 examples") as caught:
        _fit(tmp_path, module, monitor, val=val, max_epochs=2)
    assert sum("leaves out 1 of" in str(warning.message) for warning in caught) == 1
    keep = torch.arange(16) != 3
    expected = fisher_spectral_norm(module, x[keep]).eigenvalue.double().mean().item()
    for entry in monitor.history:
        assert entry["fisher/num_left_out"] == 1
        assert_close(entry["fisher/lambda_max_mean"], expected, rtol=1e-6, atol=0)
        assert torch.isfinite(torch.tensor(list(entry.values()))).all()


def test_bounds_are_taken_of_the_examples_that_are_left(tmp_path):
    x = _x(9)
    x[3, 2] = torch.nan
    keep, module = ~x.isnan().any(1), _still()
    bounds = (fisher_bound, local_fisher_bound)
    monitor, val = FisherMonitor(bounds=bounds), DataLoader(TensorDataset(x, torch.arange(9) % 4), 5)
    _fit(tmp_path, module, monitor, val=val)
    local = local_fisher_bound(module, x[keep]).log10_value.mean().item()
    assert_close(monitor.history[0]["fisher/log10_bound_local"], local)
    assert_close(monitor.history[0]["fisher/log10_bound_global"], fisher_bound(module, x[keep]).log10_value)


def test_a_gap_is_over_the_examples_where_both_are_finite(tmp_path):
    module = _still()
    with torch.no_grad():
        module.network[0].bias.zero_()
        module.network[4].weight.mul_(2000)
    x, monitor = _x(8), FisherMonitor(probe=_x(8), bounds=(local_fisher_bound,))
    eigenvalue = fisher_spectral_norm(module, x).eigenvalue.double()
    gaps = local_fisher_bound(module, x).log10_value - eigenvalue.log10()
    assert bool((eigenvalue == 0).any())
    assert bool(gaps.isfinite().any())
    _fit(tmp_path, module, monitor)
    expected = gaps[gaps.isfinite()].mean().item()
    assert_close(monitor.history[0]["fisher/log10_gap_local"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [RuntimeError, ZeroDivisionError, NotImplementedError, KeyError])
def test_any_exception_of_a_bound_is_a_warning_and_leaves_the_rest(tmp_path, kind):
    def broken(model, inputs, **options):
        raise kind("no")

    monitor = FisherMonitor(bounds=(broken, fisher_bound), bound_every_n_epochs=1)
    with pytest.warns(UserWarning, match=f"leaves out broken, which raised {kind.__name__}"):
        trainer = _fit(tmp_path, _module(), monitor, max_epochs=3)
    assert trainer.current_epoch == 3
    assert all("fisher/bound_global" in entry for entry in monitor.history)


def test_two_monitors_log_under_keys_of_their_own_and_resume(tmp_path):
    def monitors():
        return FisherMonitor(), FisherMonitor(likelihood=MarginTempered()), FisherMonitor(prefix="probe", probe=_x(3))

    three = monitors()
    trainer = _fit(tmp_path, _module(), *three)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for monitor, prefix in zip(three, ("fisher", "fisher_2", "probe"), strict=True):
        assert f"{prefix}/lambda_max_mean" in monitor.history[0]
        assert f"{prefix}/lambda_max_mean" in trainer.callback_metrics
    later = monitors()
    _fit(tmp_path, _module(), *later, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    for monitor, earlier in zip(later, three, strict=True):
        assert monitor.history[0] == earlier.history[0]
        assert [entry["epoch"] for entry in monitor.history] == [0, 1]


def _long(steps=50):
    batches = list(cases.tiny_batches(count=28, batch_size=4))
    return DataLoader([batches[i % len(batches)] for i in range(steps)], batch_size=None)


def test_each_validation_of_a_long_epoch_is_measured(tmp_path):
    monitor = FisherMonitor()
    _fit(tmp_path, _module(), monitor, train=_long(), val_check_interval=10)
    assert [entry["step"] for entry in monitor.history] == [10, 20, 30, 40, 50]


def test_steps_are_counted_between_validations_too(tmp_path):
    monitor = FisherMonitor(every_n_steps=15, bounds=())
    trainer = _fit(tmp_path, _module(), monitor, train=_long(), val_check_interval=20)
    assert [entry["step"] for entry in monitor.history] == [20, 35, 50]  # the first validation gives the probe
    given = FisherMonitor(every_n_steps=15, bounds=(), probe=_x())
    _fit(tmp_path, _module(), given, train=_long(), accumulate_grad_batches=2)
    assert [entry["step"] for entry in given.history] == [0, 15]
    assert "fisher/lambda_max_mean" in trainer.callback_metrics


def test_epochs_and_steps_at_once_are_refused():
    with pytest.raises(ValueError, match="counts epochs or steps; got every_n_epochs=2 and every_n_steps=5"):
        FisherMonitor(2, every_n_steps=5)
    with pytest.raises(ValueError, match="every_n_steps >= 1; got 0"):
        FisherMonitor(every_n_steps=0)


class _Sees(pl.Callback):
    """Notes what a key is at the end of each validation."""

    def __init__(self, key):
        self.monitor = key
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(float(trainer.callback_metrics[self.monitor]))


@pytest.mark.parametrize("key", ["fisher/lambda_max_median", "fisher/log10_gap_global", "fisher/kl_ratio"])
def test_a_key_that_another_callback_monitors_is_measured_at_each_validation(tmp_path, key):
    monitor, sees = FisherMonitor(every_n_epochs=4), _Sees(key)
    stops, keeps = EarlyStopping(key, patience=100), ModelCheckpoint(tmp_path, monitor=key, save_top_k=-1)
    _fit(tmp_path, _module(), stops, keeps, sees, monitor, max_epochs=6, enable_checkpointing=True)
    assert [entry["epoch"] for entry in monitor.history] == list(range(6))
    assert_close(sees.seen, [entry[key] for entry in monitor.history])
    assert len(set(sees.seen)) == 6
    assert len(keeps.best_k_models) == 6
    paths = sorted(keeps.best_k_models)
    later, sees = FisherMonitor(every_n_epochs=4), _Sees(key)
    others = (EarlyStopping(key, patience=100), ModelCheckpoint(tmp_path / "later", monitor=key), sees)
    _fit(tmp_path, _module(), *others, later, ckpt_path=paths[2], max_epochs=6, enable_checkpointing=True)
    assert [entry["epoch"] for entry in later.history] == list(range(6))
    assert_close(
        [entry[key] for entry in later.history], [entry[key] for entry in monitor.history], rtol=1e-5, atol=1e-8
    )


def test_a_scheduler_on_a_plateau_gets_a_value_at_each_epoch(tmp_path):
    module = _module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
    scheduler = {"scheduler": plateau, "monitor": "fisher/lambda_max_mean"}
    module.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": scheduler}
    monitor = FisherMonitor(every_n_epochs=5)
    _fit(tmp_path, module, monitor, max_epochs=3)
    assert len(monitor.history) == 3
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_without_validation_a_monitor_must_come_before_who_decides_on_it(tmp_path):
    stops = EarlyStopping("fisher/lambda_max_mean", check_on_train_epoch_end=True)
    with pytest.raises(MisconfigurationException, match="EarlyStopping uses fisher/lambda_max_mean.*before it"):
        _fit(tmp_path, _module(), stops, FisherMonitor(probe=_x()), val=None)
    monitor = FisherMonitor(probe=_x())
    _fit(tmp_path, _module(), monitor, stops, val=None, max_epochs=2)
    assert len(monitor.history) == 2


def test_a_fit_whose_validation_never_ran_is_told_of(tmp_path):
    with pytest.warns(UserWarning, match="FisherMonitor has measured nothing"):
        _fit(tmp_path, _module(), FisherMonitor(), check_val_every_n_epoch=5)


class _Jagged(cases.Plain):
    """A small ripple on the logits: steep everywhere, and of no effect on a prediction."""

    def forward(self, x):
        return self.network(x) + 0.01 * torch.sin(1000 * x.sum(1, keepdim=True) + torch.arange(4.0))


def test_gradient_masking_is_warned_of(tmp_path):
    torch.manual_seed(1)
    module, monitor = _Jagged(cases.tiny_network()), FisherMonitor(bounds=())
    with pytest.warns(UserWarning, match="found gradient masking") as caught:
        _fit(tmp_path, module, monitor, max_epochs=2)
    assert sum("masking" in str(warning.message) for warning in caught) == 1
    assert monitor.history[0]["fisher/kl_ratio"] < 0.05
    plain = FisherMonitor(bounds=())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*masking")
        _fit(tmp_path, _module(), plain)
    assert 0.8 < plain.history[0]["fisher/kl_ratio"] < 1.3


def test_the_logged_ratio_is_the_median_of_the_function(tmp_path):
    module, monitor = _still(), FisherMonitor(probe=_x())
    _fit(tmp_path, module, monitor)
    expected = fisher_kl_ratio(module, _x()).double().quantile(0.5).item()
    assert_close(monitor.history[0]["fisher/kl_ratio"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("penalty", "monitor", "name"),
    [
        (KLPenalty(likelihood=Bernoulli()), FisherMonitor(), "likelihood"),
        (KLPenalty(input_std=torch.tensor(0.5)), FisherMonitor(), "input_std"),
        (KLPenalty(input_std=torch.full((6,), 0.5)), FisherMonitor(input_std=torch.full((6,), 0.25)), "input_std"),
    ],
)
def test_a_regularizer_of_another_matrix_is_warned_of(tmp_path, penalty, monitor, name):
    with pytest.warns(UserWarning, match=f"measures with {name}=.*Pass the same {name} to both"):
        _fit(tmp_path, _module(), FisherRegularizer(penalty=penalty), monitor)


def test_a_regularizer_of_the_same_matrix_is_not(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Pass the same")
        for own, other in ((torch.full((6,), 0.5), [0.5] * 6), (0.5, torch.full((6,), 0.5)), (None, None)):
            penalty, monitor = KLPenalty(input_std=own), FisherMonitor(input_std=other)
            _fit(tmp_path, _module(), FisherRegularizer(penalty=penalty), monitor)


def test_it_is_printed_in_a_line(tmp_path):
    monitor = FisherMonitor(num_samples=5)
    assert repr(monitor) == "FisherMonitor(every_n_epochs=1, num_samples=5)"
    _fit(tmp_path, _module(), monitor)
    assert repr(monitor).startswith("FisherMonitor(every_n_epochs=1, num_samples=5, lambda_max_mean=0.0")
    assert repr(FisherMonitor(probe=_x(3), every_n_steps=7)) == "FisherMonitor(every_n_steps=7, num_samples=3)"


def test_the_progress_bar_shows_the_mean_on_demand(tmp_path):
    for wanted in (False, True):
        trainer = _fit(tmp_path, _module(), FisherMonitor(prog_bar=wanted))
        assert ("fisher/lambda_max_mean" in trainer.progress_bar_metrics) == wanted


def test_the_most_sensitive_images_are_drawn_with_their_eigenvectors(tmp_path):
    class Images(cases.Plain):
        def forward(self, x):
            return self.network(x.flatten(1))

    x = torch.rand(6, 1, 2, 3)
    loader = DataLoader(TensorDataset(x, torch.arange(6) % 4), 3)
    monitor, logger = FisherMonitor(), TensorBoardLogger(tmp_path, name="", version="")
    _fit(tmp_path, Images(cases.tiny_network()), monitor, train=loader, val=loader, logger=logger, max_epochs=2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert len(events.Images("fisher/sensitive_examples")) == 2


def test_memory_does_not_grow_over_measurements(tmp_path):
    import gc

    counts = []

    class Counts(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            gc.collect()
            counts.append(sum(isinstance(found, torch.Tensor) for found in gc.get_objects()))

    _fit(tmp_path, _module(), FisherMonitor(bound_every_n_epochs=1), Counts(), max_epochs=12)
    assert counts[-1] <= counts[4]


def test_a_module_without_finite_logits_at_first_is_measured_later(tmp_path):
    class Late(cases.Plain):
        def forward(self, x):
            return self.network(x) * (1.0 if self.training or self.current_epoch > 0 else torch.nan)

    monitor = FisherMonitor(bound_every_n_epochs=1)
    with pytest.warns(UserWarning, match="leaves out 10 of the 10 examples"):
        _fit(tmp_path, Late(nn.Sequential(*cases.tiny_network())), monitor, max_epochs=3)
    assert [entry["fisher/num_left_out"] for entry in monitor.history] == [10, 0, 0]
    assert monitor.history[2]["fisher/lambda_max_mean"] > 0


class _FlatAtTheEnd(cases.Plain):
    """A logit that makes one full wave within a step of one half, whatever the weights learn."""

    height = 2.0

    def forward(self, x):
        first = 2 + self.height * torch.sin(2 * math.pi * x[:, :1]) + 0 * self.network(x)[:, :1]
        return torch.cat([first, torch.zeros(len(x), 3)], 1)


def _single_step(geometry, weight=0.1):
    return FisherRegularizer(weight, KLPenalty(step=0.5, geometry=geometry), every_n_steps=1, batch_fraction=1.0)


def test_catastrophic_overfitting_to_a_single_step_is_warned_of_once(tmp_path):
    monitor = FisherMonitor(bounds=(), probe=torch.zeros(3, 6))
    with pytest.warns(
        UserWarning, match="a single step no longer finds.*catastrophic overfitting.*warmup_steps"
    ) as caught:
        _fit(tmp_path, _FlatAtTheEnd(cases.tiny_network()), _single_step(LInf()), monitor, max_epochs=2)
    assert sum("catastrophic" in str(warning.message) for warning in caught) == 1
    assert monitor.history[1]["fisher/single_step_ratio"] < 1e-6


def test_a_low_single_step_ratio_of_divergences_that_change_no_prediction_is_not_warned_of(tmp_path):
    module, monitor = _FlatAtTheEnd(cases.tiny_network()), FisherMonitor(bounds=(), probe=torch.zeros(3, 6))
    module.height = 0.2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*catastrophic")
        _fit(tmp_path, module, _single_step(LInf()), monitor)
    assert monitor.history[0]["fisher/single_step_ratio"] < 1e-3


@pytest.mark.parametrize("geometry", [L2(), LInf()])
def test_the_single_step_ratio_of_the_first_examples_is_logged_beside_such_a_penalty(tmp_path, geometry):
    x = _x(100)
    x[3] = torch.nan
    module, monitor = _still(), FisherMonitor(bounds=(), probe=x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*catastrophic")
        _fit(tmp_path, module, _single_step(geometry), monitor)
    first = x[:64][~x[:64].isnan().any(1)]
    with evaluation_operator(module, first, Categorical()) as fisher:
        found = step_divergences(fisher, 0.5, geometry)
    expected = (found.single.sum() / found.several.sum()).item()
    assert_close(monitor.history[0]["fisher/single_step_ratio"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("others", [(), (_single_step(L2(), weight=0.0),), (FisherRegularizer(0.1, TracePenalty()),)])
def test_without_such_a_penalty_there_is_no_single_step_ratio(tmp_path, others):
    monitor = FisherMonitor(bounds=())
    _fit(tmp_path, _module(), *others, monitor)
    assert "fisher/single_step_ratio" not in monitor.history[0]
