"""How often the host waits for the device in what is called most often: printed, by line of fisher_reg."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import fisher_reg as fr
from fisher_reg.callbacks.measuring import BoundFn, Subject, measure_bound, measure_probe
from fisher_reg.callbacks.probe import Part
from fisher_reg.measurement import measure
from fisher_reg.metrics import PerExampleValues
from fisher_reg.outputs import check_logits
from tests.accelerator import networks
from tests.accelerator.device import DEVICE
from tests.accelerator.waits import waits


def network_and_inputs(num_classes=12):
    """Return a convolutional network and five images on the device."""
    return networks.convolutional(num_classes).to(DEVICE), networks.images().to(DEVICE)


def _subject(keeps_pictures=True):
    network, inputs = network_and_inputs()
    part = Part(inputs.cpu(), None, torch.arange(len(inputs)))
    settings = {"solver": None, "likelihood": fr.Categorical(), "input_std": None, "geometry": fr.L2()}
    return Subject(network, [part], DEVICE, True, keeps_pictures, penalty=fr.KLPenalty(), **settings)


def _measurement_of_a_monitor():
    subject = _subject()
    return lambda: measure_probe(subject)


def _bound_of_a_monitor(bound: BoundFn):
    subject = _subject(keeps_pictures=False)
    values = measure_probe(subject)
    return lambda: measure_bound(values, 0, bound, subject)


def _spectral_norm(num_classes):
    network, inputs = network_and_inputs(num_classes)
    return lambda: fr.fisher_spectral_norm(network, inputs)


def _taken(function, **options):
    network, inputs = network_and_inputs()
    return lambda: function(network, inputs, **options)


def _penalised(penalty, is_training=True):
    network, inputs = network_and_inputs()
    labels = {"labels": torch.arange(5, device=DEVICE)} if getattr(penalty, "needs_labels", False) else {}
    return lambda: penalty(network.train(is_training), inputs, **labels).backward()


def _checked_logits():
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return lambda: check_logits(logits, 5, fr.Categorical())


def _metric():
    network, inputs = network_and_inputs()
    metric = PerExampleValues().to(DEVICE)
    return lambda: (metric.update(inputs[:, 0, 0, 0]), metric.compute())


TASKS: dict[str, Callable[[], Callable[[], object]]] = {
    "check of the logits": _checked_logits,
    "fisher_spectral_norm, 12 classes": partial(_spectral_norm, 12),
    "fisher_spectral_norm, 100 classes": partial(_spectral_norm, 100),
    "fisher_spectral_norm, Exact": partial(_taken, fr.fisher_spectral_norm, solver=fr.Exact()),
    "fisher_trace, Hutchinson alone": partial(_taken, fr.fisher_trace, estimator=fr.Hutchinson(solver=None)),
    "fisher_linf_norm": partial(_taken, fr.fisher_linf_norm),
    "single_step_ratio": partial(_taken, fr.single_step_ratio, step=0.5, geometry=fr.L2()),
    "measure": partial(_taken, measure),
    "measurement of a monitor": _measurement_of_a_monitor,
    "its bound at the inputs": partial(_bound_of_a_monitor, fr.local_fisher_bound),
    "its bound over all inputs": partial(_bound_of_a_monitor, fr.fisher_bound),
    "values of a metric": _metric,
} | {
    f"step with {type(penalty).__name__}": partial(_penalised, penalty)
    for penalty in (
        fr.KLPenalty(),
        fr.SpectralPenalty(),
        fr.TracePenalty(),
        fr.LabelContrastPenalty(),
        fr.GradientNormPenalty(),
        fr.NuclearNormPenalty(attack_share=1.0),
        fr.BoundPenalty(),
    )
}
"""From what is done to a function that prepares it; that returns the function that does it."""


def counts():
    """Return, of each task, from a line of fisher_reg to how often the host waits there."""
    found = {}
    for name, prepare in TASKS.items():
        torch.manual_seed(0)
        run = prepare()
        with waits() as counted:
            run()
        found[name] = dict(counted.most_common())
    return found


def print_counts():
    """Print the counts, the largest first."""
    for name, lines in counts().items():
        print(f"{name}: {sum(lines.values())} waits")
        for line, count in lines.items():
            print(f"    {count:4d}  {line}")
