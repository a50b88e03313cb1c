"""Penalties and their gradients on a simulated device that is not the CPU."""

from tests.accelerator import groups

pytestmark = groups.needs_hooks


@groups.parametrize("penalties")
def test_a_penalty_and_its_gradient_are_the_same_on_another_device(case):
    groups.check("penalties", case)
