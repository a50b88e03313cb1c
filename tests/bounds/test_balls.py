"""Claims about all points of a ball or a box, against attacks on them: dense float64 Jacobians at the worst points."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import fisher_reg as fr
from fisher_reg.bounds.compositions import traced_model
from fisher_reg.bounds.jacobians import tangents_of
from fisher_reg.bounds.local import _Around
from fisher_reg.bounds.tracing.functional import Run
from tests.bounds.claims import (
    along,
    centred,
    fisher_at,
    jacobians,
    logits_of,
    norms,
    points_in_box,
    points_within,
    rivals,
    units,
)
from tests.bounds.random_networks import Step, random_network

RADII = (1e-3, 0.03, 0.3, 3.0)
ROOM = 1 + 1e-7


def conv(inputs, outputs, kernel=3, **settings):
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": 1, **settings})


def mlp(first, second, classes=3):
    return nn.Sequential(nn.Linear(4, 5), first, nn.Linear(5, 5), second, nn.Linear(5, classes))


def image(*layers, classes=3):
    """Layers on images of 1 x 5 x 5, and a head."""
    body = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        width = body(torch.zeros(1, 1, 5, 5)).shape[1]
    return nn.Sequential(body, nn.Linear(width, classes))


class Attention(nn.Module):
    """A block of a transformer; the weights of the attention are asked for, and not used, if wanted."""

    def __init__(self, needs_weights):
        super().__init__()
        self.needs_weights = needs_weights
        self.norm, self.second = nn.LayerNorm(4, eps=0.1), nn.LayerNorm(4, eps=0.1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(12, 3)

    def forward(self, x):
        hidden = self.norm(x)
        out, _ = self.attention(hidden, hidden, hidden, need_weights=self.needs_weights)
        x = x + out
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(x.flatten(1))


class Subclass(nn.MaxPool2d):
    """The same pooling under a name that says nothing."""


def vector(function, width=4, classes=3, **parts):
    """A function between a linear layer with four outputs and a head."""
    return nn.Sequential(nn.Linear(4, 4), Step(function, **parts), nn.Linear(width, classes))


def dot_product(self, x):
    query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
    return self.out((x + F.scaled_dot_product_attention(query, key, value)).flatten(1))


def unnormed_attention(self, x):
    query, key, value = self.qkv(x).chunk(3, -1)
    return self.out(F.scaled_dot_product_attention(query, key, value).flatten(1))


def tied_pool():
    """ReLU before pooling, with channels that are off and windows of equal entries."""
    model = image(conv(1, 3), nn.ReLU(), nn.MaxPool2d(2), conv(3, 2), nn.ReLU(), nn.MaxPool2d(2, 1))
    with torch.no_grad():
        model[0][0].bias.copy_(torch.tensor([-20.0, 0.0, 0.3]))
        model[0][0].weight[1].fill_(0.3)
    return model


ACTIVATIONS = {
    "GELU": nn.GELU(), "GELU tanh": nn.GELU("tanh"), "Hardswish": nn.Hardswish(), "Softplus": nn.Softplus(),
    "Softplus 0.2": nn.Softplus(0.2), "Softplus 8": nn.Softplus(8.0), "SELU": nn.SELU(), "ELU 4": nn.ELU(4.0),
    "ELU -2": nn.ELU(-2.0), "CELU": nn.CELU(0.3), "Softshrink": nn.Softshrink(0.3), "Hardtanh": nn.Hardtanh(-0.3, 0.8),
    "ReLU6": nn.ReLU6(), "LeakyReLU": nn.LeakyReLU(-0.4), "Mish": nn.Mish(), "SiLU": nn.SiLU(),
    "Hardsigmoid": nn.Hardsigmoid(), "Tanh": nn.Tanh(), "Sigmoid": nn.Sigmoid(), "Softsign": nn.Softsign(),
    "LogSigmoid": nn.LogSigmoid(), "Tanhshrink": nn.Tanhshrink(), "PReLU": nn.PReLU(init=1.6), "RReLU": nn.RReLU(),
}  # fmt: skip

NETWORKS = {
    **{
        f"{first} and {second}": (lambda pair=(first, second): mlp(*[ACTIVATIONS[name] for name in pair]))
        for first, second in zip([*ACTIVATIONS][::2], [*ACTIVATIONS][1::2], strict=True)
    },
    "ReLU": lambda: mlp(nn.ReLU(), nn.ReLU()),
    "overlapping maxima": lambda: image(conv(1, 2), nn.MaxPool2d(3, 1), nn.ReLU()),
    "padded maxima": lambda: image(conv(1, 2), nn.MaxPool2d(3, 2, 1), nn.ELU()),
    "dilated maxima": lambda: image(conv(1, 2), nn.MaxPool2d(2, 1, dilation=2), nn.ReLU()),
    "maxima beyond the edge": lambda: image(conv(1, 2), nn.MaxPool2d(2, 2, ceil_mode=True), nn.ReLU()),
    "ties": tied_pool,
    "adaptive maxima": lambda: image(conv(1, 2), nn.ReLU(), nn.AdaptiveMaxPool2d(3), nn.Tanh()),
    "subclass of a pooling": lambda: image(conv(1, 2), Subclass(2), nn.ReLU()),
    "functional maxima": lambda: image(conv(1, 2), Step(lambda self, x: F.max_pool2d(F.relu(x), 2, 1))),
    "maxima of a signal": lambda: image(nn.Flatten(2), nn.Conv1d(1, 2, 3), nn.MaxPool1d(3, 2), nn.ReLU()),
    "reflected": lambda: image(conv(1, 2, 5, padding=2, padding_mode="reflect"), nn.ReLU(), conv(2, 2), nn.ReLU()),
    "replicated": lambda: image(conv(1, 2, padding_mode="replicate"), nn.ReLU(), conv(2, 2, stride=2), nn.ReLU()),
    "circular": lambda: image(conv(1, 2, 5, padding=3, padding_mode="circular"), nn.ReLU(), nn.AvgPool2d(2)),
    "padding layers": lambda: image(nn.ReflectionPad2d(2), conv(1, 2), nn.SiLU(), nn.ConstantPad2d(1, 0.7), conv(2, 2)),
    "groups": lambda: image(conv(1, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, groups=2), nn.ReLU()),
    "transposed": lambda: image(nn.ConvTranspose2d(1, 2, 3, 2), nn.ReLU(), nn.Upsample(scale_factor=2)),
    "batch norm": lambda: image(conv(1, 3), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2), nn.BatchNorm2d(2), nn.GELU()),
    "group norm": lambda: image(conv(1, 4), nn.GroupNorm(2, 4, eps=0.1), nn.ReLU(), conv(4, 2)),
    "layer norm": lambda: vector(lambda self, x: F.relu(self.norm(x)), norm=nn.LayerNorm(4, eps=0.1)),
    "RMS norm": lambda: vector(lambda self, x: self.norm(x).tanh(), norm=nn.RMSNorm(4, eps=0.1)),
    "softmax": lambda: vector(lambda self, x: x.softmax(1)),
    "attention": lambda: Attention(False),
    "attention with its weights": lambda: Attention(True),
    "dot products": lambda: Step(
        dot_product, norm=nn.LayerNorm(4, eps=0.1), qkv=nn.Linear(4, 12), out=nn.Linear(12, 3)
    ),
    "attention without a norm": lambda: Step(unnormed_attention, qkv=nn.Linear(4, 12), out=nn.Linear(12, 3)),
    "residual": lambda: vector(lambda self, x: x + F.relu(self.fc(x)), fc=nn.Linear(4, 4)),
    "concatenation": lambda: vector(lambda self, x: torch.cat([x, F.elu(self.fc(x), 3.0)], 1), 8, fc=nn.Linear(4, 4)),
    "gate": lambda: vector(lambda self, x: x * torch.sigmoid(x)),
    "gate of a layer": lambda: vector(lambda self, x: x * torch.sigmoid(self.fc(x)), fc=nn.Linear(4, 4)),
    "square": lambda: vector(lambda self, x: F.relu(x * x - 0.5)),
    "product of columns": lambda: vector(lambda self, x: torch.stack([x[:, 0] * x[:, 1], x[:, 2].relu()], 1), 2),
    "quotient of constants": lambda: vector(lambda self, x: (x / 0.3).tanh() - 1.0 / self.c, c=torch.rand(4) + 1),
    "constant like the values": lambda: vector(lambda self, x: (x + self.c.to(x)).relu(), c=torch.rand(1)),
    "absolute values": lambda: vector(lambda self, x: torch.cat([x.abs(), x.amax(1, keepdim=True)], 1), 5),
    "smallest entry": lambda: vector(lambda self, x: x - x.amin(1, keepdim=True)),
    "size of the value": lambda: vector(lambda self, x: x.reshape(x.size(0), -1).view(x.shape).relu()),
    "straight-through": lambda: vector(lambda self, x: x + (F.hardtanh(x) - x).detach()),
    "detached branch": lambda: vector(lambda self, x: 0.1 * x + self.fc(x).detach(), fc=nn.Linear(4, 4)),
    "zeros before a norm": lambda: vector(
        lambda self, x: torch.cat([x, self.norm(F.relu(x - 50.0))], 1), 8, norm=nn.LayerNorm(4, eps=0.1)
    ),
    "no last layer": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh()),
    "two classes": lambda: mlp(nn.ReLU(), nn.ReLU(), 2),
    "forty classes": lambda: mlp(nn.ReLU(), nn.ReLU(), 40),
}  # fmt: skip

SHAPES = {"attention": (3, 4), "attention with its weights": (3, 4), "dot products": (3, 4)}
SHAPES["attention without a norm"] = (3, 4)


@pytest.fixture(autouse=True)
def _one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def network(name, size=2, dtype=torch.float64):
    """A network with random weights, and a batch of examples of very different sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        model = NETWORKS[name]()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                weight.mul_(1.5 if weight.ndim > 1 else 1.0)
                if weight.ndim == 1 and "norm" in key:
                    weight.add_(torch.randn_like(weight))
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_var.uniform_(0.1, 2.0)
                    module.running_mean.normal_()
                    module.weight.normal_()
        first = next(item for item in model.modules() if isinstance(item, nn.Linear | nn.Conv2d | nn.Conv1d))
        is_image = isinstance(model, nn.Sequential) and isinstance(model[0], nn.Sequential)
        shape = SHAPES.get(name, (1, 5, 5) if is_image else (first.in_features,))
        x = torch.randn(size, *shape)
        x[1:2] *= 20.0
        x[3:4] = 0.0
    return model.eval().requires_grad_(False).to(dtype), x.to(dtype)


def attacked(model, x, radii, std=None, seed=0):
    """Points ``(n, B, *S)`` in float64 in the ball around each input, with the network in float64."""
    generator = torch.Generator().manual_seed(seed)
    return points_within(model, x, radii, generator, std, steps=1, count=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_of_a_ball_is_above_its_bounds(name):
    model, x = network(name)
    number = list(NETWORKS).index(name)
    radii = RADII[number % len(RADII)] * torch.tensor([1.0, 0.4], dtype=torch.float64)
    std = None if number % 3 else torch.linspace(0.3, 1.5, x[0].numel()).view_as(x[0])
    bound = fr.local_fisher_bound(model, x, radius=radii, input_std=std)
    divergence = fr.certified_divergence(model, x, radii, input_std=std)
    points = attacked(model, x, radii, std)
    flat, unit = points.flatten(0, 1), torch.ones_like(x[0]) if std is None else std.double()
    found = fisher_at(model, flat, unit).view(-1, 2)
    assert (found <= bound.value * ROOM + 1e-290).all(), (radii, found.amax(0) / bound.value, bound.evidence)
    here, there = logits_of(model, x).log_softmax(1), logits_of(model, flat).log_softmax(1).unflatten(0, (-1, 2))
    lost = (here.exp() * (here - there)).sum(2) - 1e-13 * (1 + there.abs().amax(2))
    assert (lost <= divergence * ROOM).all(), (radii, lost.amax(0) / divergence)
    check_values(model, x, radii, points, std)


def check_values(model, x, radii, points, std):
    """Every value, every row of its Jacobian, and every difference of two logits stays within what was allowed it."""
    traced = traced_model(model, x, fr.Categorical())
    around = _Around(traced, fr.Categorical(), std, fr.Tightening(balancing_steps=2))
    run, moved = Run(traced.module), []
    chosen = points[:: max(1, len(points) // 4)]
    for point in chosen:
        run(point)
        rows = tangents_of(dataclasses.replace(traced, values={**traced.values, traced.input: point}))
        moved.append((dict(run.values), rows))
    for composition in around.compositions(radii):
        deviations = composition.deviations
        for node, width in deviations.widths.items():
            if not isinstance(width, torch.Tensor):
                continue
            value = traced.values[node]
            rounding = 1e-12 * (1 + value.abs().amax())
            assert (width >= 0).all(), node
            for values, rows in moved:
                change = (values[node] - value).abs()
                assert (change <= width * ROOM + rounding).all(), (node, node.target, (change - width).max())
                error = deviations.row_errors.get(node)
                if node in rows and node in around.tangents and isinstance(error, torch.Tensor):
                    turned = torch.linalg.vector_norm(rows[node] - around.tangents[node], dim=1)
                    rounding = 1e-11 * (1 + around.tangents[node].abs().amax())
                    assert (turned <= error * ROOM + rounding).all(), (node, node.target, (turned - error).max())
    expanded = around.expansion(radii)
    if expanded is None:
        return
    unit = torch.ones_like(x[0]) if std is None else std.double()
    here = jacobians(model, x) / unit.flatten()
    for point in points:
        change = jacobians(model, point) / unit.flatten() - here
        found = torch.cdist(change, change, compute_mode="donot_use_mm_for_euclid_dist")
        assert (found <= expanded.remainder * ROOM + 1e-11 * (1 + here.abs().amax())).all()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_window_holds_an_entry_and_its_copy(mode):
    layer = nn.Conv1d(1, 1, 5, padding=2, padding_mode=mode, bias=False)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 2)).double().eval().requires_grad_(False)
    layer.weight.fill_(1.0)
    x, radii = torch.zeros(1, 1, 4, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    rows = jacobians(model[:2], x)[0]  # each moves its own entry the most
    check_values(model, x, radii, (0.3 * rows / rows.norm(dim=1, keepdim=True)).view(4, 1, 1, 4), None)


@pytest.mark.parametrize("seed", [3, 21, 23, 24, 36, 37])
def test_no_value_of_a_random_network_leaves_its_width(seed):
    model, x, _ = random_network(seed)
    model, x = model.eval().requires_grad_(False).double(), x.double()
    radii = torch.full((len(x),), 0.03 if seed % 2 else 1.0, dtype=torch.float64)
    check_values(model, x, radii, attacked(model, x, radii), None)


@pytest.mark.parametrize(
    "name", ["ReLU", "GELU and GELU tanh", "two classes", "ties", "attention", "gate", "batch norm"]
)
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_at_the_inputs_is_exact(name, size, dtype):
    model, x = network(name, size, dtype)
    bound = fr.local_fisher_bound(model, x)
    exact = fisher_at(model.double(), x.double(), torch.ones_like(x[0]).double())
    assert bound.value == pytest.approx(exact, rel=1e-8, abs=1e-280)
    assert set(bound.evidence) <= {"exact", "product"}


def test_the_bound_at_the_inputs_is_close_for_many_classes():
    model, x = network("forty classes", 5)
    exact = fisher_at(model, x, torch.ones_like(x[0]))
    bound = fr.local_fisher_bound(model, x).value
    assert ((exact <= bound * ROOM) & (bound <= 1.1 * exact + 1e-280)).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_no_attack_within_the_radius_changes_the_class(name):
    model, x = network(name, 5)
    std = None if len(name) % 2 else torch.linspace(0.3, 1.5, x[0].numel(), dtype=torch.float64).view_as(x[0])
    radius = fr.certified_radius(model, x, input_std=std)
    try:
        everywhere = fr.certified_radius(model, x, uses_balls=False, input_std=std)
        assert (radius >= everywhere * (1 - 1e-12)).all()
    except fr.NoBoundError:
        pass  # it has no constant over all inputs
    logits = logits_of(model, x)
    predicted, unit = logits.argmax(1), torch.ones_like(x[0]) if std is None else std
    size = along(radius.clamp_max(1e4), x)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((4, *x.shape), generator=generator, dtype=torch.float64)
    chosen = range(min(logits.shape[1], 4))
    starts = torch.cat([torch.zeros_like(x)[None], 0.5 * size * units(noise, unit)])
    for share in (0.999, 1.0):
        offsets = starts.expand(len(chosen), *starts.shape)  # of each rival, from each start
        for _ in range(3):  # ascent on the sphere
            rows = jacobians(model, (x + offsets).flatten(0, 2)) / unit.flatten()
            gains = rivals(rows, predicted.repeat(len(chosen) * len(starts))).unflatten(1, offsets.shape[:3])
            gains = torch.stack([gains[rival, number] for number, rival in enumerate(chosen)]).view_as(offsets)
            offsets = share * size * units(0.3 * offsets + size * units(gains / unit, unit), unit)
            there = logits_of(model, (x + offsets).flatten(0, 2)).unflatten(0, offsets.shape[:3])
            places = predicted.expand(offsets.shape[:3])[..., None]
            lead = there.gather(3, places)[..., 0] - there.scatter(3, places, -math.inf).amax(3)
            assert (lead >= -1e-11 * (1 + there.abs().amax(3))).all(), (name, share, lead.amin())


@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_of_a_domain_is_above_its_bounds(name):
    model, x = network(name)
    x = x.clamp(-2, 2)
    low, high = x.amin(0) - 0.1, x.amax(0) + torch.linspace(0.0, 0.4, x[0].numel()).view_as(x[0])
    centre = x.mean(0)
    length = 1.01 * float((x - centre).flatten(1).norm(dim=1).max())
    generator = torch.Generator().manual_seed(0)
    whole = points_in_box(model, torch.full_like(low, -2.5), torch.full_like(low, 2.5), generator)
    boxed = points_in_box(model, low, high, generator)
    inside = points_within(model, centre[None], torch.tensor([length]), generator).flatten(0, 1)
    domains = [((-2.5, 2.5), whole), (fr.Box(low, high), boxed), (fr.L2Ball(centre, length), inside)]
    number = list(NETWORKS).index(name)
    domain, points = domains[number % 3]
    slope = fr.lipschitz_bound(model, x, domain=domain).value
    assert norms(centred(jacobians(model, points))).max() <= slope * ROOM
    domain, points = domains[(number + 1) % 3]
    fisher = fr.fisher_bound(model, x, domain=domain).value
    assert fisher_at(model, points, torch.ones_like(low)).max() <= fisher * ROOM


def test_a_float32_domain_is_not_rounded():
    # Near 1e6 neighbouring float32 numbers are 0.06 apart; the ReLU is on in the upper half of the box alone.
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        for layer, weight, bias in ((0, 1.0, -1e6), (1, 1.0, -0.0156), (3, 0.0, 0.0)):
            model[layer].weight.fill_(weight)
            model[layer].bias.fill_(bias)
        model[3].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    inputs = torch.full((1, 1), 1e6)
    assert fr.fisher_bound(model, inputs, domain=(1e6 - 0.001, 1e6 + 0.03)).value == pytest.approx(1.0)


@pytest.mark.parametrize(
    "radius", [0, -1.0, math.nan, math.inf, "far", torch.ones(3), torch.ones(2, 1), [0.1, 0.0], 1j]
)
def test_a_radius_that_is_none_is_refused(radius):
    model, x = network("ReLU")
    for function in (
        lambda: fr.local_fisher_bound(model, x, radius=radius),
        lambda: fr.certified_divergence(model, x, radius),
    ):
        with pytest.raises(ValueError, match="radius must be positive and finite, a number or one for each of the 2"):
            function()


DOMAINS = {
    "turned": (1.0, 0.0), "NaN": (0.0, math.nan), "infinite": (0.0, math.inf), "empty": (1.0, 1.0), "word": ("a", "b"),
    "three": (0.0, 1.0, 2.0), "list": [0.0, 1.0], "none": (None, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DOMAINS, "another shape", "one end NaN", "outside", "outside the ball", "no tensor"])
@pytest.mark.parametrize("function", [fr.fisher_bound, fr.lipschitz_bound])
def test_a_domain_that_is_none_is_refused(name, function):
    model, x = network("ReLU")
    others = {
        "another shape": lambda: fr.Box(torch.zeros(3), torch.ones(3)),
        "one end NaN": lambda: fr.Box(torch.tensor([0.0, math.nan, 0.0, 0.0]), 9.0),
        "outside": lambda: (-0.01, 0.01),
        "outside the ball": lambda: fr.L2Ball(x[0], 0.1),
        "no tensor": lambda: fr.L2Ball([0.0] * 4, 100.0),
    }
    with pytest.raises(ValueError, match="domain"):
        function(model, x, domain=others[name]() if name in others else DOMAINS[name])


@pytest.mark.parametrize("centre", [torch.full((4,), math.nan), torch.zeros(3)])
def test_a_ball_around_no_input_is_refused(centre):
    model, x = network("ReLU")
    with pytest.raises(ValueError, match="domain"):
        fr.fisher_bound(model, x, domain=fr.L2Ball(centre, 100.0))


def test_weights_that_are_not_finite_are_refused_in_a_ball():
    model, x = network("ReLU")
    model[0].weight[0, 0] = math.nan
    for function in (
        lambda: fr.local_fisher_bound(model, x, radius=0.1),
        lambda: fr.certified_divergence(model, x, 0.1),
        lambda: fr.certified_radius(model, x),
        lambda: fr.fisher_bound(model, x, domain=(-99.0, 99.0)),
    ):
        with pytest.raises(ValueError, match="NaN"):
            function()
