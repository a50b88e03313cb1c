"""The bounds at given inputs, the certified radius, and the improvements that keep a bound certified."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Bernoulli,
    Exact,
    Gaussian,
    NoBoundError,
    Tightening,
    blockwise_fisher_bound,
    certified_radius,
    fisher_bound,
    fisher_spectral_norm,
    lipschitz_bound,
    local_fisher_bound,
)
from fisher_reg.bounds.compositions import balanced_coordinates
from fisher_reg.bounds.operator_norms.measures import CertifiedNorms
from fisher_reg.bounds.propagate import compose
from fisher_reg.bounds.tighten import averaging
from fisher_reg.bounds.tighten.averaging import average
from fisher_reg.bounds.tracing import trace
from fisher_reg.likelihood import Categorical
from tests import cases


def _exact(model, x):
    double = copy.deepcopy(model).double()  # bounds are those of the network in exact arithmetic
    return fisher_spectral_norm(double, x.double(), solver=Exact()).eigenvalue


def test_the_local_bound_is_above_every_example_and_below_the_global_one(trained, digits, record_property):
    x = cases.test_images(digits, 64)
    local, exact = local_fisher_bound(trained, x), _exact(trained, x)
    assert local.certified
    assert local.value.shape == (64,)
    assert (exact <= local.value).all()
    global_bound = fisher_bound(trained, x).log10_value
    assert local.log10_value.max() < global_bound
    record_property("log10_local_mean", local.log10_value.mean().item())
    record_property("log10_gap_local_mean", (local.log10_value - exact.log10()).mean().item())


def test_the_local_bound_is_that_of_each_example_alone(trained, digits):
    x = cases.test_images(digits, 5)
    together = local_fisher_bound(trained, x).log10_value
    alone = torch.cat([local_fisher_bound(trained, example[None]).log10_value for example in x])
    assert_close(together, alone, rtol=1e-5, atol=1e-5)  # float32 activations of batches of two sizes


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.3)])
def test_the_local_bound_of_a_linear_model_is_exact(likelihood):
    model, x = nn.Linear(6, 3).double(), torch.randn(4, 6, dtype=torch.float64)
    std = torch.full((6,), 0.5, dtype=torch.float64)
    exact = fisher_spectral_norm(model, x, likelihood=likelihood, input_std=std, solver=Exact()).eigenvalue
    assert_close(local_fisher_bound(model, x, likelihood=likelihood, input_std=std).value, exact)


def test_the_local_level_takes_slopes_before_a_call_in_place_changes_them():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.SiLU(inplace=True), nn.Linear(4, 3)]
    model, x = nn.Sequential(*layers).double(), torch.randn(6, 4, dtype=torch.float64)
    other = nn.Sequential(layers[0], nn.SiLU(), layers[2])
    assert_close(local_fisher_bound(model, x).value, local_fisher_bound(other, x).value)


class _TokensFirst(nn.Module):
    """A layer norm on tokens (n, B, E), as many tokens as examples."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(6, eps=1e-4), nn.Linear(6, 3)

    def forward(self, x):
        h = self.norm(x.transpose(0, 1))
        return self.fc(h.transpose(0, 1).mean(1))


def test_an_example_is_never_taken_for_a_token():
    torch.manual_seed(0)
    model, x = _TokensFirst().double(), torch.randn(4, 4, 6, dtype=torch.float64)
    x[:, 1:] *= 100  # loud tokens, whose layer norm hardly moves, beside a quiet one
    assert (_exact(model, x) <= local_fisher_bound(model, x).value).all()
    blockwise = blockwise_fisher_bound(model, x)
    assert (_exact(model, x) <= blockwise.value * 1.01).all()
    assert blockwise.value.shape == (4,)


def test_the_mode_of_the_module_does_not_matter(digits):
    model, x = cases.network("vit", digits), cases.test_images(digits, 3)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.5
    evaluated = local_fisher_bound(model.eval(), x).log10_value
    assert_close(local_fisher_bound(model.train(), x).log10_value, evaluated)
    assert model.training


def test_the_blockwise_value_lies_above_and_one_segment_is_the_eigenvalue(trained, digits):
    x = cases.test_images(digits, 8)
    exact = _exact(trained, x)
    every = blockwise_fisher_bound(trained, x)
    assert not every.certified
    assert (exact <= every.value * 1.01).all()  # the factors are estimates from below, to their rtol squared
    one = blockwise_fisher_bound(trained, x, num_segments=1)
    assert_close(one.value, exact, rtol=2e-2, atol=1e-12)
    assert len(every.terms) > 2
    assert_close(sum(term.decades for term in every.terms), every.log10_value.mean().item(), rtol=1e-5, atol=1e-5)
    half = blockwise_fisher_bound(trained, x, num_segments=2)
    assert half.log10_value.mean() < every.log10_value.mean()


def test_the_blockwise_value_of_a_plain_network_is_the_product_of_its_jacobian_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    std = torch.tensor([0.5, 1, 2, 1, 1], dtype=torch.float64)
    expected = torch.ones(4, dtype=torch.float64)
    h = x
    for part in (model[:2], model[2:4]):
        jacobian = torch.func.vmap(torch.func.jacrev(part))(h)
        expected = expected * torch.linalg.matrix_norm(jacobian / std if part[0] is model[0] else jacobian, 2) ** 2
        h = part(h)
    expected = expected * _exact(model[4:], h)
    bound = blockwise_fisher_bound(model, x, input_std=std)
    assert_close(bound.value, expected.detach(), rtol=5e-3, atol=0)  # the square of the solver's rtol
    assert [term.name for term in bound.terms] == ["0", "2", "4"]
    with pytest.raises(ValueError, match=r"has 3 segments; num_segments must lie in 1\.\.3, got 4"):
        blockwise_fisher_bound(model, x, num_segments=4)


def test_nothing_flips_inside_the_certified_radius(trained, digits):
    trained, x = copy.deepcopy(trained).double(), cases.test_images(digits, 3).double()
    radius = certified_radius(trained, x)
    predicted = trained(x).argmax(1)
    plain = certified_radius(trained, x, uses_balls=False)
    balanced = certified_radius(trained, x, uses_balls=False, tightening=Tightening(balancing_steps=20))
    assert (plain <= balanced).all()
    assert (plain < radius).all()
    for _ in range(3):
        shift = torch.randn_like(x, requires_grad=True)
        for _ in range(20):  # ascent of the best other class on the sphere of that radius
            length = shift.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            point = x + 0.999 * radius.view(-1, 1, 1, 1) * shift / length
            logits = trained(point)
            margin = logits.gather(1, predicted[:, None])[:, 0] - logits.scatter(1, predicted[:, None], -1e9).amax(1)
            assert (margin >= 0).all()
            (slope,) = torch.autograd.grad(margin.sum(), shift)
            shift = (shift - 100 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-30)).detach()
            shift.requires_grad_()


def test_the_radius_of_a_linear_model_reaches_the_boundary():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4).double(), torch.randn(20, 5, dtype=torch.float64)
    radius = certified_radius(model, x)
    logits, rows = model(x), model.weight
    first, second = logits.topk(2, 1).indices.unbind(1)
    distances = [
        min(((z[top] - z[k]) / (rows[top] - rows[k]).norm()).item() for k in range(4) if k != top)
        for z, top in zip(logits, first, strict=True)
    ]
    assert_close(radius, torch.tensor(distances, dtype=torch.float64))
    assert_close(certified_radius(model, x, input_std=torch.full((5,), 0.5)), radius / 2)
    assert second.shape == (20,)
    tied = nn.Linear(5, 4).double()
    nn.init.zeros_(tied.weight)
    nn.init.zeros_(tied.bias)
    assert (certified_radius(tied, x) == 0).all()  # all classes tie: nothing is certified
    tied.bias.data[2] = 1.0
    assert (certified_radius(tied, x) == math.inf).all()


def test_a_network_without_a_last_linear_layer_has_a_radius_and_a_bound():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double(), torch.randn(6, 5, dtype=torch.float64)
    radius, spectral = certified_radius(model, x, uses_balls=False), torch.linalg.matrix_norm(model[0].weight, 2).item()
    assert (radius <= certified_radius(model, x)).all()
    top = model(x).topk(2, 1).values
    assert_close(radius, (top[:, 0] - top[:, 1]).detach() / (math.sqrt(2) * spectral))
    assert (_exact(model, x) <= local_fisher_bound(model, x).value).all()
    assert_close(fisher_bound(model, x).value, 0.5 * spectral**2)


def test_a_class_that_the_networks_own_precision_does_not_predict_has_no_radius():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.0], [1.0, 1e-9]])
    x = torch.ones(1, 2)  # the logits are 1 and 1 + 1e-9, which are equal in float32
    assert certified_radius(model, x).item() == 0
    assert certified_radius(model.double(), x.double()).item() > 0


LADDER = [
    Tightening(folded=False, merged=False, head=False, dense=False),
    Tightening(merged=False, head=False, dense=False),
    Tightening(merged=False, dense=False),
    Tightening(dense=False),
    Tightening(),
    Tightening(averaged=True),
    Tightening(averaged=True, balancing_steps=30),
]


def test_every_tightening_is_valid_and_all_together_bring_decades(
    trained, family, digits, record_property, monkeypatch
):
    monkeypatch.setattr(averaging, "_MAX_SIDE", 1024)  # for time: a block of 4096 numbers takes seconds
    x = cases.test_images(digits, 32)
    largest = _exact(trained, x).max().log10().item()
    values = [fisher_bound(trained, x, tightening=step).log10_value for step in LADDER]
    assert min(values) > largest
    # dense, averaged and balanced take the smaller of two bounds; the head is at most the centred layer
    assert values[4] <= values[3] + 1e-9
    assert values[5] <= values[4] + 1e-9
    assert values[6] <= values[4] + 1e-9
    assert values[2] <= values[1] + 1e-9
    least = {"vgg": 0.3, "resnet": 0.2, "densenet": 2.0, "vit": 0.5}[family]
    assert values[6] < values[1] - least
    record_property("log10_ladder", [round(value, 3) for value in values])


def test_balanced_coordinates_undo_a_rescaling_of_hidden_channels():
    # (T W1, W2 / T) is the same function; its plain product grows with the condition of T, the balanced one hardly.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    x = torch.zeros(1, 6, dtype=torch.float64)
    plain = fisher_bound(model, x).log10_value
    with torch.no_grad():
        factor = 10 ** torch.linspace(-1, 1, 20, dtype=torch.float64)
        model[0].weight.mul_(factor[:, None])
        model[2].weight.div_(factor)
    assert fisher_bound(model, x).log10_value > plain + 1
    assert fisher_bound(model, x, tightening=Tightening(balancing_steps=200)).log10_value < plain


def test_what_is_added_is_balanced_in_the_same_coordinates():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = self.stem(x).relu()
            return self.head((h + self.branch(h)).relu())

    model, x = Residual().double(), torch.zeros(1, 4, dtype=torch.float64)
    scales = balanced_coordinates(trace(model, x), Tightening(balancing_steps=3), Categorical())
    stem, branch = scales.values()
    assert len(scales) == 2
    assert_close(stem, branch)
    assert (stem != 1).any()


class _Block(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.norm, self.shortcut = nn.BatchNorm2d(4), shortcut
        self.norm.running_var.uniform_(0.3, 2)

    def forward(self, x):
        return self.shortcut(x) + self.second(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("shortcut", [nn.Identity(), nn.Conv2d(3, 3, 1)])
def test_a_residual_block_is_bounded_with_the_mean_slope_of_its_activation(shortcut):
    torch.manual_seed(0)
    block = _Block(shortcut).double().eval()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    traced = trace(block, x)
    (node,) = [node for node in traced.graph.nodes if node.name == "add"]
    found = average(traced, node)
    assert found is not None
    assert found.share == 0.5

    def norm(function, point):
        return torch.linalg.matrix_norm(_matrix(function, point), 2)

    mean = _matrix(lambda y: block.shortcut(y) + 0.5 * block.second(block.norm(block.first(y))), x)
    assert_close(found.matrix, mean)
    branch = norm(lambda y: block.norm(block.first(y)), x) * norm(block.second, torch.zeros(1, 4, 4, 4).double())
    expected = torch.linalg.matrix_norm(mean, 2) + 0.5 * branch
    plain, averaged = (
        compose(traced, CertifiedNorms(), tightening=Tightening(averaged=flag)).log_norm.exp().detach()
        for flag in (False, True)
    )
    assert_close(plain, norm(block.shortcut, x) + branch, rtol=1e-5, atol=0)
    assert_close(averaged, expected, rtol=1e-5, atol=0)
    assert averaged < plain


def _matrix(function, point):
    jacobian = torch.autograd.functional.jacobian(function, point)
    return jacobian.reshape(-1, point.numel())


def test_an_averaged_bound_holds_where_the_slopes_are_all_one_or_all_zero():
    # W2 W1 = -2 I cancels the shortcut at half slope, and at slope 1 the block is -I, at slope 0 it is I.
    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = (nn.Linear(2, 2, bias=False) for _ in range(3))

        def forward(self, x):
            h = x.relu()
            return self.head(h + self.second(self.first(h).relu()))

    model = Cancelling().double()
    with torch.no_grad():
        for layer, factor in ((model.first, 1.0), (model.second, -2.0), (model.head, 1.0)):
            layer.weight.copy_(factor * torch.eye(2))
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    averaged = lipschitz_bound(model, x, tightening=Tightening(averaged=True)).value
    jacobian = torch.autograd.functional.jacobian(model, x).reshape(2, 2)
    exact = torch.linalg.matrix_norm(jacobian - jacobian.mean(0), 2).item()
    assert exact <= averaged * (1 + 1e-12)
    assert averaged < lipschitz_bound(model, x).value


def test_a_subtracted_branch_is_not_averaged():
    class Minus(_Block):
        def forward(self, x):
            return self.shortcut(x) - self.second(self.norm(self.first(x)).relu())

    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), Minus(nn.Identity())).double().eval()
    traced = trace(model, torch.randn(1, 1, 4, 4, dtype=torch.float64))
    (node,) = [node for node in traced.graph.nodes if node.name == "sub"]
    assert average(traced, node) is None


def test_the_table_names_layers_and_shares_that_add_up():
    torch.manual_seed(0)
    model = _Block(nn.Identity())
    network = nn.Sequential(model, nn.Flatten(), nn.Linear(48, 3)).double().eval()
    bound = fisher_bound(network, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    text = str(bound)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "norm", "decades", "share"]
    assert any(line.startswith("0.first") and "Conv2d + batch norm" in line for line in lines)
    assert lines[-2].startswith("most to gain: ")
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[1:-2]]
    assert_close(sum(shares), 100.0, rtol=0, atol=0.06 * len(shares))
    # a smaller norm of the branch by 1 % moves the bound by its share of the derivative
    branch = next(term for term in bound.terms if term.name == "0.second")
    smaller = copy.deepcopy(network)
    smaller[0].second.weight.data.mul_(0.999)
    moved = bound.log10_value - fisher_bound(smaller, torch.zeros(1, 3, 4, 4, dtype=torch.float64)).log10_value
    assert_close(moved, branch.decades / math.log10(branch.norm) * -math.log10(0.999), rtol=5e-3, atol=0)


def test_a_wrong_size_and_an_untraceable_model_are_told():
    with pytest.raises(ValueError, match=r"Sequential fails on inputs of shape \(1, 5\)"):
        fisher_bound(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 5))

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NoBoundError, match=r"test_levels.py, line \d+(.|\n)*LogitsOf\(model, logits_fn\)"):
        fisher_bound(Branching(), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="balancing_steps >= 0; got -1"):
        Tightening(balancing_steps=-1)
