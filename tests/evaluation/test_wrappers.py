"""Modules as other training loops wrap them: the numbers are those of the module inside, in float32."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning_fabric import Fabric
from torch.testing import assert_close

from fisher_reg import KLPenalty, SpectralPenalty, check_model, fisher_bound, fisher_spectral_norm
from tests import cases

# a gradient is rounded once to the precision of the weights
ROUNDING = {"bf16-true": 2**-8, "16-true": 2**-11}


def fabric(precision):
    return lambda module: Fabric(accelerator="cpu", precision=precision).setup(module)


def accelerate(precision):
    def prepare(module):
        AcceleratorState._reset_state(True)
        return Accelerator(cpu=True, mixed_precision=precision).prepare(module)

    return prepare


WRAPPERS = [
    pytest.param(wrap(precision), ROUNDING.get(precision, 0.0), id=f"{wrap.__name__}-{precision}")
    for wrap, precisions in {
        fabric: ("32-true", "bf16-mixed", "bf16-true", "16-true"),
        accelerate: ("no", "bf16"),
    }.items()
    for precision in precisions
]


def network_and_inputs():
    network = cases.tiny_network(batch_norm=True)
    for parameter in network.parameters():  # numbers that a half precision has too
        parameter.data = parameter.data.bfloat16().half().float()
    return network, torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("wrap", "rounding"), WRAPPERS)
def test_the_estimate_and_the_bound_are_those_of_the_module_inside(wrap, rounding):
    network, inputs = network_and_inputs()
    wrapped = wrap(copy.deepcopy(network))
    assert_close(fisher_spectral_norm(wrapped, inputs).eigenvalue, fisher_spectral_norm(network, inputs).eigenvalue)
    assert_close(fisher_bound(wrapped, inputs).value, fisher_bound(network, inputs).value)
    assert check_model(wrapped, inputs).passed


@pytest.mark.parametrize("penalty", [KLPenalty(), SpectralPenalty()], ids=lambda penalty: type(penalty).__name__)
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(("wrap", "rounding"), WRAPPERS)
def test_the_penalty_and_its_gradient_are_those_of_the_module_inside(wrap, rounding, is_training, penalty):
    network, inputs = network_and_inputs()
    wrapped = wrap(copy.deepcopy(network)).train(is_training)
    expected = penalty(network.train(is_training), inputs)
    expected.backward()
    value = penalty(wrapped, inputs)
    assert_close(value, expected)
    value.backward()
    for given, wanted in zip(wrapped.parameters(), network.parameters(), strict=True):
        if wanted.grad is not None:
            assert_close(given.grad.float(), wanted.grad, rtol=rounding + 1e-5, atol=1e-6)
