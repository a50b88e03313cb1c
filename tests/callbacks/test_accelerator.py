"""The callbacks in a Trainer of Lightning on a simulated device that is not the CPU."""

from tests.accelerator import groups

pytestmark = groups.needs_hooks


@groups.parametrize("training")
def test_a_training_with_a_callback_is_the_same_on_another_device(case):
    groups.check("training", case)
