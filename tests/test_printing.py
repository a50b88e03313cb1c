import numpy as np
import pytest
import torch
from torch import nn

from fisher_reg import (
    BlackBox,
    BlackBoxMax,
    BoundPenalty,
    Box,
    CosineSchedule,
    Exact,
    FisherMonitor,
    FisherRegularizer,
    FisherSpectralNorm,
    FisherTrace,
    GradientNormPenalty,
    Hutchinson,
    HutchinsonMax,
    KLPenalty,
    L2Ball,
    LabelContrastPenalty,
    Lanczos,
    LinearSchedule,
    NuclearNormPenalty,
    PowerIteration,
    SpectralPenalty,
    TracePenalty,
    blackbox_spectral_norm,
    check_model,
    fisher_bound,
    fisher_eigenpairs,
    fisher_spectral_norm,
    local_fisher_bound,
    universal_spectral_norm,
)
from fisher_reg.callbacks.control import LambdaControl
from fisher_reg.measurement import measure
from fisher_reg.solvers.interval import Interval
from fisher_reg.solvers.result import part
from tests import cases

LONGEST = 200
STD = torch.full((3, 32, 32), 0.25)


def _network():
    torch.manual_seed(0)
    return cases.tiny_network()


def _many_classes():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30))


def _inputs(count=8):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def _checked(value, *expected):
    text = repr(value)
    assert len(text) <= LONGEST, text
    assert "\n" not in text
    for words in expected:
        assert words in text, text
    return text


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (FisherMonitor(), ["num_samples=256"]),
        (FisherMonitor(input_std=STD, probe=torch.zeros(5, 6)), ["num_samples=5"]),
        (FisherRegularizer(0.3), ["weight=0.3", "KLPenalty(step=0.5)", "every_n_steps=10"]),
        (FisherRegularizer(penalty=KLPenalty(input_std=STD)), ["input_std=tensor of shape (3, 32, 32)"]),
        (FisherRegularizer(penalty=SpectralPenalty(), target_lambda=2.0), ["target_lambda=2", "weight_now=0.1"]),
        (FisherRegularizer(schedule=LinearSchedule(0.5)), ["LinearSchedule(end=0.5"]),
        (FisherRegularizer(penalty=lambda model, inputs, generator: 0), ["penalty=<lambda>"]),
        (CosineSchedule(0.1), ["end=0.1"]),
        (LambdaControl(3.0, 0.1), ["target=3.0", "weight=0.1"]),
        (KLPenalty(0.25, input_std=np.ones((3, 64, 64))), ["step=0.25", "array of shape (3, 64, 64)"]),
        (KLPenalty(input_std=[0.1] * 64), ["64 values"]),
        (SpectralPenalty(2, input_std=STD), ["num_steps=2", "(3, 32, 32)"]),
        (SpectralPenalty(reduction=torch.sum), ["num_steps=0", "reduction=sum"]),
        (TracePenalty(3, input_std=torch.tensor(0.25)), ["num_samples=3", "input_std=0.25"]),
        (LabelContrastPenalty(input_std=STD), ["LabelContrastPenalty(input_std=tensor"]),
        (GradientNormPenalty(0.25, input_std=STD), ["GradientNormPenalty(epsilon=0.25, input_std=tensor"]),
        (NuclearNormPenalty(0.25, input_std=STD), ["epsilon=0.25", "attack_share=0.5"]),
        (BoundPenalty(input_std=STD), ["BoundPenalty(input_std=tensor"]),
        (FisherSpectralNorm(), ["reduction=mean", "0 examples"]),
        (FisherTrace(None), ["reduction=None"]),
        (Lanczos(7), ["num_steps=7"]),
        (PowerIteration(7), ["max_iterations=7"]),
        (HutchinsonMax(7), ["num_samples=7"]),
        (Exact(), ["Exact("]),
        (Hutchinson(7), ["num_samples=7"]),
        (BlackBox(70), ["num_queries=70"]),
        (BlackBoxMax(70), ["num_queries=70"]),
        (Box(torch.zeros(3, 32, 32), 1.0), ["low=tensor of shape (3, 32, 32)", "high=1.0"]),
        (L2Ball(torch.zeros(3, 32, 32), 0.5), ["centre=tensor of shape (3, 32, 32)", "radius=0.5"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_settings_are_one_short_line(value, parts):
    _checked(value, *parts)


def test_an_estimate_says_median_largest_and_what_has_not_converged():
    network = torch.nn.Sequential(_network(), torch.nn.Linear(4, 7))
    result = fisher_spectral_norm(network, _inputs(), solver=Lanczos(num_steps=1, rtol=0.0, is_exact=True))
    median, largest = result.eigenvalue.median(), result.eigenvalue.max()
    shown = ["8 examples", f"median {median:.4g}", f"largest {largest:.4g}", "8 not converged", "by Lanczos"]
    _checked(result, *shown, f"{result.num_matvecs} matvecs")
    _checked(result.interval(), "8 examples", f"{result.interval().lower.max():.4g}", "failure_probability=0.02")
    _checked(result.random_start, "roots=tensor of shape (8, ")


def test_an_upper_end_that_is_infinite_is_printed_as_such():
    interval = Interval(torch.ones(4), torch.tensor([2.0, 3.0, torch.inf, torch.inf]), 0.5)
    _checked(interval, "4 examples: lower median 1, largest 1; upper median 3, largest inf; failure_probability=0.5")


def test_an_estimate_of_one_example_is_its_number():
    result = fisher_spectral_norm(_network(), _inputs(1), solver=Exact())
    _checked(result, f"1 example: eigenvalue {result.eigenvalue.item():.4g};", "0 not converged", "by Exact")


def test_several_eigenpairs_say_how_many_and_show_the_largest():
    result = fisher_eigenpairs(_network(), _inputs(), 3)
    _checked(result, "8 examples with 3 eigenpairs", f"largest {result.eigenvalue[:, 0].max():.4g}")


def test_results_of_no_examples_say_so():
    result = part(fisher_spectral_norm(_network(), _inputs()), torch.zeros(0, dtype=torch.long))
    _checked(result, "0 examples: eigenvalue none")
    result = part(fisher_eigenpairs(_network(), _inputs(), 2), torch.zeros(0, dtype=torch.long))
    _checked(result, "0 examples with 2 eigenpairs: eigenvalue none")


def test_an_estimate_that_carries_a_gradient_is_printed():
    network = _network()
    loss = SpectralPenalty()(network, _inputs())
    assert loss.requires_grad
    _checked(measure(network, _inputs()), "8 examples: eigenvalue median", "trace median", "kl_ratio median")


def test_bounds_are_one_line_and_their_table_is_for_print():
    network = _network()
    bound = fisher_bound(network, _inputs())
    _checked(bound, "global, certified", f"10^{bound.log10_value:.4g}", f"{len(bound.terms)} layers")
    assert str(bound).count("\n") > 3
    local = local_fisher_bound(network, _inputs())
    _checked(local, "local, certified, 8 examples", f"largest {local.log10_value.max():.4g}")


def test_an_estimate_by_queries_says_how_many_have_no_number():
    network = _network()

    result = blackbox_spectral_norm(lambda x: network(x).softmax(1).detach(), _inputs())
    shown = f"{result.eigenvalue[~result.eigenvalue.isnan()].max():.4g}"
    _checked(result, "8 examples", shown, f"{result.num_queries} queries")
    with pytest.warns(UserWarning, match="NaN at"):
        result = blackbox_spectral_norm(lambda x: torch.ones(len(x), 4) / 4, _inputs())
    _checked(result, "eigenvalue none; 8 without a number")


def test_a_check_names_what_failed_and_its_table_is_for_print():
    check = check_model(_network(), _inputs(2))
    _checked(check, "passed", f"of {len(check.findings)} verified")
    failed = check_model(nn.Sequential(_network(), nn.Softmax(1)), _inputs(2))
    _checked(failed, "FAILED: not probabilities")
    assert str(failed).count("\n") > 3


def test_the_result_over_a_data_set_is_short():
    result = universal_spectral_norm(_network(), [(_inputs(), None)])
    _checked(result)


def test_metrics_count_the_examples_they_have_seen():
    metric = FisherSpectralNorm()
    metric.update(_network(), _inputs())
    metric.update(_network(), _inputs())
    _checked(metric, "16 examples")


def test_a_monitor_shows_its_last_number(tmp_path):
    monitor = FisherMonitor(num_samples=4)
    trainer = cases.trainer(tmp_path, callbacks=[monitor])
    trainer.fit(cases.Plain(_network()), cases.tiny_batches(), cases.tiny_batches(seed=1))
    _checked(monitor, f"lambda_max_mean={monitor.history[-1]['fisher/lambda_max_mean']:.4g}")


def test_an_estimate_prints_a_row_per_example_with_its_interval():
    solver = Lanczos(num_steps=20, is_exact=True, failure_probability=1e-6)
    result = fisher_spectral_norm(_many_classes(), _inputs(3), solver=solver)
    lines = str(result).splitlines()
    assert lines[1].split() == ["example", "λ", "lower", "upper", "residual", "converged"]
    found = result.interval(1e-6)
    for i, line in enumerate(lines[2:5]):
        cells = line.split()
        wanted = [i, result.eigenvalue[i], found.lower[i], found.upper[i], result.residual[i]]
        assert [float(cell) for cell in cells[:5]] == pytest.approx([float(number) for number in wanted], rel=1e-3)
        assert cells[5] == "yes"
    assert lines[5] == "lower <= λ <= upper, except with probability 1e-06 for each example"
    assert len(lines) == 6


def test_a_long_batch_prints_eight_rows_and_what_is_left():
    lines = str(fisher_spectral_norm(_network(), _inputs(20), solver=Exact())).splitlines()
    assert len(lines) == 12
    assert lines[-2:] == ["… and 12 examples more", "lower <= λ <= upper, certain up to round-off"]


def test_an_estimate_by_difference_quotients_promises_no_upper_end():
    result = fisher_spectral_norm(_many_classes(), _inputs(2))
    assert not result.residual_is_exact
    assert str(result).splitlines()[1].split() == ["example", "λ", "residual", "converged"]
    assert str(result).splitlines()[-1] == "λ is an estimate from below"


def test_several_eigenvalues_print_side_by_side():
    lines = str(fisher_eigenpairs(_network(), _inputs(2), 2)).splitlines()
    assert lines[1].split() == ["example", "λ_1", "λ_2", "largest", "residual", "converged"]


def test_an_estimate_by_queries_prints_its_errors_and_why_a_number_is_missing():
    network = _network()
    found = blackbox_spectral_norm(lambda x: network(x).softmax(1), _inputs(2), estimator=BlackBox(num_queries=40))
    assert "standard error" in str(found)
    assert "40 queries each" in str(found)
    with pytest.warns(UserWarning, match="no prediction differs"):
        missing = blackbox_spectral_norm(lambda x: torch.eye(3)[torch.zeros(len(x)).long()], _inputs(2))
    assert "example 1: NaN, since no prediction differs from the one at the input" in str(missing)
