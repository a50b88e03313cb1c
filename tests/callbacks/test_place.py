"""Where the penalty is taken: at the step's forward in its precision, at a part of it, or by a forward of its own."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, normalize
from torch.testing import assert_close

from fisher_reg import FisherRegularizer, KLPenalty, LInf, SpectralPenalty
from fisher_reg.callbacks.gradients import Cut, SeparateGradient
from fisher_reg.evaluation import trained
from tests import cases

_KL = KLPenalty(step=0.3)


def _module(batch_norm=False, dropout=False):
    torch.manual_seed(1)
    return cases.Plain(cases.tiny_network(batch_norm, dropout))


def _fit(folder, module, penalty=_KL, batches=None, *, weight=0.7, every_n_steps=1, batch_fraction=1.0, **options):
    regularizer = FisherRegularizer(weight, penalty, every_n_steps=every_n_steps, batch_fraction=batch_fraction)
    trainer = cases.trainer(folder, callbacks=[regularizer], **options)
    trainer.fit(module, batches or cases.tiny_batches(count=12))
    return trainer


def _kl(network, x, z, step, sign):
    """``2 KL / step^2`` written out, with the logits of the step."""
    top = z.detach().topk(2, dim=1).indices
    contrast = z.gather(1, top[:, :1]) - z.gather(1, top[:, 1:])
    (slope,) = torch.autograd.grad(contrast.sum(), x, retain_graph=True)
    direction = -(slope.sign() if sign else normalize(slope, dim=1))
    q = network(x.detach() + step * direction).float().log_softmax(1)
    return 2 / step**2 * kl_div(q, z.float().log_softmax(1), log_target=True, reduction="batchmean")


def _by_hand(module, batches, dtype, penalty, weight=0.7, accumulate=1, scaler=None):
    """The loop that a user would write: forward, penalty and all under autocast."""
    module = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for index, (x, y) in enumerate(batches):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            z = module.network(x)
            loss = cross_entropy(z, y) + weight * _kl(module.network, x, z, penalty.step, penalty.geometry == LInf())
        scaler.scale(loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return module


def _flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("penalty", [_KL, KLPenalty(step=0.1, geometry=LInf())])
def test_under_bf16_autocast_the_steps_are_those_written_by_hand(tmp_path, penalty, accumulate, caplog):
    module = _module()
    expected = _by_hand(module, cases.tiny_batches(count=12), torch.bfloat16, penalty, accumulate=accumulate)
    plain = _by_hand(module, cases.tiny_batches(count=12), torch.bfloat16, penalty, 0.0, accumulate)
    with caplog.at_level("INFO"):
        _fit(tmp_path, module, penalty, precision="bf16-mixed", accumulate_grad_batches=accumulate)
    assert "a forward of its own" not in caplog.text
    # where gradients are added differs, in bfloat16 or in float32, whose round-off is 0.4 % for each term
    ours, theirs, without = (_flat(one) for one in (module, expected, plain))
    assert (ours - theirs).norm() < 0.06 * (theirs - without).norm()


def test_a_real_gradient_scaler_scales_the_penalty_in_fp16(tmp_path):
    module, batches = _module(), cases.tiny_batches(count=12)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    expected = _by_hand(module, batches, torch.float16, _KL, scaler=scalers[0])
    plain = _by_hand(module, batches, torch.float16, _KL, 0.0)
    _fit(tmp_path, module, plugins=[MixedPrecision("16-mixed", "cpu", scalers[1])])
    ours, theirs, without = (_flat(one) for one in (module, expected, plain))
    assert (ours - theirs).norm() < 0.02 * (theirs - without).norm()


@pytest.mark.parametrize("scale", [2.0**14, 2.0**40])
def test_a_gradient_is_scaled_through_fp16_and_taken_without_where_that_overflows(scale):
    weight = nn.Parameter(torch.ones(2))
    factor = 1e-9 if scale < 2**20 else 1e-3  # float16 holds 6e-8 and more
    scalar = factor * weight.half().sum().float()
    taken = SeparateGradient.take(scalar, Cut([weight], None), scale)
    assert_close(taken.gradients[0], torch.full((2,), factor), rtol=1e-3, atol=0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_below_the_round_off_is_taken_in_float32(tmp_path, accumulate, caplog):
    penalty, module = KLPenalty(step=1e-3), _module()
    expected = copy.deepcopy(module)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for index, (x, y) in enumerate(cases.tiny_batches(count=12)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(expected(x), y)
        ((loss + 0.7 * penalty(expected, x)) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    with caplog.at_level("INFO"):
        _fit(tmp_path, module, penalty, precision="bf16-mixed", accumulate_grad_batches=accumulate)
    assert "a forward of its own: the training step is under autocast" in caplog.text
    assert_close(module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


class _LeavesAutocast(cases.Plain):
    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", enabled=False):
            return super().training_step(batch, batch_idx)


def test_a_step_that_leaves_autocast_is_penalised_in_its_precision(tmp_path):
    torch.manual_seed(1)
    module, penalty = _LeavesAutocast(cases.tiny_network()), KLPenalty(step=0.02, geometry=LInf())
    expected = penalty(module.network, next(iter(cases.tiny_batches()))[0]).item()
    trainer = _fit(tmp_path, module, penalty, limit_train_batches=1, precision="bf16-mixed")
    assert trainer.callback_metrics["fisher/penalty"].item() == pytest.approx(expected, rel=1e-3)


def _share(tmp_path, penalty, batch_norm, **options):
    """What the penalty adds to the gradient of a step."""
    weights = []
    for weight in (0.0, 0.7):
        module = _module(batch_norm)
        _fit(tmp_path, module, penalty, weight=weight, limit_train_batches=1, **options)
        weights.append(_flat(module))
    return weights[0] - weights[1]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("penalty", [_KL, KLPenalty(step=0.1, geometry=LInf())])
def test_the_gradient_under_autocast_is_nearly_that_in_float32(tmp_path, penalty, batch_norm):
    half, full = (_share(tmp_path, penalty, batch_norm, precision=name) for name in ("bf16-mixed", "32-true"))
    assert torch.nn.functional.cosine_similarity(half, full, dim=0) > 0.95
    assert half.norm() / full.norm() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_network_is_penalised_in_the_precision_of_the_step(tmp_path, precision):
    dtypes = []

    class Watching(nn.Module):
        def forward(self, x):
            dtypes.append(torch.is_autocast_enabled("cpu"))
            return x

    torch.manual_seed(1)
    module = cases.Plain(nn.Sequential(Watching(), *cases.tiny_network()))
    module.network.compile(backend="eager")
    _fit(tmp_path, module, limit_train_batches=1, precision=precision)
    assert dtypes[-2:] == [precision == "bf16-mixed"] * 2  # at the inputs and at the end of the step


def _of_pairs(network, x, penalty):
    """Value and gradient of the penalty of each pair of examples, with the statistics of the whole batch."""
    model = trained(network, x)
    model(x)
    found = []
    for pair in itertools.combinations(range(len(x)), 2):
        value = penalty(model, x[list(pair)])
        gradient = torch.autograd.grad(value, list(network.parameters()), retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros_like(at) if one is None else one for one, at in zip(gradient, network.parameters(), strict=True)
        ]
        found.append((value.item(), torch.cat([one.flatten() for one in flat])))
    return found


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("penalty", [_KL, KLPenalty(step=0.1, geometry=LInf()), SpectralPenalty()])
def test_a_part_of_the_batch_has_the_value_and_the_gradient_of_its_examples(tmp_path, penalty, batch_norm):
    module, (x, _) = _module(batch_norm), next(iter(cases.tiny_batches()))
    possible = _of_pairs(module.network, x, penalty)
    share = _share(tmp_path, penalty, batch_norm, batch_fraction=0.5)
    trainer = _fit(tmp_path, module, penalty, batch_fraction=0.5, limit_train_batches=1)
    value = trainer.callback_metrics["fisher/penalty"].item()
    (gradient,) = [gradient for known, gradient in possible if abs(value / known - 1) < 1e-4]
    assert_close(share, 0.1 * 0.7 * gradient, rtol=1e-3, atol=1e-6)


def test_a_part_has_one_dropout_mask_at_both_ends_of_the_step(tmp_path):
    # two masks would move the logits by about 1, and the penalty would be of the order 1 / step^2 = 10^6
    trainer = _fit(tmp_path, _module(dropout=True), KLPenalty(step=1e-3), batch_fraction=0.5)
    assert trainer.callback_metrics["fisher/penalty"] < 10


def test_the_logits_of_a_part_are_those_of_the_step(tmp_path):
    # three forwards of the part would be one more than needed
    sizes = []

    class Watching(nn.Module):
        def forward(self, x):
            sizes.append((len(x), torch.is_grad_enabled()))
            return x

    torch.manual_seed(1)
    module = cases.Plain(nn.Sequential(Watching(), *cases.tiny_network()))
    _fit(tmp_path, module, batch_fraction=0.25, limit_train_batches=1)
    assert sizes[-3:] == [(4, True), (1, True), (1, True)]


class _Centred(nn.Module):
    """Takes the mean of the batch off, unseen by the rules of batch norm."""

    def forward(self, x):
        return x - x.mean(0)


def test_a_part_of_examples_that_depend_on_each_other_is_taken_by_itself(tmp_path, caplog):
    # the logits of the step have another mean taken off, and would make this 1.2
    first, *others = cases.tiny_network()
    module, (x, _) = cases.Plain(nn.Sequential(first, _Centred(), *others)), next(iter(cases.tiny_batches()))
    possible = [_KL(module.network, x[list(pair)]).item() for pair in itertools.combinations(range(4), 2)]
    with caplog.at_level("INFO"):
        trainer = _fit(tmp_path, module, batch_fraction=0.5, limit_train_batches=1)
    value = trainer.callback_metrics["fisher/penalty"].item()
    assert min(abs(value / known - 1) for known in possible) < 1e-3
    assert "the logits of a part of the batch differ" in caplog.text


class _Whole(nn.Module):
    """Adds to each example of a batch something of its own; one example alone gets as many rows."""

    def __init__(self, batch_size):
        super().__init__()
        self.network = cases.tiny_network()
        self.register_buffer("places", torch.linspace(0, 1, batch_size)[:, None])

    def forward(self, x):
        return self.network(x + self.places)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_model_that_gives_no_logits_of_a_part_is_penalised_at_whole_batches(tmp_path, batch_size, caplog):
    torch.manual_seed(1)
    module, batches = cases.Plain(_Whole(batch_size)), cases.tiny_batches(batch_size=batch_size)
    expected = _KL(module.network, next(iter(batches))[0]).item()
    with caplog.at_level("INFO"):
        trainer = _fit(tmp_path, module, batches=batches, batch_fraction=0.5, limit_train_batches=1)
    assert "penalises whole batches" in caplog.text
    assert trainer.callback_metrics["fisher/penalty"].item() == pytest.approx(expected, rel=1e-4)


def test_the_weight_is_by_default_that_of_the_penalty():
    assert FisherRegularizer().weight == pytest.approx(0.1)
    sign = KLPenalty(step=4 / 255, geometry=LInf())
    assert FisherRegularizer(penalty=sign).weight == pytest.approx(6 * (4 / 255) ** 2 / 2)
    assert FisherRegularizer(penalty=lambda model, inputs, generator=None: inputs.sum()).weight == 0.1
    assert FisherRegularizer(0.3, sign).weight == 0.3


def test_two_processes_equal_one_under_autocast(tmp_path):
    script = [sys.executable, "-m", "tests.callbacks.ddp_step", str(tmp_path), "bf16"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{devices}.pt", weights_only=True) for devices in (1, 2))
    for name, start in _module().state_dict().items():
        moved = one["parameters"][name] - start
        assert (two["parameters"][name] - start - moved).norm() < 0.02 * moved.norm()
    assert_close(two["logged"]["fisher/penalty"], one["logged"]["fisher/penalty"], rtol=0.02, atol=0)
