"""Cases: every estimate, and the check of a model."""

from __future__ import annotations

from functools import partial

import torch

import fisher_reg as fr
from fisher_reg.measurement import measure
from tests.accelerator import networks

SOLVERS = {
    "default": None,
    "exact": fr.Exact(),
    "lanczos_exact": fr.Lanczos(is_exact=True),
    "power": fr.PowerIteration(),
    "hutchinson_max": fr.HutchinsonMax(),
}
LIKELIHOODS = {"bernoulli": fr.Bernoulli(), "gaussian": fr.Gaussian(), "tempered": fr.MarginTempered()}
ESTIMATORS = {
    "default": None,
    "exact": fr.Exact(),
    "rademacher": fr.Hutchinson(),
    "normal_alone": fr.Hutchinson(probe=fr.StandardNormal(), solver=None),
    "sampled_labels": fr.Hutchinson(probe=fr.SampledLabels()),
}
_STD = [0.2, 0.3, 0.4]


def _taken(place, name="convolutional", dtype=torch.float64, **options):
    build, inputs = networks.NETWORKS[name]
    return place.put(build(**options)).to(dtype), place.put(inputs()).to(dtype)


def _spectral_norm(place, network="convolutional", num_classes=12, **options):
    model, inputs = _taken(place, network, num_classes=num_classes)
    result = fr.fisher_spectral_norm(model, inputs, **options)
    assert result.eigenvector.shape == inputs.shape
    vector = result.eigenvector.flatten(1)
    # the sign of an eigenvector is arbitrary
    return result.eigenvalue, vector[:, :, None] * vector[:, None, :8], result.converged


def _interval(place):
    interval = fr.fisher_spectral_norm(*_taken(place), solver=fr.Lanczos(is_exact=True)).interval()
    return interval.lower, interval.upper


def _with_generator(place):
    model, inputs = _taken(place)
    generator = torch.Generator().manual_seed(3)
    return fr.fisher_spectral_norm(model, inputs, solver=fr.HutchinsonMax(), generator=generator).eigenvalue


def _with_its_own_generator(place):
    """Every place has other numbers: what comes of them is the same as far as it is exact."""
    model, inputs = _taken(place)
    converged = fr.fisher_spectral_norm(model, inputs, generator=place.generator()).eigenvalue
    fr.fisher_linf_norm(model, inputs, generator=place.generator())
    fr.universal_spectral_norm(model, [inputs], generator=place.generator())
    samples = [fr.Hutchinson(probe=probe) for probe in (fr.Rademacher(), fr.StandardNormal(), fr.SampledLabels())]
    traces = [fr.fisher_trace(model, inputs, estimator=one, generator=place.generator()) for one in samples]
    return converged, *(trace >= converged for trace in traces)


def _forward_mode(place, network):
    return fr.fisher_spectral_norm(*_taken(place, network), solver=fr.Lanczos(is_exact=True)).eigenvalue


def _eigenpairs(place, **options):
    result = fr.fisher_eigenpairs(*_taken(place), 3, **options)
    return result.eigenvalue


def _trace(place, **options):
    return fr.fisher_trace(*_taken(place, num_classes=24), **options)


def _trace_with_generator(place):
    return _trace(place, estimator=fr.Hutchinson(), generator=torch.Generator().manual_seed(5))


def _effective_rank(place):
    return fr.fisher_effective_rank(*_taken(place))


def _norm_and_trace(place):
    result, trace = fr.fisher_spectral_norm_and_trace(*_taken(place))
    return result.eigenvalue, trace


def _kl_ratio(place):
    return fr.fisher_kl_ratio(*_taken(place, num_classes=4))


def _linf(place, num_classes):
    result = fr.fisher_linf_norm(*_taken(place, num_classes=num_classes), input_std=_STD)
    return result.value, result.perturbation, result.is_stationary, result.num_steps


def _single_step(place, geometry):
    return fr.single_step_ratio(*_taken(place), step=0.5, geometry=geometry)


def _universal(place, solver):
    model, inputs = _taken(place)
    result = fr.universal_spectral_norm(model, [inputs[:2], inputs[2:]], solver=solver)
    return result.eigenvalue, result.residual < 0.1 * result.eigenvalue


def _blackbox(place, estimator, **options):
    model, inputs = _taken(place, "smooth", num_classes=4)
    result = fr.blackbox_spectral_norm(lambda x: model(x).softmax(1), inputs[:2], estimator=estimator, **options)
    return result.eigenvalue, result.standard_error, result.trace, result.step


def _blackbox_with_its_own_generator(place):
    eigenvalue, *_ = _blackbox(place, fr.BlackBox(), generator=place.generator())
    return eigenvalue.isfinite()


def _measure(place):
    found = measure(*_taken(place), geometry=fr.LInf(), input_std=_STD)
    return found.result.eigenvalue, found.trace, found.kl_ratio, found.linf


def _input_std_on_device(place):
    model, inputs = _taken(place)
    return fr.fisher_spectral_norm(model, inputs, input_std=place.put(torch.tensor(_STD))).eigenvalue


def _left_out(place):
    model, inputs = _taken(place)
    mask = place.put(torch.tensor([0.0] * 10 + [-torch.inf] * 2).double())
    return fr.fisher_spectral_norm(lambda x: model(x) + mask, inputs).eigenvalue


def _side_inputs(place):
    model, inputs = _taken(place)
    scale = place.put(torch.linspace(0.5, 1.5, len(inputs)).double()[:, None])
    return fr.fisher_spectral_norm(lambda x, s: s * model(x), inputs, side_inputs=scale).eigenvalue


def _in(place, of_weights, of_inputs):
    model, inputs = _taken(place)
    return fr.fisher_spectral_norm(model.to(of_weights), inputs.to(of_inputs)).eigenvalue


def _check(place, is_training):
    model, inputs = _taken(place)
    found = fr.check_model(model.train(is_training), inputs, is_training=is_training)
    return [(finding.name, finding.passed) for finding in found.findings]


def _shown(place):
    return repr(fr.fisher_spectral_norm(*_taken(place, num_classes=4)))


ROUGH = ("single_precision", "half_precision", "its_own_generator")
"""Cases in which difference quotients are rounded visibly, or the random numbers are others."""

CASES = (
    {f"spectral_norm_{name}": partial(_spectral_norm, solver=solver) for name, solver in SOLVERS.items()}
    | {
        f"spectral_norm_{name}_100_classes": partial(_spectral_norm, solver=SOLVERS[name], num_classes=100)
        for name in ("default", "lanczos_exact")
    }
    | {f"spectral_norm_{name}": partial(_spectral_norm, likelihood=one) for name, one in LIKELIHOODS.items()}
    | {
        "spectral_norm_of_attention": partial(_spectral_norm, network="attention"),
        "spectral_norm_of_an_lstm": partial(_spectral_norm, network="lstm"),
        "spectral_norm_of_a_gru": partial(_spectral_norm, network="gru"),
        "its_own_generator": _with_its_own_generator,
        "spectral_norm_with_a_generator_of_the_cpu": _with_generator,
        "forward_mode_through_attention": partial(_forward_mode, network="attention"),
        "forward_mode_through_an_lstm": partial(_forward_mode, network="lstm"),
        "interval": _interval,
        "input_std_on_the_device": _input_std_on_device,
        "classes_that_are_left_out": _left_out,
        "side_inputs": _side_inputs,
        "single_precision": partial(_in, of_weights=torch.float32, of_inputs=torch.float32),
        "half_precision": partial(_in, of_weights=torch.bfloat16, of_inputs=torch.bfloat16),
        "eigenpairs": _eigenpairs,
        "eigenpairs_exact": partial(_eigenpairs, solver=fr.Exact()),
        "trace_with_a_generator_of_the_cpu": _trace_with_generator,
        "effective_rank": _effective_rank,
        "norm_and_trace": _norm_and_trace,
        "kl_ratio": _kl_ratio,
        "linf_norm_of_12_classes": partial(_linf, num_classes=12),
        "linf_norm_of_4_classes": partial(_linf, num_classes=4),
        "single_step_ratio_l2": partial(_single_step, geometry=fr.L2()),
        "single_step_ratio_linf": partial(_single_step, geometry=fr.LInf()),
        "universal_lanczos": partial(_universal, solver=fr.Lanczos(num_steps=8)),
        "universal_power": partial(_universal, solver=fr.PowerIteration()),
        "blackbox": partial(_blackbox, estimator=fr.BlackBox()),
        "blackbox_within_bounds": partial(_blackbox, estimator=fr.BlackBox(), bounds=(0.0, 1.0)),
        "blackbox_max": partial(_blackbox, estimator=fr.BlackBoxMax()),
        "blackbox_with_its_own_generator": _blackbox_with_its_own_generator,
        "measure": _measure,
        "check_model": partial(_check, is_training=False),
        "check_model_in_training": partial(_check, is_training=True),
        "repr_of_a_result": _shown,
    }
    | {f"trace_{name}": partial(_trace, estimator=one) for name, one in ESTIMATORS.items()}
)
