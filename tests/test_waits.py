"""How often the host waits for a device: whatever stops a training step, or an epoch, has a limit."""

import pytest

from fisher_reg import fisher_spectral_norm
from tests.accelerator import groups, networks

pytestmark = groups.needs_hooks

MOST = {
    "check of the logits": 1,
    "fisher_trace, Hutchinson alone": 1,
    "single_step_ratio": 1,
    "step with KLPenalty": 1,
    "step with SpectralPenalty": 1,
    "step with TracePenalty": 1,
    "step with LabelContrastPenalty": 2,
    "step with GradientNormPenalty": 2,
    "step with NuclearNormPenalty": 7,  # in two of them a singular value decomposition
    "values of a metric": 0,
}


@pytest.mark.parametrize("num_classes", [12, 100])
def test_a_solver_waits_twice_in_a_step_and_an_estimate_ten_times_beside(num_classes):
    counts = groups.waits()[f"fisher_spectral_norm, {num_classes} classes"]
    in_steps = sum(count for line, count in counts.items() if line.startswith("solvers/search.py"))
    # the same steps on the CPU, with the same random numbers; the start is a vector too
    result = fisher_spectral_norm(networks.convolutional(num_classes), networks.images())
    num_vectors = int(result.num_steps.max()) + 1
    assert num_vectors >= 4
    assert num_vectors <= in_steps <= 2 * num_vectors
    assert sum(counts.values()) - in_steps <= 10


def test_a_measurement_of_a_monitor_waits_no_more_than_its_solver_and_ten_times():
    counts = groups.waits()["measurement of a monitor"]
    in_steps = sum(count for line, count in counts.items() if line.startswith("solvers/search.py"))
    assert sum(counts.values()) - in_steps <= 8, counts


@pytest.mark.parametrize("task", MOST)
def test_the_host_waits_no_more_often_than_it_must(task):
    counts = groups.waits()[task]
    assert sum(counts.values()) <= MOST[task], counts


def test_a_monitor_waits_for_the_columns_the_pictures_and_the_single_step_once_each():
    counts = groups.waits()["measurement of a monitor"]
    of_callbacks = {line: count for line, count in counts.items() if line.startswith("callbacks/")}
    assert sum(of_callbacks.values()) <= 3, of_callbacks


def test_waits_are_counted_where_they_are_asked_for():
    (line,) = groups.waits()["check of the logits"]
    assert line.startswith("outputs.py:")
