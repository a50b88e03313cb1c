"""Estimates and metrics on a simulated device that is not the CPU: the same numbers, in the same place."""

from tests.accelerator import groups

pytestmark = groups.needs_hooks


@groups.parametrize("estimates")
def test_an_estimate_is_the_same_on_another_device(case):
    groups.check("estimates", case)


@groups.parametrize("metrics")
def test_a_metric_is_the_same_on_another_device(case):
    groups.check("metrics", case)
