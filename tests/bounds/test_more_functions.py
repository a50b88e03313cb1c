"""Rules of functions against dense Jacobians: over all inputs, at the example, in a ball and in a box around it."""

import pytest
import torch
from torch import nn

from fisher_reg import NoBoundError, Tightening
from fisher_reg.bounds.operator_norms.measures import CertifiedNorms
from fisher_reg.bounds.propagate import compose
from fisher_reg.bounds.region import Region
from fisher_reg.bounds.tracing import trace
from tests.bounds.more_functions import BOUNDED, ONLY_TRACED, ONLY_TRACED_EVERYWHERE, PRODUCTS
from tests.bounds.test_functions import SHAPE, _Of

OPTIONS = {"tightening": Tightening(head=False)}


def _jacobian_norm(model, x):
    return torch.linalg.matrix_norm(torch.autograd.functional.jacobian(model, x).reshape(-1, 12), 2).item()


def _traced(name, exported, x):
    model = _Of((BOUNDED | ONLY_TRACED | PRODUCTS)[name], exported).eval()
    with torch.no_grad():
        model.loud.div_(model.loud.mean())
    return model, trace(model, x)


def _point(seed, scale=1.0):
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", BOUNDED)
def test_a_function_is_bounded_over_all_inputs(name, exported):
    model, traced = _traced(name, exported, _point(0))
    if exported and name in ONLY_TRACED_EVERYWHERE:
        with pytest.raises(NoBoundError):
            compose(traced, CertifiedNorms(), **OPTIONS)
        return
    bound = compose(traced, CertifiedNorms(), **OPTIONS).log_norm.exp().item()
    dense = max(_jacobian_norm(model, _point(seed, scale)) for seed in range(5) for scale in (0.03, 1.0, 30.0))
    assert 0 < dense <= bound * (1 + 1e-9)


@pytest.mark.parametrize("name", ONLY_TRACED)
def test_a_function_without_an_exported_rule_is_bounded_as_traced(name):
    model, traced = _traced(name, False, _point(0))
    bound = compose(traced, CertifiedNorms(), **OPTIONS).log_norm.exp().item()
    assert 0 < max(_jacobian_norm(model, _point(seed)) for seed in range(5)) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", BOUNDED | PRODUCTS)
def test_a_function_is_bounded_at_the_example(name, exported):
    x = _point(1)
    model, traced = _traced(name, exported, x)
    bound = compose(traced, CertifiedNorms(), is_local=True, **OPTIONS).log_norm.exp().item()
    assert 0 < _jacobian_norm(model, x) <= bound * (1 + 1e-9)


@pytest.mark.parametrize(("shape", "exported"), [("ball", False), ("box", False), ("ball", True)])
@pytest.mark.parametrize("name", BOUNDED | PRODUCTS)
def test_a_function_and_its_values_are_bounded_over_a_region(name, shape, exported):
    x, radius = _point(2), 0.05
    model, traced = _traced(name, exported, x)
    region = Region.ball(x, radius) if shape == "ball" else Region.box(x[0] - radius, x[0] + radius, x)
    try:
        composition = compose(traced, CertifiedNorms(), region=region, **OPTIONS)
    except NoBoundError:
        assert exported
        assert name in ONLY_TRACED_EVERYWHERE
        return
    (last,) = traced.output.all_input_nodes
    width = composition.deviations.widths[last]
    for seed in range(8):
        step = _point(100 + seed)
        step = (
            step.sign() if seed % 2 and shape == "box" else step / (step.abs().max() if shape == "box" else step.norm())
        )
        moved = x + radius * step
        assert _jacobian_norm(model, moved) <= composition.log_norm.exp().item() * (1 + 1e-9)
        assert ((model(moved) - model(x)).abs() <= width * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_two_values_has_no_constant_over_all_inputs_or_a_true_one(name):
    model, traced = _traced(name, False, _point(0))
    try:
        bound = compose(traced, CertifiedNorms(), **OPTIONS).log_norm.exp().item()
    except NoBoundError:
        return
    assert max(_jacobian_norm(model, _point(seed, scale)) for seed in range(5) for scale in (0.1, 3.0)) <= bound


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: torch.einsum("bii->bi", x[:, :3]), "two operands"),
        (lambda m, x: torch.einsum("bik,bjl->bij", x, x), "not a product of matrices"),
        (lambda m, x: x[x > 0].sum()[None, None], "integers or booleans"),
        (lambda m, x: x.gather(1, x.argsort(1)), "integers or booleans"),
        (lambda m, x: 1 / x, "may be zero"),
        (lambda m, x: x.square().sqrt(), "unbounded slope"),
        (lambda m, x: x @ x.mT, "multiplies two values"),
        (lambda m, x: torch.var(x, 1), "increases with its argument"),
        (lambda m, x: torch.linalg.norm(x, "nuc", dim=(1, 2))[:, None], "norms of vectors"),
        (lambda m, x: nn.functional.glu(x, 1), "no global Lipschitz constant"),
    ],
)
def test_what_has_no_constant_over_all_inputs_is_refused(function, message):
    model = _Of(lambda m, x: function(m, x).flatten(1)).eval()
    with pytest.raises(NoBoundError, match=message):
        compose(trace(model, _point(0)), CertifiedNorms(), **OPTIONS)
