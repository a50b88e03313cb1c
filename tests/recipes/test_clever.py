import copy
import math

import pytest
import scipy.stats
import torch
from art.estimators.classification import PyTorchClassifier
from art.metrics import metrics as toolbox
from torch import nn
from torch.testing import assert_close

from recipes.competitors.clever import Clever, batch_maxima
from recipes.statistics.endpoints import upper_ends
from tests import cases


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _toolbox_score(monkeypatch, network, image, clever, generator):
    """clever_u on the very points and places that ours draws, with our fit."""
    points = clever.points(image, clever.pool_factor * clever.batch_size, generator)
    places = clever.batches(generator).numpy()
    offsets = (points - image).flatten(1).double().numpy()
    queue = iter(())

    def sphere(**_):
        nonlocal queue
        queue = iter(places)  # each target class draws anew
        return offsets.copy()

    monkeypatch.setattr(toolbox, "random_sphere", sphere)
    monkeypatch.setattr(toolbox.np.random, "choice", lambda *_: next(queue))
    monkeypatch.setattr(toolbox.weibull_min, "fit", lambda negated, *_, **__: (0, -upper_ends(-negated[None])[0], 0))
    num_classes = network(image[None]).shape[1]
    classifier = PyTorchClassifier(
        network, nn.CrossEntropyLoss(), image.shape, num_classes, clip_values=(0.0, 1.0), device_type="cpu"
    )
    sizes = (clever.num_batches, clever.batch_size, clever.radius, clever.norm)
    return toolbox.clever_u(classifier, image.numpy(), *sizes, pool_factor=clever.pool_factor, verbose=False)


@pytest.mark.parametrize(("norm", "radius"), [(2, 5.0), (math.inf, 0.3)])
def test_scores_are_those_of_the_toolbox_on_the_same_points(monkeypatch, trained, digits, norm, radius):
    images = cases.test_images(digits, 2)
    clever = Clever(radius, num_batches=20, batch_size=2, pool_factor=40, norm=norm)
    scores, generator = clever(trained, images, _generator(3)), _generator(3)
    with monkeypatch.context() as patch:
        expected = [_toolbox_score(patch, trained, image, clever, generator) for image in images]
    assert (scores < radius).any()
    assert_close(scores, torch.tensor(expected).float(), rtol=1e-4, atol=1e-6)


def test_the_score_of_a_linear_network_is_its_distance_to_the_hyperplane_up_to_the_radius():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    weight, bias = torch.tensor([[3.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 0, 0]]), torch.tensor([5.0, 0.0, 4.0])
    network.load_state_dict({"1.weight": weight, "1.bias": bias})
    images = torch.zeros(2, 1, 2, 2)
    images[1, 0, 0, 0] = 1.0
    # to class 1: 5 / 5 and 8 / 5; to class 2: 1 / 3 and 4 / 3
    assert_close(Clever(5.0, num_batches=5, batch_size=4)(network, images), torch.tensor([1 / 3, 4 / 3]))
    # in the supremum norm: 5 / 7 and 8 / 7, and the same
    assert_close(Clever(1.0, 5, 4, norm=math.inf)(network, images), torch.tensor([1 / 3, 1.0]))


def test_dead_and_tied_logits_score_the_radius_and_zero():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    network.load_state_dict({"1.weight": torch.zeros(2, 4), "1.bias": torch.tensor([1.0, 0.0])})
    images = torch.rand(2, 1, 2, 2)
    clever = Clever(2.0, num_batches=3, batch_size=2)
    assert_close(clever(network, images), torch.full((2,), 2.0))
    nn.init.zeros_(network[1].bias)
    assert_close(clever(network, images), torch.zeros(2))


def test_points_are_uniform_in_the_euclidean_ball():
    image = torch.full((1, 1, 3), 0.5, dtype=torch.float64)
    offsets = (Clever(0.4).points(image, 4000, _generator()) - image).flatten(1) / 0.4
    radii = offsets.norm(dim=1)
    assert radii.max() <= 1
    assert scipy.stats.kstest(radii**3, "uniform").pvalue > 0.01  # a third of the volume in a third of the points
    assert scipy.stats.kstest(offsets[:, 1] / radii, "uniform", (-1, 2)).pvalue > 0.01  # Archimedes


def test_points_are_uniform_in_the_cube_and_clipped_to_pixels():
    image = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    points = Clever(0.4, norm=math.inf).points(image, 4000, _generator())
    for place in range(2):
        assert scipy.stats.kstest(points[:, 0, 0, place], "uniform", (0.1, 0.8)).pvalue > 0.01
    clipped = Clever(5.0).points(image, 100, _generator())
    assert clipped.min() == 0
    assert clipped.max() == 1


def test_maxima_are_over_the_drawn_places_of_each_class():
    pool = torch.tensor([[1.0, 0.0], [5.0, 2.0], [3.0, 9.0]])
    assert_close(batch_maxima(pool, torch.tensor([[0, 2], [0, 1], [0, 0]])), torch.tensor([[3.0, 5, 1], [9, 2, 0]]))
    places = Clever(num_batches=50, batch_size=20, pool_factor=3).batches(_generator())
    assert places.shape == (50, 20)
    assert places.unique().equal(torch.arange(60))


def test_slopes_are_the_dual_norms_of_the_gaps_gradients():
    network, points = cases.tiny_network().double(), torch.rand(5, 6, dtype=torch.float64)
    jacobians = torch.stack([torch.autograd.functional.jacobian(network, point) for point in points])
    gaps = jacobians[:, 2:3] - jacobians
    predicted = torch.tensor(2)
    assert_close(Clever(norm=2).gap_slopes(network, points, predicted), gaps.square().sum(2).sqrt())
    assert_close(Clever(norm=math.inf).gap_slopes(network, points, predicted), gaps.abs().sum(2))


def test_a_generator_settles_the_scores(monkeypatch):
    network, images = cases.tiny_network(), torch.rand(3, 6)
    clever = Clever(1.0, num_batches=10, batch_size=8)
    assert_close(clever(network, images, _generator(1)), clever(network, images, _generator(1)), rtol=0, atol=0)
    assert_close(clever(network, images), clever(network, images), rtol=0, atol=0)
    assert not clever(network, images, _generator(1)).equal(clever(network, images, _generator(2)))
    sizes = []
    monkeypatch.setattr("recipes.competitors.clever._MAX_POINTS", 32)
    monkeypatch.setattr(Clever, "points", lambda _, image, size, __: sizes.append(size) or image.expand(size, 6))
    clever(network, images[:1])
    assert sizes == [32, 32, 16]


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_scoring_reads_the_network_in_evaluation_and_leaves_no_trace(context):
    network, images = cases.tiny_network(batch_norm=True, dropout=True), torch.rand(3, 6)
    network[1].eval()
    clever = Clever(1.0, num_batches=10, batch_size=8)
    expected = clever(copy.deepcopy(network).eval(), images)
    flags, state = [module.training for module in network.modules()], copy.deepcopy(network.state_dict())
    with context():
        scores = clever(network, images.clone())
    assert_close(scores, expected)
    assert not scores.requires_grad
    assert ((scores > 0) & (scores <= 1)).all()
    assert [module.training for module in network.modules()] == flags
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert_close(network.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0.0}, "radius must be positive and finite.*got 0.0"),
        ({"radius": math.inf}, "radius must be positive and finite.*got inf"),
        ({"num_batches": 2}, "num_batches must be at least 3; got 2"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"pool_factor": 0}, "pool_factor must be at least 1; got 0"),
        ({"norm": 1}, "norm must be 2 or math.inf; got 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Clever(**options)
