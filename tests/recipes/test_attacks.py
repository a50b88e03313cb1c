import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recipes.attacks import (
    AutoAttack,
    AutoProjectedGradient,
    CarliniWagner,
    MinimalPerturbation,
    ProjectedGradient,
    attack_all,
)

ATTACKS = {
    "pgd, l2": (ProjectedGradient(2, 0.5, 10), 2, 0.5),
    "pgd, linf": (ProjectedGradient(math.inf, 0.05, 10, step_size=0.02), math.inf, 0.05),
    "carlini and wagner": (CarliniWagner(), 2, math.inf),
    "minimal": (MinimalPerturbation(20), 2, math.inf),
    "auto-pgd": (AutoProjectedGradient(2, 0.5, 10), 2, 0.5),
    "auto-attack": (AutoAttack(math.inf, 0.05, 10, num_queries=10), math.inf, 0.05),
}
EVERY_ATTACK = pytest.mark.parametrize(("attack", "norm", "epsilon"), ATTACKS.values(), ids=ATTACKS)


def _linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return nn.Sequential(nn.Flatten(), layer)


@EVERY_ATTACK
def test_an_attack_stays_in_its_ball_and_leaves_everything_alone(trained, digits, attack, norm, epsilon):
    network = copy.deepcopy(trained).train()
    images, labels = (part[:24] for part in digits.splits["test"].tensors)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(network.parameters()).requires_grad_(False)
    state, given, random = copy.deepcopy(network.state_dict()), images.clone(), np.random.get_state()[1].copy()
    with torch.inference_mode():
        attacked = attack(network, images, labels)
    assert 0 <= attacked.min() <= attacked.max() <= 1
    assert (attacked - images).flatten(1).norm(norm, dim=1).max() <= epsilon * 1.001
    assert_close(network.state_dict(), state, rtol=0, atol=0)
    assert_close(images, given, rtol=0, atol=0)
    assert (np.random.get_state()[1] == random).all()
    assert all(module.training for module in network.modules())
    frozen, *others = network.parameters()
    assert not frozen.requires_grad
    assert all(parameter.requires_grad and (parameter.grad == 1).all() for parameter in others)


@EVERY_ATTACK
def test_an_attack_repeats_itself_under_the_same_seed(trained, digits, attack, norm, epsilon):
    images, labels = (part[:8] for part in digits.splits["test"].tensors)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(attack(trained, images, labels))
    assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_attacks_lower_the_accuracy_and_the_stronger_one_more(trained, digits):
    torch.manual_seed(0)
    images, labels = (part[:24] for part in digits.splits["test"].tensors)
    clean = (trained(images).argmax(1) == labels).double().mean().item()
    weak, strong = (attack_all(ProjectedGradient(2, r, 10), trained, images, labels).accuracy for r in (0.1, 2.0))
    assert strong < weak <= clean
    assert attack_all(AutoAttack(2, 2.0, num_queries=20), trained, images, labels).accuracy <= strong + 1e-9


@pytest.mark.parametrize("num_classes", [2, 4])
def test_every_attack_knows_two_classes_and_more(num_classes):
    torch.manual_seed(0)
    network, images = _linear(torch.randn(num_classes, 64)), torch.rand(10, 1, 8, 8)
    labels = network(images).argmax(1)
    for attack, _, epsilon in ATTACKS.values():
        result = attack_all(attack, network, images, labels)
        assert result.misclassified.any()
        assert result.accuracy == (network(result.images).argmax(1) == labels).double().mean()
        assert (result.euclidean <= epsilon * 64**0.5 * 1.001).all()


def test_the_nearest_adversarial_example_of_a_linear_network_lies_at_its_boundary():
    torch.manual_seed(0)
    weight = torch.randn(2, 12)
    network, images = _linear(weight), 0.3 + 0.4 * torch.rand(20, 1, 3, 4)
    logits = network(images)
    distance = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm()
    found = attack_all(MinimalPerturbation(), network, images, logits.argmax(1))
    assert found.misclassified.all()
    assert (found.euclidean >= distance * (1 - 1e-5)).all()
    assert_close(found.euclidean, distance, rtol=0.1, atol=0.01)
    carlini = attack_all(CarliniWagner(10.0, 200, num_searches=5), network, images, logits.argmax(1))
    assert_close(carlini.euclidean, distance, rtol=0.1, atol=0.01)


def test_an_attack_that_finds_nothing_gives_the_image_back():
    network = _linear(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))  # black is the only image of the second class
    images, labels = torch.full((1, 1, 1, 2), 0.9), torch.tensor([0])
    assert_close(CarliniWagner(constant=1e-3, num_steps=2)(network, images, labels), images)


def test_an_attack_that_changes_nothing_is_told():
    torch.manual_seed(0)
    weight, images = 1e4 * torch.randn(3, 12), torch.rand(10, 1, 3, 4)
    network = _linear(weight)
    labels = network(images).argmax(1)
    saturated = ProjectedGradient(2, 0.05, 5)
    with pytest.warns(UserWarning, match=r"ProjectedGradient could not attack \d+ of the \d+ images that are still"):
        masked = attack_all(saturated, network, images, labels)
    assert masked.masked.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack_all(saturated, _linear(weight / 1e4), images, labels)
    constant = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Threshold(1e6, 0.0))
    with pytest.warns(UserWarning, match="could not attack 10 of the 10 images"):
        attack_all(CarliniWagner(), constant, images, torch.zeros(10, dtype=torch.long))


@pytest.mark.parametrize("scale", [255.0, -1.0, math.nan])
def test_images_that_are_no_pixels_are_refused(scale):
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\].*they are in .*Divide by 255.*Normalize"):
        attack_all(CarliniWagner(), _linear(torch.ones(2, 4)), scale * torch.ones(2, 1, 2, 2), torch.zeros(2).long())


def test_examples_made_for_one_network_are_not_those_of_another(digits):
    images, labels = (part[:8] for part in digits.splits["test"].tensors)
    torch.manual_seed(0)
    networks = [_linear(torch.randn(10, 256)) for _ in range(2)]
    made = []
    for network in networks:
        torch.manual_seed(1)
        made.append(attack_all(MinimalPerturbation(20), network, images, network(images).argmax(1)))
    for network, result in zip(networks, made, strict=True):
        assert ((network(result.images).argmax(1) != network(images).argmax(1)) == result.misclassified).all()
    assert (made[0].images - made[1].images).abs().amax() > 1e-3


def test_balls_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="norm must be 2 or infinity; got 1"):
        AutoAttack(1, 0.5)
    with pytest.raises(ValueError, match=r"positive radius in pixel units, such as 8/255; got 0"):
        AutoProjectedGradient(2, 0.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ProjectedGradient(2, 0.5, num_steps=0),
        lambda: CarliniWagner(num_steps=0),
        lambda: CarliniWagner(num_searches=0),
        lambda: MinimalPerturbation(num_steps=-1),
        lambda: AutoProjectedGradient(2, 0.5, num_steps=0),
        lambda: AutoAttack(2, 0.5, num_queries=0),
    ],
)
def test_an_attack_that_would_do_nothing_is_refused(build):
    with pytest.raises(ValueError, match="must be at least 1, or the attack does nothing"):
        build()
