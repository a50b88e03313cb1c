import re
from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import nn

import fisher_reg as fr
from tests import cases

X = torch.zeros(2, 6)


def _net():
    return cases.tiny_network().eval()


def _refused(call, *parts):
    with pytest.raises(TypeError, match="(.|\n)*".join(re.escape(part) for part in parts)):
        call()


@pytest.mark.parametrize(
    "measure",
    [fr.fisher_spectral_norm, fr.fisher_effective_rank, fr.fisher_spectral_norm_and_trace],
)
def test_a_solver_by_name_or_by_class_is_refused_by_functions(measure):
    _refused(lambda: measure(_net(), X, solver="lanczos"), "the string 'lanczos'. Write solver=Lanczos().")
    _refused(lambda: measure(_net(), X, solver="exact"), "Write solver=Exact().")
    _refused(lambda: measure(_net(), X, solver=fr.Lanczos), "the class Lanczos. Write solver=Lanczos().")
    _refused(lambda: measure(_net(), X, solver={"num_steps": 3}), "got a dict. Write solver=Lanczos().")
    _refused(lambda: measure(_net(), X, likelihood=fr.Categorical), "the class Categorical", "likelihood=Categorical()")
    _refused(lambda: measure(_net(), X, likelihood="bernoulli"), "Write likelihood=Bernoulli().")
    _refused(lambda: measure(_net(), X, likelihood=None), "got None. Write likelihood=Categorical().")


def test_other_functions_refuse_alike():
    _refused(lambda: fr.fisher_trace(_net(), X, estimator=fr.Exact), "fisher_trace", "class Exact", "estimator=Exact()")
    _refused(lambda: fr.fisher_trace(_net(), X, estimator="hutchinson"), "Write estimator=Hutchinson().")
    _refused(
        lambda: fr.fisher_eigenpairs(_net(), X, 2, solver=fr.PowerIteration()), "with eigenpairs; got PowerIteration"
    )
    _refused(lambda: fr.universal_spectral_norm(_net(), [X], solver=fr.Lanczos), "class Lanczos", "solver=Lanczos()")
    _refused(lambda: fr.universal_spectral_norm(_net(), [X], likelihood=fr.Gaussian), "likelihood=Gaussian()")
    _refused(lambda: fr.blackbox_spectral_norm(_net(), X, estimator=fr.BlackBox), "Write estimator=BlackBox().")
    _refused(lambda: fr.check_model(_net(), X, likelihood="gaussian"), "Write likelihood=Gaussian().")
    _refused(lambda: fr.Hutchinson(probe=fr.Rademacher), "Hutchinson needs probe", "Write probe=Rademacher().")
    _refused(lambda: fr.Hutchinson(solver="exact"), "Write solver=Exact().")


@pytest.mark.parametrize(
    "bound",
    [
        fr.fisher_bound,
        fr.local_fisher_bound,
        partial(fr.local_fisher_bound, radius=0.1),
        fr.blockwise_fisher_bound,
        lambda net, x, likelihood: fr.BoundPenalty(likelihood=likelihood)(net, x),
    ],
)
def test_bounds_refuse_a_likelihood_that_is_a_class(bound):
    _refused(lambda: bound(_net(), X, likelihood=fr.Categorical), "Write likelihood=Categorical().")


@pytest.mark.parametrize(
    "bound",
    [
        fr.fisher_bound,
        fr.lipschitz_bound,
        fr.local_fisher_bound,
        fr.certified_radius,
        partial(fr.certified_divergence, radius=0.1),
        lambda net, x, tightening: fr.BoundPenalty(tightening=tightening),
    ],
)
def test_bounds_refuse_a_tightening_that_is_a_class_or_a_name(bound):
    for tightening in (fr.Tightening, "all", None, {"dense": True}):
        _refused(lambda t=tightening: bound(_net(), X, tightening=t), "Write tightening=Tightening().")


@pytest.mark.parametrize("make", [fr.FisherSpectralNorm, fr.FisherTrace, fr.FisherMonitor, fr.KLPenalty])
def test_constructors_refuse_at_once(make):
    _refused(lambda: make(likelihood=fr.Categorical), f"{make.__name__} needs likelihood", "likelihood=Categorical()")


def test_a_metric_names_itself():
    _refused(lambda: fr.FisherSpectralNorm(solver=fr.Exact), "FisherSpectralNorm needs solver", "solver=Exact()")
    _refused(lambda: fr.FisherSpectralNorm("mean"), "the string 'mean'. Write reduction=torch.mean.")
    _refused(lambda: fr.FisherTrace("median"), "Write reduction=torch.median.")
    _refused(lambda: fr.FisherTrace(nn.Identity), "the class Identity. Write reduction=Identity().")
    _refused(lambda: fr.FisherTrace(estimator="exact"), "FisherTrace needs estimator", "estimator=Exact()")
    _refused(lambda: fr.SpectralPenalty(reduction="mean"), "SpectralPenalty needs reduction", "reduction=torch.mean")
    _refused(lambda: fr.SpectralPenalty(reduction=None), "got None. Write reduction=torch.mean.")


def test_the_regularizer_names_itself():
    _refused(lambda: fr.FisherRegularizer(penalty="kl"), "FisherRegularizer needs penalty", "penalty=KLPenalty()")
    _refused(lambda: fr.FisherRegularizer(0.1, "spectral"), "Write penalty=SpectralPenalty().")
    _refused(lambda: fr.FisherRegularizer(penalty=fr.KLPenalty), "the class KLPenalty. Write penalty=KLPenalty().")
    _refused(lambda: fr.FisherRegularizer(penalty=nn.Identity), "the class Identity")
    _refused(lambda: fr.FisherRegularizer(schedule="cosine"), "Write schedule=CosineSchedule().")
    _refused(lambda: fr.FisherRegularizer(schedule=fr.CosineSchedule), "class CosineSchedule", "CosineSchedule().")
    _refused(lambda: fr.FisherRegularizer(labels_fn="y"), "Write labels_fn=lambda batch: batch['y'].")


def test_the_monitor_names_itself():
    _refused(lambda: fr.FisherMonitor(solver=fr.Lanczos), "FisherMonitor needs solver", "Write solver=Lanczos().")
    _refused(lambda: fr.FisherMonitor(inputs_fn="pixels"), "Write inputs_fn=lambda batch: batch['pixels'].")
    _refused(lambda: fr.FisherMonitor(inputs_fn=1), "Write inputs_fn=lambda batch: batch[1].")
    _refused(lambda: fr.FisherMonitor(logits_fn="out"), "Write logits_fn=lambda module, x: module(x)['out'].")
    _refused(lambda: fr.FisherMonitor(side_inputs_fn="mask"), "Write side_inputs_fn=lambda batch: (batch['mask'],).")


@pytest.mark.parametrize(
    ("bounds", "remedy"),
    [
        (fr.fisher_bound, "Write bounds=(fisher_bound,)."),
        (fr.local_fisher_bound, "Write bounds=(local_fisher_bound,)."),
        ("global", "Write bounds=(fisher_bound,)."),
        (("global",), "the string 'global' in it. Write bounds=(fisher_bound,)."),
        (["local"], "Write bounds=(local_fisher_bound,)."),
        ([fr.Tightening], "the class Tightening in it. Write bounds=(fisher_bound,)."),
        ([fr.Tightening()], "in it. Write bounds=(fisher_bound,)."),
        ({"global": fr.fisher_bound}, "Write bounds=(fisher_bound,)."),
        (None, "Write bounds=() for none."),
        (True, "Write bounds=(fisher_bound,)."),
        ((fr.lipschitz_bound,), "lipschitz_bound cannot be called as"),
    ],
)
def test_bounds_that_are_no_sequence_of_bounds_are_refused(bounds, remedy):
    _refused(lambda: fr.FisherMonitor(bounds=bounds), "FisherMonitor needs bounds", remedy)


def test_a_model_must_be_an_instance():
    _refused(lambda: fr.fisher_trace(nn.Linear, X), "model must be a function", "class Linear. Write model=Linear().")
    _refused(lambda: fr.fisher_trace(_net().state_dict(), X), "got a OrderedDict")
    _refused(lambda: fr.KLPenalty()("resnet18", X), "the string 'resnet18'")
    _refused(lambda: fr.LogitsOf(_net(), "logits"), "LogitsOf needs logits_fn", "module(x)['logits']")
    _refused(lambda: fr.LogitsOf(_net(), None), "got None")


class Own:
    """Without a base class: whatever has the methods will do."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class Callable:
    def __call__(self, *args, **kwargs):
        return torch.zeros(())


def test_objects_of_the_user_are_accepted():
    fr.fisher_spectral_norm(_net(), X, solver=Own(fr.Exact()), likelihood=Own(fr.Categorical()))
    fr.fisher_trace(_net(), X, estimator=Own(fr.Exact()))
    fr.fisher_eigenpairs(_net(), X, 2, solver=Own(fr.Lanczos()))
    fr.FisherSpectralNorm(Callable(), solver=Own(fr.Lanczos()))
    fr.FisherTrace(list)
    fr.FisherRegularizer(penalty=lambda model, inputs, generator=None: torch.zeros(()))
    fr.FisherRegularizer(penalty=Callable(), schedule=Own(fr.CosineSchedule()))
    fr.FisherRegularizer(penalty=nn.Identity())
    fr.FisherMonitor(bounds=[Callable(), partial(fr.fisher_bound, tightening=fr.Tightening(dense=False))])
    assert len(fr.FisherMonitor(bounds=(bound for bound in (fr.fisher_bound,))).bounds) == 1
    assert fr.FisherMonitor(bounds=[]).bounds == ()


class Configuration(Mapping):
    """As OmegaConf has them: every attribute is there, with the value None."""

    def __getitem__(self, key):
        raise KeyError(key)

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0

    def __getattr__(self, name):
        return None


def test_a_configuration_that_was_not_instantiated_is_refused():
    _refused(lambda: fr.FisherMonitor(solver=Configuration()), "got a Configuration. Write solver=Lanczos().")
