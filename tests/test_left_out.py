"""Logits of minus infinity: the same numbers as of the model without these classes."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    Bernoulli,
    Categorical,
    Exact,
    FisherMonitor,
    FisherRegularizer,
    FisherSpectralNorm,
    FisherTrace,
    Gaussian,
    Hutchinson,
    KLPenalty,
    LabelContrastPenalty,
    Lanczos,
    MarginTempered,
    NonFiniteLogitsError,
    PowerIteration,
    SampledLabels,
    SpectralPenalty,
    TracePenalty,
    check_model,
    fisher_effective_rank,
    fisher_eigenpairs,
    fisher_spectral_norm,
    fisher_trace,
    universal_spectral_norm,
)
from fisher_reg.left_out import change, magnitude, present
from fisher_reg.operator import InputFisher, difference_quotient, double_backward, forward_mode
from fisher_reg.outputs import check_logits
from tests import cases

KEEP = torch.tensor([True, False, True, True, False, True, True, True, True])
LIKELIHOODS = [Categorical(), MarginTempered(), Bernoulli()]


class Network(nn.Module):
    """Nine classes, of which a rule makes some impossible."""

    def __init__(self, rule):
        super().__init__()
        self.body, self.rule = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 9)), rule

    def forward(self, x):
        return self.rule(self.body(x))


def _added(z):
    return z + torch.where(KEEP, 0.0, -torch.inf).to(z)


RULES = [
    lambda z: z.masked_fill(~KEEP, -torch.inf),
    _added,
    lambda z: torch.where(KEEP, z, torch.full_like(z, -torch.inf)),
]


@pytest.fixture(params=RULES, ids=["masked_fill", "added", "where"])
def pair(request):
    """The network with classes left out, and the one that has only the others, with the same parameters."""
    masked, part = Network(request.param).double(), Network(lambda z: z[:, KEEP]).double()
    part.body = masked.body
    return masked.eval(), part.eval(), torch.randn(5, 6, dtype=torch.float64)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("solver", [Exact(), Lanczos(9, rtol=1e-3), PowerIteration(1000, rtol=1e-3)])
def test_every_solver_gives_the_numbers_of_the_model_without_these_classes(pair, likelihood, solver):
    masked, part, x = pair
    options = {"likelihood": likelihood, "solver": solver}
    found, expected = fisher_spectral_norm(masked, x, **options), fisher_spectral_norm(part, x, **options)
    assert_close(found.eigenvalue, expected.eigenvalue, rtol=1e-5, atol=0)
    assert found.converged.all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_traces_pairs_ranks_and_data_sets_do_so_too(pair, likelihood):
    masked, part, x = pair
    for estimate in (
        lambda model: fisher_trace(model, x, estimator=Exact(), likelihood=likelihood),
        lambda model: fisher_eigenpairs(model, x, 3, likelihood=likelihood).eigenvalue,
        lambda model: fisher_effective_rank(model, x, likelihood=likelihood, solver=Exact(), estimator=Exact()),
        lambda model: likelihood.curvature_at(model(x), None),
    ):
        assert_close(estimate(masked), estimate(part), rtol=1e-6, atol=1e-12)
    mean = universal_spectral_norm(masked, [x[:3], x[3:]], likelihood=likelihood, solver=Lanczos(9, rtol=1e-6))
    expected = universal_spectral_norm(part, [x[:3], x[3:]], likelihood=likelihood, solver=Lanczos(9, rtol=1e-6))
    assert_close(mean.eigenvalue, expected.eigenvalue, rtol=1e-6, atol=0)
    drawn = fisher_trace(masked, x, estimator=Hutchinson(400, SampledLabels()), likelihood=likelihood)
    assert ((drawn / fisher_trace(part, x, estimator=Exact(), likelihood=likelihood) - 1).abs() < 0.5).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_penalties_have_the_value_and_the_gradient_without_these_classes(pair, likelihood):
    masked, part, x = pair
    for penalty in (
        KLPenalty(likelihood=likelihood),
        SpectralPenalty(likelihood=likelihood),
        SpectralPenalty(9, likelihood=likelihood),
    ):
        _assert_same(penalty(masked, x), penalty(part, x), masked)
    masked_labels, labels = torch.tensor([0, 2, 3, 8, 5]), torch.tensor([0, 1, 2, 6, 3])
    contrast = LabelContrastPenalty()
    _assert_same(contrast(masked, x, labels=masked_labels), contrast(part, x, labels=labels), masked)
    trace = TracePenalty(2000, likelihood=likelihood)(masked, x)
    assert abs(trace / fisher_trace(part, x, likelihood=likelihood).mean() - 1) < 0.1
    _gradient(trace, masked)


def _assert_same(found, expected, model):
    assert_close(found, expected, rtol=1e-9, atol=0)
    assert_close(_gradient(found, model), _gradient(expected, model), rtol=1e-7, atol=1e-12)


def _gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    gradient = torch.cat([one.flatten() for one in gradients])
    assert torch.isfinite(gradient).all()
    return gradient


def test_all_three_ways_to_push_a_tangent_agree(pair):
    masked, _, x = pair
    v = torch.randn(5, 6, dtype=torch.float64)
    pushed = [
        InputFisher(masked, x, Categorical(), linearize=rule).apply(v) for rule in (forward_mode, double_backward)
    ]
    assert_close(*pushed)
    quotient = difference_quotient(masked, x, masked(x), v, torch.ones(5, dtype=torch.float64))
    assert_close(Categorical().whiten(masked(x).detach(), quotient), pushed[0], rtol=1e-5, atol=1e-7)


def test_a_batch_that_changes_in_parts_is_still_noticed():
    # of logits with a size of infinity everything would be close to everything
    def coupled(x):
        return (x[:, :3] + x.sum(0)[:3]).masked_fill(torch.tensor([False, False, True]), -torch.inf)

    fisher = InputFisher(coupled, torch.randn(4, 6), Categorical())
    assert fisher.restrict(torch.tensor([True, False, True, False])) is None
    assert not check_model(coupled, torch.randn(2, 6)).passed


def test_the_model_is_found_in_order_and_a_random_one_is_refused(pair):
    masked, _, x = pair
    check = check_model(masked, x)
    assert check.passed, str(check)
    noisy = nn.Sequential(masked, _Noise())
    with pytest.raises(ValueError, match="is random"):
        fisher_spectral_norm(noisy, x)


class _Noise(nn.Module):
    def forward(self, z):
        return z + torch.randn_like(z)


def test_one_class_alone_cannot_change():
    keep = torch.arange(4) == 2
    network, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)

    def alone(y):
        return network(y).masked_fill(~keep, -torch.inf)

    for likelihood in (Categorical(), MarginTempered()):
        for solver in (Exact(), Lanczos()):
            found = fisher_spectral_norm(alone, x, likelihood=likelihood, solver=solver)
            assert_close(found.eigenvalue, torch.zeros(3), rtol=0, atol=0)
            assert found.converged.all()
        for penalty in (KLPenalty(likelihood=likelihood), SpectralPenalty(likelihood=likelihood)):
            value = penalty(alone, x)
            assert value == 0
            assert (_gradient(value, network) == 0).all()
    value = LabelContrastPenalty()(alone, x, labels=torch.tensor([2, 2, 2]))
    assert value == 0
    assert (_gradient(value, network) == 0).all()


def test_what_has_no_meaning_is_refused():
    z = torch.zeros(3, 4)
    z[0, 1] = -torch.inf
    for likelihood in LIKELIHOODS:
        check_logits(z, 3, likelihood)
    with pytest.raises(NonFiniteLogitsError, match=r"1 of 3 examples.*Gaussian outputs cannot be excluded"):
        check_logits(z, 3, Gaussian())
    for bad in (torch.inf, torch.nan):
        with pytest.raises(NonFiniteLogitsError, match=r"1 of 3 examples.*number 2"):
            check_logits(z.index_fill(0, torch.tensor([2]), bad), 3, Bernoulli())
    with pytest.raises(NonFiniteLogitsError, match=r"number 1.*each example needs a finite one"):
        check_logits(z.index_fill(0, torch.tensor([1]), -torch.inf), 3, Categorical())
    with pytest.raises(ValueError, match=r"1 of 2 labels name a class that the model leaves out"):
        LabelContrastPenalty()(Network(RULES[0]), torch.randn(2, 6), labels=torch.tensor([0, 1]))


def test_the_functions_of_classes_left_out_do_what_they_say():
    z, w = torch.tensor([[1.0, -torch.inf, -3.0]]), torch.tensor([[2.0, 5.0, -torch.inf]])
    assert_close(present(z), torch.tensor([[1.0, 0.0, -3.0]]))
    assert_close(change(z, w), torch.tensor([[1.0, 0.0, -torch.inf]]))
    assert_close(magnitude(z), torch.tensor([3.0]))


def test_metrics_and_callbacks_take_a_model_that_leaves_classes_out(tmp_path):
    class Module(cases.Plain):
        def forward(self, x):
            return self.network(x).masked_fill(torch.tensor([False, False, False, True]), -torch.inf)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1] % 3)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1] % 3))

    module = Module(cases.tiny_network())
    x = torch.randn(4, 6)
    with torch.no_grad():
        part = nn.Sequential(*module.network[:-1], nn.Linear(5, 3))
        part[-1].weight.copy_(module.network[-1].weight[:3])
        part[-1].bias.copy_(module.network[-1].bias[:3])
    for metric in (FisherSpectralNorm(solver=Exact()), FisherTrace(estimator=Exact())):
        assert_close(metric(module, x), metric(part, x))
    trainer = cases.trainer(
        tmp_path, callbacks=[FisherRegularizer(every_n_steps=1, batch_fraction=1.0), FisherMonitor()]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, cases.tiny_batches(), cases.tiny_batches())
    logged = trainer.callback_metrics
    assert logged["fisher/penalty_skipped"] == 0
    assert logged["fisher/penalty"] > 0
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert all(torch.isfinite(value) for name, value in logged.items() if name.startswith("fisher/lambda"))
    assert any(name.startswith("fisher/lambda") for name in logged)
