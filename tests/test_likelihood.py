import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Bernoulli,
    Categorical,
    Exact,
    Gaussian,
    KLPenalty,
    Lanczos,
    MarginTempered,
    NoBoundError,
    NonFiniteLogitsError,
    SpectralPenalty,
    fisher_bound,
    fisher_spectral_norm,
)
from fisher_reg.likelihood import largest_distance
from fisher_reg.outputs import check_logits
from tests import cases


def _tempered(z):
    first, second = z.topk(2).values
    temperature = (first - second) / 2
    p = (z / temperature).softmax(0)
    return (torch.diag(p) - torch.outer(p, p)) / temperature**2


BOUNDED = [
    (Categorical(), lambda z: torch.diag(z.softmax(0)) - torch.outer(z.softmax(0), z.softmax(0))),
    (Bernoulli(), lambda z: torch.diag(z.sigmoid() * (1 - z.sigmoid()))),
    (Gaussian(variance=4.0), lambda z: torch.eye(len(z), dtype=z.dtype) / 4),
]
CASES = [*BOUNDED, (MarginTempered(margin=2.0), _tempered)]


@pytest.mark.parametrize(("likelihood", "covariance"), CASES)
def test_factor_squared_is_the_fisher_matrix_of_the_logits(likelihood, covariance):
    logits = torch.randn(5, 4, dtype=torch.float64) * 3
    for z in logits:
        basis, rows = torch.eye(4, dtype=torch.float64), z.expand(4, 4)
        factor = likelihood.whiten(rows, basis).T
        assert_close(factor.T @ factor, covariance(z))
        assert_close(likelihood.unwhiten(rows, basis), factor)


@pytest.mark.parametrize(("likelihood", "covariance"), CASES)
def test_contrast_lies_below_the_fisher_matrix_and_its_bound_above(likelihood, covariance):
    logits = torch.randn(5, 4, dtype=torch.float64) * 3
    direction, weight = likelihood.contrast(logits)
    for z, c, omega in zip(logits, direction, weight, strict=True):
        eigenvalues = torch.linalg.eigvalsh(covariance(z) - omega * torch.outer(c, c))
        assert eigenvalues.min() > -1e-12 * covariance(z).norm()
        if (likelihood, covariance) in BOUNDED:
            assert torch.linalg.eigvalsh(covariance(z)).max() <= likelihood.largest_curvature() + 1e-12


@pytest.mark.parametrize(("likelihood", "covariance"), CASES)
def test_candidates_begin_with_the_contrast_and_span_all_outputs(likelihood, covariance):
    logits = torch.randn(5, 4, dtype=torch.float64) * 3
    candidates = likelihood.candidates(logits, 4)
    contrast = likelihood.contrast(logits)[0]
    assert_close(torch.cosine_similarity(candidates[:, 0], contrast), torch.ones(5, dtype=torch.float64))
    assert_close(candidates[:, :2], likelihood.candidates(logits, 2))
    assert (torch.linalg.matrix_rank(candidates) == 4).all()
    assert likelihood.candidates(logits, 9).shape[1] <= 4


def test_categorical_bound_is_reached_by_two_equal_classes():
    z = torch.tensor([[0.0, 0.0, -1e3]], dtype=torch.float64)
    p = z.softmax(1)[0]
    assert_close(torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p)).max(), Categorical().largest_curvature())


@pytest.mark.parametrize(("likelihood", "covariance"), CASES)
def test_the_curvature_of_a_linear_layer_is_that_of_the_dense_matrix_and_below_its_largest(likelihood, covariance):
    logits, rows = 3 * torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    for weight in (rows, None):
        matrix = torch.eye(4, dtype=torch.float64) if weight is None else weight
        dense = torch.stack([torch.linalg.eigvalsh(matrix.T @ covariance(z) @ matrix)[-1] for z in logits])
        curvature = likelihood.curvature_at(logits, weight)
        assert_close(curvature, dense)
        if (likelihood, covariance) in BOUNDED:
            assert (curvature <= likelihood.largest_curvature(weight) * (1 + 1e-12)).all()


def test_the_largest_curvature_is_reached_by_even_odds_of_the_two_farthest_rows():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]], dtype=torch.float64)
    logits = torch.tensor([[0.0, 0.0, -1e3]], dtype=torch.float64)
    assert_close(Categorical().largest_curvature(rows).item(), 25 / 4)
    assert_close(Categorical().curvature_at(logits, rows).item(), 25 / 4)
    assert Categorical().largest_curvature(torch.ones(3, 2)) == 0


def _variances(logits):
    """The dense Fisher matrices of categorical logits, from sums of positive terms: right also where they saturate."""
    p = logits.softmax(1)
    dense = -p[:, :, None] * p[:, None, :]
    off_diagonal = dense - torch.diag_embed(dense.diagonal(dim1=1, dim2=2))
    return off_diagonal - torch.diag_embed(off_diagonal.sum(2))


SPREADS = [0.0, 1e-9, 0.1, 1.0, 5.0, 30.0, 200.0]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("num_outputs", [2, 3, 40])
def test_the_curvature_of_many_classes_is_that_of_dense_matrices(spread, num_outputs):
    logits = spread * torch.randn(20, num_outputs, dtype=torch.float64)
    logits[10:, 1] = logits[10:, 0] = logits[10:].amax(1)  # two classes that are equally likely
    dense = _variances(logits)
    expected = torch.linalg.eigvalsh(dense)[:, -1]
    found = Categorical().curvature_at(logits)
    assert_close(found, expected, rtol=1e-10, atol=0)
    assert (found >= expected * (1 - 1e-14)).all()
    variance = logits.sigmoid() * (-logits).sigmoid()
    assert_close(Bernoulli().curvature_at(logits), variance.amax(1), rtol=1e-12, atol=0)
    for width in (1, 5, 60):
        rows = torch.randn(num_outputs, width, dtype=torch.float64)
        expected = torch.linalg.eigvalsh(rows.mT @ dense @ rows)[:, -1]
        assert_close(Categorical().curvature_at(logits, rows), expected, rtol=1e-9, atol=0)
        expected = torch.linalg.eigvalsh(rows.mT @ (variance[:, :, None] * rows))[:, -1]
        assert_close(Bernoulli().curvature_at(logits, rows), expected, rtol=1e-9, atol=0)


def test_the_curvature_of_a_saturated_softmax_is_that_of_its_two_likeliest_classes():
    for gap in (20.0, 100.0, 600.0):  # 2 p (1 - p), although p is one in double precision
        logits = torch.tensor([[gap, 0.0, -torch.inf], [gap, -torch.inf, 0.0]], dtype=torch.float64)
        expected = 2 * torch.tensor([gap, -gap], dtype=torch.float64).sigmoid().prod()
        assert_close(Categorical().curvature_at(logits), expected.expand(2), rtol=1e-12, atol=0)
    alone = torch.tensor([[0.0, -torch.inf, -torch.inf]], requires_grad=True)
    value = Categorical().curvature_at(alone)
    assert value == 0
    assert torch.autograd.grad(value.sum(), alone)[0].isfinite().all()


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), MarginTempered()])
def test_the_curvature_has_the_gradient_of_the_dense_matrix(likelihood):
    logits = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    rows = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(likelihood.curvature_at, (logits,))
    assert torch.autograd.gradcheck(likelihood.curvature_at, (logits, rows))


def test_the_curvature_of_equal_logits_has_a_finite_gradient():
    equal = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    for likelihood in (Categorical(), Bernoulli()):
        assert torch.autograd.grad(likelihood.curvature_at(equal).sum(), equal)[0].isfinite().all()


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), MarginTempered()])
def test_no_matrix_of_classes_by_classes_is_decomposed(likelihood, monkeypatch):
    sizes, eigvalsh = [], torch.linalg.eigvalsh

    def recorded(matrix):
        sizes.append(matrix.shape[-1])
        return eigvalsh(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", recorded)
    logits, rows = torch.randn(16, 2000), torch.randn(2000, 30)
    assert likelihood.curvature_at(logits).shape == (16,)
    assert sizes == []
    assert likelihood.curvature_at(logits, rows).shape == (16,)
    assert likelihood.curvature_at(logits[:, :5], rows[:5]).shape == (16,)
    assert set(sizes) == {30, 5}


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (7, 200), (600, 3), (2000, 20)])
def test_the_largest_distance_is_that_of_all_pairs(shape):
    for offset, scale in ((0.0, 1.0), (1e6, 1.0), (0.0, 1e-100), (0.0, 1e100)):
        rows = (offset + scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        pairs = scale * torch.cdist(rows / scale, rows / scale, compute_mode="donot_use_mm_for_euclid_dist")
        place = pairs.flatten().argmax().item()
        value = largest_distance(rows)
        assert_close(value / scale, pairs.max() / scale, rtol=1e-13, atol=0)
        (gradient,) = torch.autograd.grad(value, rows)
        at_rows = set(gradient.abs().sum(1).nonzero().flatten().tolist())
        if scale == 1 and len(rows) > 1:
            assert at_rows == {place // len(rows), place % len(rows)}
            assert_close(gradient.norm(), torch.tensor(2.0, dtype=torch.float64).sqrt())


def test_equal_rows_have_no_distance_and_rows_without_end_no_finite_one():
    rows = torch.full((300, 4), 0.1, requires_grad=True)
    value = largest_distance(rows)
    assert value == 0
    assert torch.autograd.grad(value, rows)[0].isfinite().all()
    assert largest_distance(torch.tensor([[0.0], [torch.inf]])) == torch.inf
    assert largest_distance(torch.tensor([[0.0], [torch.nan]])).isnan()


def test_saturated_logits_have_finite_values_and_gradients():
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    for likelihood in (Categorical(), Bernoulli()):
        value = likelihood.whiten(logits, torch.ones(1, 3)).square().sum() + likelihood.contrast(logits)[1].sum()
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


def test_bad_logits_are_named():
    with pytest.raises(
        ValueError, match=r"shape \(B, K\) with B = 3; it returned a tensor of shape \(3, 2, 2\).*logits_fn"
    ):
        check_logits(torch.zeros(3, 2, 2), 3, Categorical())
    with pytest.raises(ValueError, match="it returned dict"):
        check_logits({"logits": 0}, 3, Categorical())
    with pytest.raises(ValueError, match=r"at least 2 outputs.*K = 1.*Bernoulli"):
        check_logits(torch.zeros(3, 1), 3, Categorical())
    check_logits(torch.zeros(3, 1), 3, Bernoulli())
    with pytest.raises(NonFiniteLogitsError, match=r"2 of 3 examples.*number 1"):
        check_logits(torch.tensor([[0.0, 0.0], [torch.nan, 0.0], [0.0, torch.inf]]), 3, Categorical())


def test_gaussian_variance_must_be_positive():
    with pytest.raises(ValueError, match="positive variance; got 0"):
        Gaussian(variance=0)


def test_the_margin_tempered_eigenvalue_does_not_see_the_scale_of_the_logits():
    network, x = cases.tiny_network().double(), torch.randn(6, 6, dtype=torch.float64)
    plain = fisher_spectral_norm(network, x, likelihood=MarginTempered()).eigenvalue
    for scale in (1e-3, 30.0, 1e4):
        scaled = fisher_spectral_norm(lambda x, scale=scale: scale * network(x), x, likelihood=MarginTempered())
        assert_close(scaled.eigenvalue, plain)
    assert fisher_spectral_norm(lambda x: 1e4 * network(x), x).eigenvalue.median() < 1e-9


@pytest.mark.parametrize("mask", [-1e4, -1e6, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_a_mask_has_no_part_in_the_margin_tempered_eigenvalue(mask):
    network, x = nn.Linear(20, 10), torch.randn(4, 20)
    z = network(x).double().detach()
    temperature = z.topk(2).values.diff(dim=1).neg()
    p = (z / temperature).softmax(1)
    jacobian = network.weight.detach().double() / temperature[:, :, None]
    dense = jacobian.mT @ (torch.diag_embed(p) - p[:, :, None] * p[:, None]) @ jacobian
    expected = torch.linalg.eigvalsh(dense)[:, -1].float()

    def masked(y):
        return torch.cat([network(y), torch.full((len(y), 2), mask)], 1)

    for solver in (Exact(), Lanczos(num_steps=9, rtol=1e-3)):
        found = fisher_spectral_norm(masked, x, likelihood=MarginTempered(), solver=solver).eigenvalue
        assert_close(found, expected, rtol=1e-4, atol=0)
    assert_close(MarginTempered().curvature_at(masked(x), None), MarginTempered().curvature_at(network(x), None))
    for penalty in (SpectralPenalty(likelihood=MarginTempered()), KLPenalty(likelihood=MarginTempered())):
        values = [penalty(model, x) for model in (masked, network)]
        assert_close(values[0], values[1], rtol=1e-5, atol=0)
        gradients = [torch.autograd.grad(value, network.weight)[0] for value in values]
        assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * gradients[1].norm().item())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6, 1e30])
def test_the_margin_tempered_eigenvalue_has_no_scale_in_single_precision(scale):
    network, x = cases.tiny_network(), torch.randn(6, 6)
    plain, scaled = (
        fisher_spectral_norm(
            lambda y, factor=factor: factor * network(y), x, likelihood=MarginTempered(), solver=Exact()
        ).eigenvalue
        for factor in (1.0, scale)
    )
    assert_close(scaled, plain, rtol=1e-4, atol=0)
    value = KLPenalty(step=0.1, likelihood=MarginTempered())
    assert_close(value(lambda y: scale * network(y), x), value(network, x), rtol=1e-3, atol=0)


def test_the_margin_tempered_eigenvalue_of_two_classes_is_the_distance_to_the_boundary():
    weight = torch.randn(2, 5, dtype=torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64)
    distance = ((weight[0] - weight[1]) @ x.T).abs() / (weight[0] - weight[1]).norm()
    found = fisher_spectral_norm(lambda x: x @ weight.T, x, likelihood=MarginTempered(margin=3.0)).eigenvalue
    p = torch.tensor(3.0, dtype=torch.float64).sigmoid()
    assert_close(found, p * (1 - p) * 9 / distance**2)


def test_equal_logits_have_a_large_and_finite_tempered_eigenvalue():
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.zeros(1, 2)
    value = fisher_spectral_norm(lambda x: x @ weight.T, x, likelihood=MarginTempered()).eigenvalue
    assert torch.isfinite(value).all()
    assert value > 1e9


def test_the_margin_tempered_likelihood_refuses_what_it_cannot():
    with pytest.raises(ValueError, match="positive margin; got 0"):
        MarginTempered(margin=0)
    with pytest.raises(NoBoundError, match=r"no bound over all inputs.*likelihood=Categorical\(\)"):
        fisher_bound(cases.tiny_network(), torch.randn(1, 6), likelihood=MarginTempered())
