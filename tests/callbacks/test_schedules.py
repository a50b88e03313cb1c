import math

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from fisher_reg import ConstantSchedule, CosineSchedule, FisherRegularizer, LinearSchedule
from fisher_reg.callbacks.control import LambdaControl
from tests import cases


def _weights(tmp_path, regularizer, num_batches=8, **options):
    """The weights that a fit logs, step by step."""
    trainer = cases.trainer(tmp_path, callbacks=[regularizer], **({"max_epochs": num_batches} | options))
    module, seen = cases.Plain(cases.tiny_network()), []
    original = module.log

    def log(name, value, **kwargs):
        if name == "fisher/penalty_weight":
            seen.append(value)
        original(name, value, **kwargs)

    module.log = log
    trainer.fit(module, cases.tiny_batches(count=4))
    return seen


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ConstantSchedule(), [2.0] * 8),
        (LinearSchedule(), [2 * (1 - step / 8) for step in range(8)]),
        (LinearSchedule(end=3.0, num_steps=4), [2, 3, 4, 5, 6, 6, 6, 6]),
        (CosineSchedule(end=0.5), [2 * (0.75 + 0.25 * math.cos(math.pi * step / 8)) for step in range(8)]),
    ],
)
def test_the_weight_follows_its_schedule(tmp_path, schedule, expected):
    weights = _weights(tmp_path, FisherRegularizer(2.0, every_n_steps=1, batch_fraction=1.0, schedule=schedule))
    assert weights == pytest.approx(expected)


def test_a_warm_up_multiplies_the_schedule(tmp_path):
    schedule = LinearSchedule(num_steps=8)
    weights = _weights(
        tmp_path, FisherRegularizer(2.0, every_n_steps=1, batch_fraction=1.0, warmup_steps=4, schedule=schedule)
    )
    assert weights == pytest.approx([2 * step / 4 * (1 - step / 8) for step in range(1, 4)] + [1, 0.75, 0.5, 0.25])


def test_a_schedule_without_an_end_is_refused_before_the_first_step(tmp_path):
    regularizer = FisherRegularizer(2.0, schedule=CosineSchedule())
    with pytest.raises(
        MisconfigurationException, match=r"CosineSchedule.*has no known end. Pass num_steps to the schedule"
    ):
        _weights(tmp_path, regularizer, max_epochs=-1, max_time="00:00:00:02")


def test_the_control_moves_the_logarithm_of_the_weight_by_the_error():
    control = LambdaControl(target=2.0, weight=0.1, gain=0.5)
    control.update(8.0)
    assert control.weight == pytest.approx(0.1 * 2)
    control.update(2.0)
    assert control.weight == pytest.approx(0.2)
    for measured in (math.nan, math.inf):
        control.update(measured)
    assert control.weight == pytest.approx(0.2)
    for _ in range(1000):
        control.update(1e9)
    assert control.weight == pytest.approx(100.0)
    for _ in range(1000):
        control.update(0.0)
    assert control.weight == pytest.approx(1e-4)


def _controlled(tmp_path, digits, target, **options):
    network = cases.network("resnet", digits)
    regularizer = FisherRegularizer(0.01, every_n_steps=1, batch_fraction=1.0, target_lambda=target)
    module = cases.Plain(network)
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=3e-3)
    trainer = cases.trainer(tmp_path, callbacks=[regularizer], **options)
    return module, regularizer, trainer


@pytest.mark.parametrize("target", [0.1, 0.5])
def test_the_mean_eigenvalue_tracks_its_target(tmp_path, digits, target):
    module, regularizer, trainer = _controlled(tmp_path, digits, target, max_epochs=8)  # without it, between 1 and 9
    torch.manual_seed(0)
    trainer.fit(module, digits.train_dataloader())
    assert target / 2 < trainer.callback_metrics["fisher/lambda_control"].item() < target * 2
    assert regularizer.control.weight != 0.01


def test_a_target_out_of_reach_is_told(tmp_path, digits):
    module, _, trainer = _controlled(tmp_path, digits, 1e-6, max_epochs=1)
    with pytest.warns(UserWarning, match="is out of reach: the weight has changed from 0.01 to its limit 10"):
        trainer.fit(module, digits.train_dataloader())


def test_the_adapted_weight_is_part_of_the_checkpoint(tmp_path, digits):
    module, regularizer, trainer = _controlled(tmp_path, digits, 0.4, max_epochs=1, limit_train_batches=4)
    trainer.fit(module, digits.train_dataloader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again, resumed, trainer = _controlled(tmp_path, digits, 0.4, max_epochs=1, limit_train_batches=4)
    trainer.fit(again, digits.train_dataloader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert resumed.control.weight == regularizer.control.weight != 0.01
    plain = _controlled(tmp_path, digits, 0.4, max_epochs=1, limit_train_batches=1)
    plain[1].control = None
    plain[2].fit(plain[0], digits.train_dataloader())
    plain[2].save_checkpoint(tmp_path / "plain.ckpt")
    one, other = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("one", "plain"))
    assert one["FisherRegularizer"]["0"]["weight"] == regularizer.control.weight
    assert set(other["FisherRegularizer"]["0"]) == {"num_penalised"}


def test_the_weight_is_adapted_once_per_optimiser_step(tmp_path, digits):
    weights = []
    for accumulate in (1, 4):
        module, regularizer, trainer = _controlled(
            tmp_path, digits, 1e-3, max_epochs=1, accumulate_grad_batches=accumulate, limit_train_batches=accumulate
        )
        trainer.fit(module, digits.train_dataloader())
        weights.append(math.log(regularizer.control.weight / 0.01))
    assert weights[0] == pytest.approx(weights[1], rel=0.5)  # four times as much if every batch counted


class _NoLength(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(cases.tiny_batches())


def test_a_loader_without_a_length_has_no_known_end(tmp_path):
    trainer = cases.trainer(tmp_path, callbacks=[FisherRegularizer(2.0, schedule=LinearSchedule())], max_epochs=2)
    with pytest.raises(MisconfigurationException, match="no known end"):
        trainer.fit(cases.Plain(cases.tiny_network()), torch.utils.data.DataLoader(_NoLength(), batch_size=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_lambda": 0.0}, "target_lambda must be positive and finite; got 0.0"),
        ({"target_lambda": 1.0, "warmup_steps": 3}, "adapts the weight itself; got warmup_steps=3.*Use one of them"),
        ({"target_lambda": 1.0, "schedule": LinearSchedule()}, "schedule=LinearSchedule"),
        ({"target_lambda": 1.0, "weight": 0.0}, "must therefore start above 0"),
        ({"warmup_steps": 5, "schedule": CosineSchedule(num_steps=5)}, "warm-up of 5 steps must end before.*of 5"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FisherRegularizer(**settings)


@pytest.mark.parametrize("schedule", [LinearSchedule, CosineSchedule])
def test_bad_schedules_are_refused(schedule):
    with pytest.raises(ValueError, match=f"{schedule.__name__} needs a finite end >= 0; got -1"):
        schedule(end=-1)
    with pytest.raises(ValueError, match=f"{schedule.__name__} needs num_steps >= 1; got 0"):
        schedule(num_steps=0)
