import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recipes.competitors import measures as baselines
from recipes.competitors.measures import (
    class_gradients,
    input_gradient_norm,
    linearised_distance,
    local_lipschitz,
    margin,
)
from tests import cases

MEASURES = {
    "local_lipschitz": local_lipschitz,
    "input_gradient_norm": lambda network, images: input_gradient_norm(network, images, torch.arange(len(images)) % 4),
    "linearised_distance": linearised_distance,
}


def _linear(weight, bias=None):
    weight = torch.as_tensor(weight, dtype=torch.float64)
    bias = torch.zeros(len(weight)) if bias is None else torch.as_tensor(bias)
    network = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), dtype=torch.float64))
    network.load_state_dict({"1.weight": weight, "1.bias": bias.double()})
    return network


def _slopes(function, images):
    """Gradients of a function to (B,), one image at a time."""
    points = [image[None].clone().requires_grad_() for image in images]
    return torch.cat([torch.autograd.grad(function(point)[0], point)[0] for point in points]).flatten(1)


@pytest.fixture
def network():
    return cases.tiny_network(batch_norm=True).double().eval()


@pytest.fixture
def images():
    return torch.rand(7, 6, dtype=torch.float64)


def test_the_margin_is_between_the_two_largest_logits():
    assert_close(margin(torch.tensor([[1.0, -2.0, 4.0], [3.0, 3.0, 0.0]])), torch.tensor([3.0, 0.0]))


def test_a_margin_needs_two_classes():
    with pytest.raises(ValueError, match="K >= 2"):
        margin(torch.zeros(3, 1))


def test_the_distance_of_a_linear_network_is_that_to_the_nearest_hyperplane():
    network = _linear([[3.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 0, 0]], [5.0, 0.0, 2.0])
    images = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    # to class 1: 5 / |(3, -4)| = 1; to class 2: 3 / |(3, 0)| = 1
    assert_close(linearised_distance(network, images), torch.ones(1, dtype=torch.float64))
    images[0, 0, 0, 1] = 0.5  # class 1 gains 4 * 0.5: 3 / 5
    assert_close(linearised_distance(network, images), torch.full((1,), 0.6, dtype=torch.float64))


def test_where_no_gradient_separates_the_classes_the_boundary_is_infinitely_far():
    same = _linear([[1.0, 2.0], [1.0, 2.0]], [1.0, 0.0])
    images = torch.rand(3, 1, 1, 2, dtype=torch.float64)
    assert_close(linearised_distance(same, images), torch.full((3,), torch.inf, dtype=torch.float64))
    tied = _linear([[0.0, 0.0], [0.0, 0.0]])
    assert_close(linearised_distance(tied, images), torch.full((3,), torch.inf, dtype=torch.float64))


def test_the_slopes_of_two_classes_are_those_of_the_logistic_function():
    weight = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    network, images = _linear(weight), torch.rand(5, 1, 1, 3, dtype=torch.float64)
    p = network(images).softmax(1).detach()
    length = (weight[0] - weight[1]).norm()
    assert_close(local_lipschitz(network, images), p[:, 0] * p[:, 1] * length)
    assert_close(input_gradient_norm(network, images, torch.ones(5, dtype=torch.long)), p[:, 0] * length)


def test_the_lipschitz_constant_is_the_largest_gradient_of_a_probability(network, images):
    slopes = [_slopes(lambda x, k=k: network(x).softmax(1)[:, k], images).norm(dim=1) for k in range(4)]
    assert_close(local_lipschitz(network, images), torch.stack(slopes).amax(0))


def test_the_loss_gradient_is_that_of_the_cross_entropy(network, images):
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    expected = [
        _slopes(lambda x, y=y: nn.functional.cross_entropy(network(x), y[None])[None], image[None]).norm()
        for image, y in zip(images, labels, strict=True)
    ]
    assert_close(input_gradient_norm(network, images, labels), torch.stack(expected))


def test_the_distance_is_that_of_the_first_step_of_deepfool(network, images):
    expected = []
    for image in images:
        logits = network(image[None])[0].detach()
        c = int(logits.argmax())
        slopes = {j: _slopes(lambda x, c=c, j=j: network(x)[:, c] - network(x)[:, j], image[None]) for j in range(4)}
        expected.append(min((logits[c] - logits[j]) / slopes[j].norm() for j in range(4) if j != c))
    assert_close(linearised_distance(network, images), torch.stack(expected))


def test_trained_networks_give_the_same_with_many_images_as_with_one(trained, digits):
    images = cases.test_images(digits, 6)
    for measure in MEASURES.values():
        single = torch.cat([measure(trained, images[i : i + 1].clone()) for i in (0, 4)])  # labels 0, 0
        assert_close(measure(trained, images)[[0, 4]], single, rtol=1e-3, atol=1e-6)


def test_parts_are_bounded_and_change_nothing(network, images, monkeypatch):
    whole = {name: measure(network, images) for name, measure in MEASURES.items()}
    monkeypatch.setattr(baselines, "_MAX_NUMBERS", 2 * 4 * 6)
    assert [len(logits) for logits, _ in class_gradients(network, images)] == [2, 2, 2, 1]
    monkeypatch.setattr(baselines, "_MAX_IMAGES", 1)
    assert [gradients.shape for _, gradients in class_gradients(network, images)] == [(1, 4, 6)] * 7
    assert_close({name: measure(network, images) for name, measure in MEASURES.items()}, whole)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_reads_the_network_in_evaluation_and_leaves_no_trace(name, images):
    network = cases.tiny_network(batch_norm=True, dropout=True).double()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    flags = [module.training for module in network.modules()]
    state, given = copy.deepcopy(network.state_dict()), images.clone()
    values = MEASURES[name](network, images)
    assert [module.training for module in network.modules()] == flags
    assert all(parameter.grad is None for parameter in network.parameters())
    assert [parameter.requires_grad for parameter in network.parameters()][:2] == [False, True]
    assert_close(network.state_dict(), state, rtol=0, atol=0)
    assert_close(images, given, rtol=0, atol=0)
    assert not values.requires_grad
    assert_close(values, MEASURES[name](copy.deepcopy(network).eval(), images))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_works_where_autograd_is_off(name, context, network, images):
    expected = MEASURES[name](network, images)
    with context():
        values = MEASURES[name](network, images.clone())
    assert_close(values, expected)


@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.long), torch.zeros(7)])
def test_labels_are_one_class_per_image(labels, network, images):
    with pytest.raises(ValueError, match="one class for each of the 7 images"):
        input_gradient_norm(network, images, labels)
