import copy
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from art.estimators.classification import PyTorchClassifier
from art.metrics import metrics as toolbox
from torch import nn
from torch.testing import assert_close

from recipes.competitors.clever import Clever, PublishedFit, ToolboxFit, batch_maxima, nelder_mead
from tests import cases


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _maxima(count, num_batches, batch_size, pool_factor=10, scale=1.0, seed=0):
    """Maxima over resamples of a pool, many of them equal: (count, num_batches), float32."""
    draw = np.random.default_rng(seed)
    pool = scale * draw.gamma(20, size=(count, pool_factor * batch_size)).astype(np.float32) / 20
    places = draw.integers(0, pool.shape[1], (num_batches, batch_size))
    return pool[:, places].max(2)


def _toolbox_score(monkeypatch, network, image, clever, generator):
    """clever_u on the very points and places that ours draws."""
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
    num_classes = network(image[None]).shape[1]
    classifier = PyTorchClassifier(
        network, nn.CrossEntropyLoss(), image.shape, num_classes, clip_values=(0.0, 1.0), device_type="cpu"
    )
    sizes = (clever.num_batches, clever.batch_size, clever.radius, clever.norm)
    return toolbox.clever_u(classifier, image.numpy(), *sizes, pool_factor=clever.pool_factor, verbose=False)


@pytest.mark.parametrize(("norm", "radius"), [(2, 5.0), (math.inf, 0.3)])
def test_scores_are_those_of_the_toolbox_on_the_same_points(monkeypatch, trained, digits, norm, radius):
    images = cases.test_images(digits, 4)
    clever = Clever(radius, num_batches=20, batch_size=16, pool_factor=5, norm=norm, fit=ToolboxFit())
    scores, is_stable = _scores(monkeypatch, clever, trained, images)
    generator = _generator(3)
    with monkeypatch.context() as patch:
        expected = [_toolbox_score(patch, trained, image, clever, generator) for image in images]
    assert (scores < radius).sum() >= 3
    # the toolbox's fit may end elsewhere for other last bits of the norms, which depend on the processor
    assert is_stable.sum() >= 2
    assert_close(scores[is_stable], torch.tensor(expected).float()[is_stable], rtol=1e-4, atol=1e-6)


def _scores(monkeypatch, clever, network, images):
    """The scores, and whether each stays where the norms that it is fitted to change in their last bits."""
    fitted = []
    fit = Clever.scores
    with monkeypatch.context() as patch:
        patch.setattr(Clever, "scores", lambda self, *arguments: (fitted.append(arguments), fit(self, *arguments))[1])
        scores = clever(network, images, _generator(3))
    ((logits, maxima),) = fitted
    draw, is_stable = np.random.default_rng(0), torch.ones(len(images), dtype=torch.bool)
    for _ in range(8):
        noise = torch.from_numpy(draw.uniform(-3e-7, 3e-7, maxima.shape)).to(maxima)
        is_stable &= torch.isclose(fit(clever, logits, maxima * (1 + noise)), scores, rtol=1e-4, atol=1e-6)
    return scores, is_stable


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_batches", "batch_size", "scale"), [(20, 16, 0.01), (50, 32, 1.0), (100, 64, 100.0)])
def test_the_toolbox_fit_is_that_of_scipy(num_batches, batch_size, scale, seed):
    maxima = _maxima(6, num_batches, batch_size, scale=scale, seed=seed)
    expected = [-scipy.stats.weibull_min.fit(-row, 1.0, optimizer=scipy.optimize.fmin)[1] for row in maxima]
    np.testing.assert_allclose(ToolboxFit().endpoint(maxima), expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_published_fit_is_that_of_the_authors_release():
    maxima = np.concatenate(
        [_maxima(4, 40, 32, pool_factor=40).astype(float), -np.random.default_rng(0).weibull(2, (2, 40))]
    )

    def optimizer(function, start, args, disp):
        return scipy.optimize.fmin(lambda theta, x: function(theta, x) + 0.01 * theta[2] ** 2, start, args, disp=disp)

    expected = []
    for row in maxima:
        top, width = row.max(), np.ptp(row)
        results = []
        for shape in PublishedFit().shapes:  # superfit: the start that scipy had then
            law = scipy.stats.weibull_min.fit((top - row) / width, shape, superfit=True, optimizer=optimizer)
            end = top - width * law[1]
            results.append((scipy.stats.kstest(-row, "weibull_min", (law[0], -end, width * law[2])).pvalue, end))
        fitness, end = max(results, key=lambda result: result[0])
        assert fitness > 0.001
        expected.append(end)
    np.testing.assert_allclose(PublishedFit().endpoint(maxima), expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_published_fit_finds_the_end_of_a_known_law():
    sample = 7 - 2 * np.random.default_rng(0).weibull(3, (5, 2000))
    assert abs(PublishedFit().endpoint(sample) - 7).max() < 0.2  # the standard error is about scale n^(-1/shape)


@pytest.mark.parametrize("fit", [ToolboxFit(), PublishedFit()])
def test_equal_maxima_are_their_own_end(fit):
    maxima = np.full((3, 20), [[0.3], [7.0], [0.0]], dtype=np.float32)
    maxima[1, 4] *= 1 + 2e-7
    np.testing.assert_allclose(fit.endpoint(maxima), [0.3, 7.0, 0.0], rtol=1e-6)


def test_samples_are_fitted_the_same_in_parts(monkeypatch):
    maxima = _maxima(7, 20, 16)
    whole = ToolboxFit().endpoint(maxima), PublishedFit().endpoint(maxima)
    monkeypatch.setattr("recipes.competitors.clever._MAX_NUMBERS", 2 * 20)
    np.testing.assert_array_equal((ToolboxFit().endpoint(maxima), PublishedFit().endpoint(maxima)), whole)


def test_the_simplices_move_as_those_of_scipy():
    def value(parameters, rows):  # Rosenbrock's valleys, and at the last a slope without end
        x, y = parameters.T
        valley = (1 - x) ** 2 + np.array([1.0, 10.0, 100.0, 3.0, 0.0])[rows] * (y - x**2) ** 2
        return np.where(rows == 4, x - y, valley)

    start = np.array([[-1.2, 1.0], [0.0, 0.0], [3.0, -4.0], [1.0, 1.0], [0.1, 0.3]])
    expected = [
        scipy.optimize.fmin(lambda p, i=i: value(p[None], np.array([i]))[0], start[i], disp=False) for i in range(5)
    ]
    np.testing.assert_allclose(nelder_mead(value, start), expected, rtol=1e-9)


def test_the_score_of_a_linear_network_is_its_distance_to_the_hyperplane_up_to_the_radius():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    weight, bias = torch.tensor([[3.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 0, 0]]), torch.tensor([5.0, 0.0, 4.0])
    network.load_state_dict({"1.weight": weight, "1.bias": bias})
    images = torch.zeros(2, 1, 2, 2)
    images[1, 0, 0, 0] = 1.0
    for fit in (ToolboxFit(), PublishedFit()):
        clever = Clever(5.0, num_batches=5, batch_size=4, fit=fit)
        # to class 1: 5 / 5 and 8 / 5; to class 2: 1 / 3 and 4 / 3
        assert_close(clever(network, images), torch.tensor([1 / 3, 4 / 3]))
        # in the supremum norm: 5 / 7 and 8 / 7, and the same
        assert_close(Clever(1.0, 5, 4, norm=math.inf, fit=fit)(network, images), torch.tensor([1 / 3, 1.0]))


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
