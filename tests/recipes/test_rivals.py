import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recipes.competitors.penalties import (
    AdversarialTraining,
    FastAdversarialTraining,
    InputGradientPenalty,
    TradesPenalty,
    VirtualAdversarialPenalty,
)
from tests import cases


def _gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)


def test_the_input_gradient_is_that_of_the_cross_entropy():
    torch.manual_seed(0)
    model, x, y = cases.tiny_network().double(), torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    inputs = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(inputs), y, reduction="sum")
    (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
    expected = slope.square().sum(1).mean()
    penalty = InputGradientPenalty()(model, x, labels=y)
    assert_close(penalty, expected)
    assert_close(_gradients(penalty, model), _gradients(expected, model))


def test_the_virtual_adversarial_penalty_is_the_divergence_at_its_own_step():
    torch.manual_seed(0)
    model, x = cases.tiny_network().double(), torch.randn(5, 6, dtype=torch.float64)
    start = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    p = model(x).softmax(1).detach()

    def divergence(inputs):
        return (p * (p.log() - model(inputs).log_softmax(1))).sum(1)

    probe = (x + 0.1 * nn.functional.normalize(start)).requires_grad_()
    (slope,) = torch.autograd.grad(divergence(probe).sum(), probe)
    expected = divergence(x + 0.5 * nn.functional.normalize(slope)).mean()
    penalty = VirtualAdversarialPenalty(0.5)(model, x, generator=torch.Generator().manual_seed(3))
    assert_close(penalty, expected)
    assert_close(_gradients(penalty, model), _gradients(expected, model))


def test_adversarial_training_attacks_each_batch_once(tmp_path, digits):
    seen = []

    class Watching(cases.Plain):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    module = Watching(cases.network("vgg", digits))
    images = [(part.clone(), label) for part, label in digits.splits["train"]][:8]
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    trainer = cases.trainer(tmp_path, callbacks=[AdversarialTraining(0.05)])
    trainer.fit(module, loader)
    for before, after in zip((batch[0] for batch in loader), seen, strict=True):
        assert 0 < (after - before).abs().max() <= 0.05 * 1.001


def _published_trades(function, x, num_steps):
    """The loss of TRADES by its published steps: KL(p_x || p_adv) at x_adv, with gradient on both sides."""
    start = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    moved, clean = x + 0.001 * start, function(x).detach().softmax(1)
    for _ in range(num_steps):
        moved = moved.detach().requires_grad_()
        loss = nn.functional.kl_div(function(moved).log_softmax(1), clean, reduction="sum")
        moved = moved.detach() + 2 / 255 * torch.autograd.grad(loss, moved)[0].sign()
        moved = moved.clamp(x - 8 / 255, x + 8 / 255).clamp(0, 1)
    log_p, log_q = function(x).log_softmax(1), function(moved).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum() / len(x)


@pytest.mark.parametrize("num_steps", [1, 10])
def test_the_trades_penalty_is_the_divergence_at_its_own_attack(num_steps):
    torch.manual_seed(0)
    model, x = cases.tiny_network().double(), torch.rand(5, 6, dtype=torch.float64)
    x[0], x[1] = 0.0, 1.0
    expected = _published_trades(model, x, num_steps)
    penalty = TradesPenalty(num_steps=num_steps)(model, x, generator=torch.Generator().manual_seed(3))
    assert_close(penalty, expected)
    assert_close(_gradients(penalty, model), _gradients(expected, model))
    assert TradesPenalty().default_weight == 6


def test_the_trades_penalty_keeps_the_batch_statistics_of_the_training_step():
    torch.manual_seed(0)
    model, x = cases.tiny_network(batch_norm=True).double().train(), torch.rand(8, 6, dtype=torch.float64)
    first, norm, _, _, last = model
    hidden = first(x)
    mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)

    def function(inputs):
        return last(((first(inputs) - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias).tanh())

    expected = _published_trades(function, x, 3)
    penalty = TradesPenalty(num_steps=3)(model, x, generator=torch.Generator().manual_seed(3))
    assert_close(penalty, expected)
    assert_close(_gradients(penalty, model), _gradients(expected, model), rtol=1e-6, atol=1e-12)


def test_fast_adversarial_training_does_the_published_step(tmp_path):
    torch.manual_seed(0)
    network, x, y = cases.tiny_network(batch_norm=True), torch.rand(8, 6), torch.arange(8) % 4
    by_hand = cases.tiny_network(batch_norm=True)
    by_hand.load_state_dict(network.state_dict())
    torch.manual_seed(5)
    start = (x + 0.1 * (2 * torch.rand(8, 6) - 1)).clamp(0, 1).requires_grad_()
    slope = torch.autograd.grad(nn.functional.cross_entropy(by_hand(start), y), start)[0]
    moved = (start.detach() + 0.125 * slope.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    nn.functional.cross_entropy(by_hand(moved), y).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()

    class Seeding(FastAdversarialTraining):
        def on_train_batch_start(self, *args):
            torch.manual_seed(5)
            super().on_train_batch_start(*args)

    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    cases.trainer(tmp_path, callbacks=[Seeding(0.1)]).fit(cases.Plain(network), batches)
    assert by_hand[1].num_batches_tracked == 2
    assert_close(network.state_dict(), by_hand.state_dict())
