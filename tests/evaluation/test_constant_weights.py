"""The copy of the deployed function has constant weights: its graph saves nothing for their gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from fisher_reg import Lanczos, fisher_spectral_norm
from fisher_reg.evaluation import SharedCopy, deployed, deployed_with_gradient, trained, twice_differentiable
from tests import cases


def _saved_bytes(function, x):
    """Return the bytes that the graph of a forward saves, each storage once, beside parameters."""
    storages, x = {}, x.clone().requires_grad_()

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in function.parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.fixture(scope="module")
def vit():
    data = cases.digits()
    model = cases.network("vit", data).eval()
    nn.init.normal_(model.network.heads.head.weight)  # it begins at zero
    return model, cases.test_images(data, 4)


def test_the_graph_of_a_transformer_saves_a_third_less(vit):
    model, x = vit
    with_gradient = _saved_bytes(SharedCopy(model, is_deployed=True).model, x)
    constant = _saved_bytes(deployed(model, x).source.model, x)
    assert constant < 0.67 * with_gradient
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert constant == _saved_bytes(SharedCopy(frozen, is_deployed=True).model, x)


def test_logits_and_gradients_are_the_same_to_the_last_bit(vit):
    model, x = vit
    logits, gradients = [], []
    for make in (deployed, deployed_with_gradient):
        point = x.clone().requires_grad_()
        with twice_differentiable():
            logits.append(make(model, x)(point))
        gradients.append(torch.autograd.grad(logits[-1].square().sum(), point, create_graph=True)[0])
        gradients.append(torch.autograd.grad(gradients[-1].square().sum(), point)[0])
    assert torch.equal(*logits)
    assert torch.equal(gradients[0], gradients[2])
    assert_close(
        gradients[1], gradients[3], rtol=1e-5, atol=1e-5 * float(gradients[3].abs().max())
    )  # sums in any order


def test_a_frozen_model_gives_the_same_estimate(vit):
    model, x = vit
    frozen = copy.deepcopy(model).requires_grad_(False)
    found, expected = (fisher_spectral_norm(one, x, solver=Lanczos()) for one in (frozen, model))
    assert torch.equal(found.eigenvalue, expected.eigenvalue)


class Weights(nn.Module):
    """Weights of every kind that a module can have."""

    def __init__(self):
        super().__init__()
        self.tied = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.tied.weight
        self.parametrized = parametrizations.weight_norm(nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.listed = nn.ParameterList([torch.randn(6)])
        self.plain = torch.randn(6, requires_grad=True)
        self.tied.weight.note = "of the user"

    def forward(self, x):
        assert self.tied.weight is self.again.weight
        assert self.tied.weight.note == "of the user"
        x = self.norm(self.parametrized(self.again(self.tied(x).tanh()).tanh()))
        return (x * self.listed[0] * self.plain)[:, :4]


def test_weights_of_every_kind_share_their_storage_and_require_no_gradient():
    model = Weights().eval()
    x = torch.randn(3, 6)
    copied = deployed(model, x).source.model
    pairs = [*zip(model.parameters(), copied.parameters(), strict=True), (model.plain, copied.plain)]
    for original, constant in pairs:
        assert type(constant) is type(original)
        assert constant.data_ptr() == original.data_ptr()
        assert original.requires_grad
        assert not constant.requires_grad
    assert_close(deployed(model, x)(x), model(x))


@pytest.mark.parametrize("make", [deployed_with_gradient, trained])
def test_functions_that_are_trained_reach_the_users_parameters(make):
    model, x = cases.tiny_network(batch_norm=True), torch.randn(4, 6)
    torch.autograd.grad(make(model, x)(x).square().sum(), list(model.parameters()))
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(deployed(model, x)(x).square().sum(), list(model.parameters()))


class Fitted(nn.Module):
    """A network that takes a step of its weights at each input before it predicts."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        with torch.enable_grad():
            hidden = self.encoder(x)
            (step,) = torch.autograd.grad((hidden - x).square().sum(), self.encoder.weight, create_graph=True)
        return self.head(nn.functional.linear(x, self.encoder.weight - 0.1 * step).tanh())


def test_a_forward_that_differentiates_its_own_weights_gets_weights_with_gradients():
    model, x = Fitted(), torch.randn(1, 6)
    function = deployed(model, x)
    assert_close(function(x), model(x))
    assert next(function.parameters()) is model.encoder.weight
    assert bool(fisher_spectral_norm(model, x).converged.all())


class Scaled(nn.Parameter):
    """A parameter of a class of the user's own."""


def test_parameters_of_other_classes_stay_themselves():
    model = nn.Linear(6, 4)
    model.weight = Scaled(model.weight.detach())
    assert deployed(model, torch.randn(1, 6)).source.model.weight is model.weight


def test_half_precision_is_promoted_without_a_graph_to_the_weights():
    model = cases.tiny_network().bfloat16()
    copied = deployed(model, torch.randn(1, 6)).source.model
    assert all(weight.dtype == torch.float32 and weight.grad_fn is None for weight in copied.parameters())
