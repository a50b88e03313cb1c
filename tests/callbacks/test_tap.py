"""When the forward of a training step is reused, and when it must not be."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from fisher_reg import BoundPenalty, FisherRegularizer, KLPenalty, SpectralPenalty, TracePenalty
from fisher_reg.callbacks.tap import Tap
from fisher_reg.evaluation import SharedCopy
from recipes.models import zoo as models
from tests import cases

_KL = KLPenalty(step=0.3)


class _Calls:
    """Is outside of the module, since a penalty runs a copy of that."""

    count = 0


_CALLS = _Calls()


class _Counting(cases.Plain):
    """Counts the calls of its network on whole batches; a step of one's own may be given."""

    def __init__(self, network, step=None):
        super().__init__(network)
        self.step = step
        self.network.register_forward_pre_hook(self._add)
        _CALLS.count = 0

    @staticmethod
    def _add(part, args):
        if len(args[0]) == 4:  # the check before the first step takes two examples
            _CALLS.count += 1

    @property
    def count(self):
        return _CALLS.count

    def training_step(self, batch, batch_idx):
        if self.step is None:
            return super().training_step(batch, batch_idx)
        return self.step(self, *batch)


def _one_step(tmp_path, step=None, penalty=_KL, batch_norm=False, **options):
    """A module after one penalised step, the number of calls in it, and what was said."""
    torch.manual_seed(1)
    module = _Counting(cases.tiny_network(batch_norm), step)
    regularizer = FisherRegularizer(0.7, penalty, **({"every_n_steps": 1, "batch_fraction": 1.0} | options))
    trainer = cases.trainer(tmp_path, callbacks=[regularizer], limit_train_batches=1)
    trainer.fit(module, cases.tiny_batches())
    return module, trainer.callback_metrics["fisher/penalty"]


def _expected(penalty=_KL, batch_norm=False):
    torch.manual_seed(1)
    network, (x, _) = cases.tiny_network(batch_norm).train(), next(iter(cases.tiny_batches()))
    return penalty(network, x).detach()


_CE = nn.functional.cross_entropy


@pytest.mark.parametrize(
    ("step", "calls", "obstacle"),
    [  # one call to look, those of the step, the moved one; and one more where the penalty needs a forward of its own
        (None, 1 + 1 + 1, None),
        (lambda module, x, y: _CE(module.network(x), y), 1 + 1 + 1, None),
        (lambda module, x, y: _CE(module(x=x), y), 1 + 1 + 1, None),  # the network inside gets the inputs alone
        (lambda module, x, y: _CE(module(x), y) + _CE(module(x.flip(0)), y), 1 + 2 + 1, None),
        (lambda module, x, y: _CE(module(x + 1), y), 1 + 1 + 2, "did not call forward"),
        (lambda module, x, y: _CE(module(x), y) + _CE(module(x), y), 1 + 2 + 2, "more than once"),
        (lambda module, x, y: _CE(module(x), y) + module.network[0](x).sum(), 1 + 1 + 2, "more than once"),
        (lambda module, x, y: _CE(module.network[4](module.network[:4](x)), y), 1 + 0 + 2, "gave 0 logits"),
        (lambda module, x, y: _CE(module(x).bfloat16(), y), 1 + 1 + 1, None),
        (lambda module, x, y: _CE(module(x), y) + 0 * x.zero_().sum(), 1 + 1 + 2, "changed the inputs in place"),
    ],
)
def test_a_forward_is_reused_where_it_is_that_of_the_inputs(tmp_path, step, calls, obstacle, caplog):
    with caplog.at_level("INFO"):
        module, penalty = _one_step(tmp_path, step)
    assert module.count == calls
    assert_close(penalty, _expected(), rtol=1e-5, atol=1e-8)
    assert caplog.text.count("runs a forward of its own") == (obstacle is not None)
    assert obstacle is None or obstacle in caplog.text


@pytest.mark.parametrize("penalty", [SpectralPenalty(), SpectralPenalty(num_steps=2), TracePenalty()])
@pytest.mark.parametrize(("batch_norm", "calls"), [(False, 2), (True, 2)])
def test_second_derivatives_reuse_a_forward_without_batch_norm(tmp_path, monkeypatch, penalty, batch_norm, calls):
    # which takes the whole of a small batch for the statistics of batch norm
    monkeypatch.setattr("fisher_reg.callbacks.regularizer.report_check", lambda *args, **kwargs: None)
    # with batch norm: the step's own and one more on its statistics; without: one to look and the step's own
    module, value = _one_step(tmp_path, penalty=penalty, batch_norm=batch_norm)
    assert module.count == calls
    if not isinstance(penalty, TracePenalty):
        assert_close(value, _expected(penalty, batch_norm), rtol=1e-5, atol=1e-8)


class _Mixing(nn.Module):
    """Mixes hidden features across the batch while training, outside of what gives the logits."""

    def __init__(self, network):
        super().__init__()
        self.body, self.head = network[:4], network[4]

    def forward(self, x):
        return self.head(self.body(x))


def test_logits_of_another_call_are_not_taken_for_those_of_the_inputs(tmp_path, caplog):
    def step(module, x, y):
        hidden = module.network.body(x)
        return _CE(module.network.head(0.5 * hidden + 0.5 * hidden.flip(0)), y)

    torch.manual_seed(1)
    network = cases.tiny_network()
    module = _Counting(_Mixing(network), step)
    expected = _KL(copy.deepcopy(network), next(iter(cases.tiny_batches()))[0]).detach()
    regularizer = FisherRegularizer(0.7, _KL, every_n_steps=1, batch_fraction=1.0)
    trainer = cases.trainer(tmp_path, callbacks=[regularizer], limit_train_batches=1)
    with caplog.at_level("INFO"):
        trainer.fit(module, cases.tiny_batches())
    assert_close(trainer.callback_metrics["fisher/penalty"], expected, rtol=1e-5, atol=1e-8)
    assert "runs a forward of its own: the forward of the training step gave 0 logits" in caplog.text


def test_a_coupled_graph_changes_the_direction_only(tmp_path):
    # through batch norm the direction is that of the sum over a batch, so that the value is a little smaller or larger
    _, reused = _one_step(tmp_path, batch_norm=True)
    assert_close(reused, _expected(batch_norm=True), rtol=0.1, atol=0)


def test_looking_for_the_tap_leaves_no_trace():
    torch.manual_seed(0)
    module = cases.Plain(cases.tiny_network(batch_norm=True, dropout=True)).train()
    x, state, numbers = torch.randn(8, 6), copy.deepcopy(module.state_dict()), torch.get_rng_state()
    tap = Tap.find(module, SharedCopy(module, is_deployed=False), x)
    assert_close(module.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [type(part).__name__ for part in tap.inlets] == ["Plain", "Sequential", "Linear"]
    assert [type(part).__name__ for part in tap.outlets] == ["Linear", "Sequential", "Plain"]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_an_operation_in_place_on_the_inputs_is_differentiated_too(tmp_path):
    class InPlace(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x.mul_(2.0))

    torch.manual_seed(1)
    network, (x, _) = cases.tiny_network(), next(iter(cases.tiny_batches()))
    expected = _KL(lambda inputs: network(2 * inputs), x).detach()
    module = _Counting(InPlace(network))
    regularizer = FisherRegularizer(0.7, _KL, every_n_steps=1, batch_fraction=1.0)
    trainer = cases.trainer(tmp_path, callbacks=[regularizer], limit_train_batches=1)
    trainer.fit(module, cases.tiny_batches())
    assert_close(trainer.callback_metrics["fisher/penalty"], expected, rtol=1e-5, atol=1e-8)
    assert module.count == 4  # a forward of its own: the step goes on with the inputs as it has changed them


def test_dropout_keeps_the_masks_of_the_step(tmp_path):
    torch.manual_seed(1)
    module = cases.Plain(cases.tiny_network(dropout=True))
    trainer = cases.trainer(
        tmp_path,
        callbacks=[FisherRegularizer(0.7, KLPenalty(step=1e-3), every_n_steps=1, batch_fraction=1.0)],
        limit_train_batches=1,
    )
    trainer.fit(module, cases.tiny_batches())
    assert trainer.callback_metrics["fisher/penalty"] < 10  # other masks leave a divergence over 1e-6


def _value(tmp_path, module, regularizer, **options):
    trainer = cases.trainer(tmp_path, callbacks=regularizer, **({"limit_train_batches": 1} | options))
    trainer.fit(module, cases.tiny_batches())
    return {key: value for key, value in trainer.callback_metrics.items() if key.startswith("fisher/penalty")}


def _in_place(module, x, y):
    return _CE(module(x).mul_(5.0), y)


def _other_weights(module, x, y):
    fast = {name: 2 * parameter for name, parameter in module.network.named_parameters()}
    return _CE(torch.func.functional_call(module.network, fast, (x,)), y)


def _other_mode(module, x, y):
    module.network.eval()
    logits = module(x)
    module.network.train()
    return _CE(logits, y)


def _fast_gradient(module, x, y):
    x.requires_grad_()
    (slope,) = torch.autograd.grad(_CE(module(x), y), x)
    return _CE(module(x + 0.1 * slope.sign()), y)


@pytest.mark.parametrize(
    ("step", "obstacle"),
    [
        (_in_place, "changed the logits in place"),
        (_other_weights, "changed weights or modes"),
        (_other_mode, "changed weights or modes"),
        (_fast_gradient, "carry a gradient of their own"),
    ],
)
def test_a_forward_that_is_not_the_one_of_the_module_is_not_reused(tmp_path, step, obstacle, caplog):
    with caplog.at_level("INFO"):
        _, penalty = _one_step(tmp_path, step)
    assert_close(penalty, _expected(), rtol=1e-5, atol=1e-8)
    assert obstacle in caplog.text


def test_a_part_whose_output_is_changed_in_place_is_no_outlet():
    class Scaled(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            logits = self.network(x)
            logits *= 3.0
            return logits

    module = Scaled(cases.tiny_network())
    tap = Tap.find(module, SharedCopy(module, is_deployed=False), torch.randn(4, 6))
    assert tap.outlets == [module]


def test_two_regularizers_with_other_logits_or_needs_share_no_forward(tmp_path):
    torch.manual_seed(1)
    network, (x, _) = cases.tiny_network(batch_norm=True), next(iter(cases.tiny_batches()))
    sharper = lambda module, inputs: 4 * module.network(inputs)  # noqa: E731
    expected = _KL(lambda inputs: 4 * network(inputs), x), SpectralPenalty()(network, x)
    others = [
        FisherRegularizer(0.7, _KL, every_n_steps=1, batch_fraction=1.0, logits_fn=sharper),
        FisherRegularizer(0.7, SpectralPenalty(), every_n_steps=1, batch_fraction=1.0),
    ]
    values = _value(
        tmp_path, cases.Plain(network), [FisherRegularizer(0.7, _KL, every_n_steps=1, batch_fraction=1.0), *others]
    )
    assert_close(values["fisher/penalty_3"], expected[1].detach(), rtol=1e-5, atol=1e-8)
    torch.manual_seed(1)
    plain = cases.Plain(cases.tiny_network())
    expected = _KL(lambda inputs: 4 * plain.network(inputs), x).detach()
    values = _value(tmp_path, plain, [FisherRegularizer(0.7, _KL, every_n_steps=1, batch_fraction=1.0), others[0]])
    assert_close(values["fisher/penalty_2"], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("penalties", [(SpectralPenalty(),), (_KL, SpectralPenalty())])
def test_attention_is_differentiated_twice_where_it_is_asked_for(tmp_path, penalties):
    # beside one without second derivatives, which lets the step run on the fused kernel, and alone
    torch.manual_seed(1)
    network = models.vit(models.ImageSpec(4, 1, 8, (0.5,), (0.5,)), 4, 1, 2, 8, 16)
    nn.init.normal_(network.network.heads.head.weight)
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    expected = SpectralPenalty()(network, x).detach()
    regularizers = [FisherRegularizer(0.7, penalty, every_n_steps=1, batch_fraction=1.0) for penalty in penalties]
    trainer = cases.trainer(tmp_path, callbacks=regularizers)
    trainer.fit(cases.Plain(network), DataLoader(TensorDataset(x, y), batch_size=4))
    key = "fisher/penalty" if len(penalties) == 1 else "fisher/penalty_2"
    assert_close(trainer.callback_metrics[key], expected, rtol=1e-4, atol=1e-7)


def test_inputs_that_the_forward_changes_in_place_are_penalised_as_the_batch_had_them(tmp_path):
    def step(module, x, y):
        return _CE(module(x.sub_(1.0)), y)

    two_class = SpectralPenalty()
    _, penalty = _one_step(tmp_path, step, two_class, batch_fraction=0.999)  # a forward of its own
    assert_close(penalty, _expected(two_class), rtol=1e-5, atol=1e-8)


def test_a_scripted_part_is_left_alone(tmp_path):
    torch.manual_seed(1)
    module = cases.Plain(cases.tiny_network())
    module.teacher = torch.jit.script(nn.Linear(6, 4))
    values = _value(tmp_path, module, [FisherRegularizer(0.7, _KL, every_n_steps=1, batch_fraction=1.0)])
    assert_close(values["fisher/penalty"], _expected(), rtol=1e-5, atol=1e-8)


def test_the_bound_keeps_the_precision_of_the_loss(tmp_path):
    module, losses = cases.Plain(cases.tiny_network()), []
    module.backward = lambda loss: (losses.append(loss.dtype), loss.backward())
    _value(tmp_path, module, [FisherRegularizer(0.7, BoundPenalty(), every_n_steps=1, batch_fraction=1.0)])
    assert losses == [torch.float32]


def test_a_manual_step_without_manual_backward_is_told(tmp_path):
    module = _Counting(cases.tiny_network(), lambda module, x, y: _CE(module(x), y).backward())
    module.automatic_optimization = False
    with pytest.warns(UserWarning, match="The penalty was not added.*did not call self.manual_backward"):
        _value(
            tmp_path, module, [FisherRegularizer(0.7, _KL, every_n_steps=1, batch_fraction=1.0)], limit_train_batches=2
        )
