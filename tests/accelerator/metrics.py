"""Cases: every metric."""

from __future__ import annotations

from functools import partial

import torch
from torchmetrics import MetricCollection

import fisher_reg as fr
from fisher_reg.metrics import PerExampleValues, summarize
from tests.accelerator import networks


def _taken(place):
    return place.put(networks.convolutional()).double(), place.put(networks.images()).double()


def _metric(place, make, reduction):
    metric = make(reduction).to(place.device)
    model, inputs = _taken(place)
    for some in inputs.split(2):
        metric.update(model, some)
    return metric.compute()


def _wide_share(place):
    metric = fr.FisherSpectralNorm().to(place.device)
    metric.update(*_taken(place))
    return metric.compute(), metric.wide_share


def _forward(place):
    metric = fr.FisherSpectralNorm(solver=fr.Exact()).to(place.device)
    first = metric(*_taken(place))
    metric.reset()
    return first, metric(*_taken(place)), repr(metric)


def _collection(place):
    metrics = {"mean": fr.FisherTrace(), "max": fr.FisherTrace(torch.max), "norm": fr.FisherSpectralNorm()}
    collection = MetricCollection(metrics).to(place.device)
    collection.update(*_taken(place))
    return collection.compute()


def _merged(place):
    one, other = (fr.FisherSpectralNorm(None, solver=fr.Exact()).to(place.device) for _ in range(2))
    model, inputs = _taken(place)
    one.update(model, inputs[:2])
    other.update(model, inputs[2:])
    one.merge_state(other)
    return one.compute()


def _values(place):
    metric = PerExampleValues().to(place.device)
    metric.update(place.put(torch.arange(5.0)))
    return metric.compute(), summarize(metric.compute())


def _inference_mode(place):
    metric = fr.FisherSpectralNorm().to(place.device)
    with torch.inference_mode():
        model, inputs = _taken(place)
        metric.update(model, inputs)
    return metric.compute().clone()


_REDUCTIONS = {"mean": torch.mean, "max": torch.max, "values": None, "p95": partial(torch.quantile, q=0.95)}

ROUGH = ()

CASES = (
    {
        f"spectral_norm_{name}": partial(_metric, make=fr.FisherSpectralNorm, reduction=r)
        for name, r in _REDUCTIONS.items()
    }
    | {f"trace_{name}": partial(_metric, make=fr.FisherTrace, reduction=r) for name, r in _REDUCTIONS.items()}
    | {
        "collection": _collection,
        "forward_and_reset": _forward,
        "inference_mode": _inference_mode,
        "merged": _merged,
        "values_from_elsewhere": _values,
        "wide_share": _wide_share,
    }
)
