"""Bounds on a simulated device that is not the CPU."""

from tests.accelerator import groups

pytestmark = groups.needs_hooks


@groups.parametrize("bounds")
def test_a_bound_is_the_same_on_another_device(case):
    groups.check("bounds", case)
