"""Cases: every bound."""

from __future__ import annotations

from functools import partial

import torch

import fisher_reg as fr
from tests.accelerator import networks

_STD = [0.2, 0.3, 0.4]


def _taken(place, network):
    build, inputs = networks.NETWORKS[network]
    return place.put(build(num_classes=4)), place.put(inputs(3))


def _values(bound):
    value = bound.log10_value
    # a bound over all inputs is a number and on no device
    return value if isinstance(value, torch.Tensor) else [value]


def _global(place, bound, network="convolutional", **options):
    return _values(bound(*_taken(place, network), **options))


def _radius(place, network):
    return fr.certified_radius(*_taken(place, network), input_std=_STD)


def _divergence(place, network):
    model, inputs = _taken(place, network)
    radius = place.put(torch.tensor([0.1, 0.01, 0.001]))
    return fr.certified_divergence(model, inputs, radius), fr.certified_divergence(model, inputs, 0.05)


def _domain(place, kind):
    model, inputs = _taken(place, "convolutional")
    low, high = place.put(torch.zeros(3, 8, 8)), place.put(torch.ones(3, 8, 8))
    domain = fr.Box(low, high) if kind == "box" else fr.L2Ball(place.put(networks.images(1)[0]), 20.0)
    return _values(fr.fisher_bound(model, inputs, domain=domain))


_SMALL = ("convolutional", "smooth")

ROUGH = ()

CASES = (
    {f"fisher_bound_{name}": partial(_global, bound=fr.fisher_bound, network=name) for name in _SMALL}
    | {f"local_bound_{name}": partial(_global, bound=fr.local_fisher_bound, network=name) for name in _SMALL}
    | {
        f"ball_bound_{name}": partial(_global, bound=fr.local_fisher_bound, network=name, radius=0.05)
        for name in _SMALL
    }
    | {f"radius_{name}": partial(_radius, network=name) for name in _SMALL}
    | {f"divergence_{name}": partial(_divergence, network=name) for name in _SMALL}
    | {
        "fisher_bound_in_pixels": partial(_global, bound=fr.fisher_bound, input_std=_STD),
        "fisher_bound_on_a_box": partial(_domain, kind="box"),
        "fisher_bound_on_a_ball": partial(_domain, kind="ball"),
        "local_bound_of_attention": partial(_global, bound=fr.local_fisher_bound, network="attention"),
        "lipschitz_bound": partial(_global, bound=fr.lipschitz_bound),
        "blockwise_bound": partial(_global, bound=fr.blockwise_fisher_bound),
        "blockwise_bound_of_two_segments": partial(_global, bound=fr.blockwise_fisher_bound, num_segments=2),
    }
)
