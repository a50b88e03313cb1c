"""The fuzzer notices a rule that gives half of the right constant.

The rules are registered for subclasses that no other test uses, so that those of torch's own layers stay as they are.
"""

import math
from functools import cache

import pytest
import torch
from torch import nn

import fisher_reg as fr
from tests.bounds.claims import check
from tests.bounds.random_networks import random_network

SEEDS, TRIES = 400, 12


def _dense_norm(module, layer):
    """The norm of an affine layer, by its dense Jacobian."""
    shape = layer.input.shape[1:]
    identity = torch.eye(math.prod(shape), dtype=layer.input.dtype).view(-1, *shape)
    with torch.no_grad():
        columns = module(identity) - module(torch.zeros_like(identity[:1]))
    return torch.linalg.matrix_norm(columns.flatten(1).double(), 2)


def _normalisation(module, layer):
    largest = 1.0 if module.weight is None else module.weight.detach().double().abs().max()
    eps = torch.finfo(layer.input.dtype).eps if module.eps is None else module.eps
    return largest / math.sqrt(eps)


CONSTANTS = {
    nn.Linear: _dense_norm,
    nn.Conv1d: _dense_norm,
    nn.Conv2d: _dense_norm,
    nn.BatchNorm1d: _dense_norm,
    nn.BatchNorm2d: _dense_norm,
    nn.ReplicationPad2d: _dense_norm,
    nn.Upsample: _dense_norm,
    nn.LayerNorm: _normalisation,
    nn.RMSNorm: _normalisation,
    nn.ReLU: lambda module, layer: 1.0,
    nn.Softmax: lambda module, layer: 0.5,
}
"""The right constant over all inputs, by the layer."""


def _subclass(kind, factor):
    """Return a subclass of the layer whose rule gives the factor times the right constant."""
    subclass = type(f"{kind.__name__}Times{factor:g}".replace(".", "_"), (kind,), {})
    fr.register_bound_rule(subclass)(lambda module, layer: factor * CONSTANTS[kind](module, layer))
    return subclass


SUBCLASSES = {kind: {factor: _subclass(kind, factor) for factor in (0.5, 1.0)} for kind in CONSTANTS}


def _with_factor(kind, factor):
    """Return the generator of networks whose layers of this kind have the factor times the right constant."""

    def build(seed):
        model, inputs, description = random_network(seed)
        for module in model.modules():
            if type(module) is kind:
                module.__class__ = SUBCLASSES[kind][factor]
        return model, inputs, description

    return build


@cache
def _descriptions():
    return tuple(random_network(seed)[2] for seed in range(SEEDS))


def _seeds_with(kind):
    """Yield seeds of networks with such a layer, the shortest first, which have the least slack."""
    found = 0
    for description in sorted(_descriptions(), key=lambda item: (len(item.awkward), len(item.parts))):
        if kind.__name__ in str(description):
            network, _, _ = random_network(description.seed)
            if any(type(module) is kind for module in network.modules()):
                yield description.seed
                found += 1
        if found == TRIES:
            return


@pytest.mark.parametrize("kind", CONSTANTS, ids=lambda kind: kind.__name__)
def test_half_of_a_constant_is_noticed(kind):
    tried = []
    for seed in _seeds_with(kind):
        tried.append(seed)
        # Right with the whole constant and wrong with half of it, so that it was the factor.
        if check(seed, _with_factor(kind, 0.5)).violations and not check(seed, _with_factor(kind, 1.0)).violations:
            return
    pytest.fail(f"half of the constant of {kind.__name__} is not noticed with seeds {tried}")
