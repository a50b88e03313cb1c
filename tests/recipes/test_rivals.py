import torch
from torch import nn
from torch.testing import assert_close

from recipes.rivals import AdversarialTraining, InputGradientPenalty, VirtualAdversarialPenalty
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
