"""The verdicts of an audit, and what a continuous integration gets of them."""

import json
import math
import subprocess
import sys

import pytest
import torch

from recipes.attacks import AttackResult, AutoAttack, AutoProjectedGradient, MinimalPerturbation
from recipes.evaluate.audit import Attacked
from recipes.evaluate.masking import masking
from recipes.evaluate.numbers import Interval, Number, names
from recipes.evaluate.thresholds import Threshold, failure, judged, parsed
from tests.recipes.test_evaluate import ROOT, SMALL, _npz

ATTACKS = ("pgd", "minimal")


def _number(value, interval=None):
    return Number("n", value, "", "estimate", 10, interval)


def test_the_worse_end_of_the_interval_is_compared():
    number = _number(0.9, Interval(0.8, 0.95, 0.95))
    for side, limit, compared, passed in (
        ("min", 0.8, 0.8, True),
        ("min", 0.85, 0.8, False),
        ("max", 0.95, 0.95, True),
        ("max", 0.93, 0.95, False),
    ):
        (verdict,) = judged([Threshold("accuracy", side, limit)], {"accuracy": number})
        assert (verdict.compared, verdict.passed) == (compared, passed)
    (verdict,) = judged([Threshold("accuracy", "min", 0.85)], {"accuracy": number})
    assert "the value 0.9 alone would pass" in verdict.reason
    (verdict,) = judged([Threshold("accuracy", "min", 0.91)], {"accuracy": number})
    assert "alone would pass" not in verdict.reason


def test_a_number_without_an_interval_is_compared_itself_and_one_that_is_missing_fails():
    limits = [Threshold("accuracy", "min", 0.9), Threshold("accuracy", "max", 0.9)]
    assert [verdict.passed for verdict in judged(limits, {"accuracy": _number(0.9)})] == [True, True]
    for number in (_number(math.nan), _number(math.nan, Interval(0, 1, 0.95))):
        verdicts = judged(limits, {"accuracy": number})
        assert [verdict.passed for verdict in verdicts] == [False, False]
        assert "was not measured" in verdicts[0].reason


def test_a_distance_that_was_not_reached_passes_a_smallest_distance_only():
    number = _number(math.inf, Interval(0.7, math.inf, 0.95))
    limits = [Threshold("d", "min", 0.5), Threshold("d", "max", 100)]
    assert [verdict.passed for verdict in judged(limits, {"d": number})] == [True, False]


def test_thresholds_are_read_from_flat_and_nested_names_in_the_order_of_the_numbers():
    expected = (Threshold("accuracy", "min", 0.9), Threshold("attacks.pgd.accuracy", "max", 1.0))
    flat = {"attacks.pgd.accuracy": {"max": 1}, "accuracy": {"min": 0.9}}
    nested = {"attacks": {"pgd": {"accuracy": {"max": 1}}}, "accuracy": {"min": 0.9}}
    assert parsed(flat, ATTACKS) == parsed(nested, ATTACKS) == expected
    assert parsed({}, ATTACKS) == parsed(None, ATTACKS) == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"acuracy": {"min": 0.9}}, "acuracy, which is not a number of this audit. Did you mean accuracy.* lambda_p95"),
        ({"attacks.cw.accuracy": {"min": 0.9}}, "attacks.cw.accuracy, which is not a number.*attacks.pgd.accuracy"),
        ({"accuracy": {}}, r"thresholds.accuracy needs min, max or both; got \{\}"),
        ({"accuracy": 0.9}, "thresholds.accuracy needs min, max or both; got 0.9"),
        ({"accuracy": None}, "thresholds.accuracy needs min, max or both; got None"),
        ({"accuracy": {"min": 0.9, "mean": 1}}, "thresholds.accuracy takes only min and max; got min, mean"),
        ({"accuracy": {"min": "much"}}, "thresholds.accuracy.min must be a finite number; got 'much'"),
        ({"accuracy": {"min": math.nan}}, "thresholds.accuracy.min must be a finite number"),
        ({"accuracy": {"min": True}}, "thresholds.accuracy.min must be a finite number"),
        ({"accuracy": {"min": 0.9, "max": 0.8}}, "can never be met: min=0.9 is above max=0.8"),
        ({"min": 0.9}, "takes only min and max"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parsed(given, ATTACKS)


def test_one_line_tells_which_thresholds_fail():
    passed, failed = ({"verdict": word, "reason": f"{word}ed."} for word in ("pass", "fail"))
    assert failure([passed]) is None
    assert failure([]) is None
    assert failure([passed, failed]) == "1 of 2 thresholds failed. failed."


def _run(folder, *arguments, flags=()):
    _npz(folder / "grey.npz", num_channels=1)
    network = ["~model", "model._target_=tests.recipes.test_evaluate.Brightness", "model.scale=4"]
    settings = [*SMALL, "data=npz", f"data.path={folder / 'grey.npz'}", *network, *arguments]
    command = [sys.executable, "-m", "recipes.evaluate", *flags, *settings]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_a_threshold_that_fails_ends_the_command_with_status_3_after_all_files_were_written(tmp_path):
    folder = tmp_path / "audit"
    limits = "thresholds={accuracy: {min: 0.2}, attacks.minimal.success: {max: 0.1}, lambda_max: {max: 1e-9}}"
    done = _run(tmp_path, limits, f"hydra.run.dir={folder}")
    assert done.returncode == 3, done.stderr[-3000:]
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("2 of 3 thresholds failed. lambda_max ≤ 1e-09: fails")
    assert "attacks.minimal.success ≤ 0.1: fails" in line
    assert "Traceback" not in done.stderr
    assert "FAIL" in done.stdout
    assert {path.name for path in folder.iterdir()} >= {"audit.html", "audit.json", "audit.sarif", "model_card.yaml"}
    assert "2 of 3 thresholds fail: lambda_max ≤ 1e-09" in (folder / "audit.html").read_text(encoding="utf-8")
    record = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert [one["verdict"] for one in record["thresholds"]] == ["pass", "fail", "fail"]
    _check_sarif(json.loads((folder / "audit.sarif").read_text(encoding="utf-8")), record)


def _check_sarif(log, record):
    """Check what SARIF 2.1.0 requires, and what code scanning needs besides."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "fisher-reg audit"
    assert driver["version"] == record["provenance"]["environment"]["fisher-reg"]
    rules = driver["rules"]
    assert [rule["id"] for rule in rules] == ["accuracy.min", "lambda_max.max", "attacks.minimal.success.max"]
    for place, (result, verdict) in enumerate(zip(run["results"], record["thresholds"], strict=True)):
        assert result["ruleId"] == rules[place]["id"] == f"{verdict['name']}.{verdict['side']}"
        assert result["ruleIndex"] == place
        assert result["message"]["text"] == verdict["reason"]
        assert result["kind"] == verdict["verdict"]
        assert result["level"] == {"pass": "none", "fail": "error"}[result["kind"]]  # another kind than fail has none
        (location,) = result["locations"]
        artifact = location["physicalLocation"]["artifactLocation"]
        assert run["artifacts"][artifact["index"]]["location"]["uri"] == artifact["uri"] == "audit.json"
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is True
    assert invocation["exitCode"] == 3
    assert invocation["endTimeUtc"].endswith("Z")


def test_a_sweep_goes_on_after_a_threshold_that_fails(tmp_path):
    sweep = ["seed=0,1", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${hydra.job.num}"]
    done = _run(tmp_path, *sweep, "thresholds={lambda_max: {max: 1e-9}}", flags=["-m"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("1 of 1 thresholds failed") == 2
    assert all((tmp_path / job / "audit.sarif").is_file() for job in "01")


def test_a_threshold_of_no_number_is_told_before_any_work(tmp_path):
    done = _run(tmp_path, "thresholds={lambda_maximum: {max: 1}}", f"hydra.run.dir={tmp_path / 'audit'}")
    assert done.returncode == 1
    assert "lambda_maximum, which is not a number of this audit. Did you mean lambda_max?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "audit" / "audit.json").exists()


def _attacked(attack, misclassified, euclidean):
    masked = torch.zeros(4, dtype=torch.bool)
    result = AttackResult(torch.zeros(4, 1, 2, 2), torch.tensor(misclassified), torch.tensor(euclidean), masked)
    return Attacked(attack, result, (), 0.0)


def _checks(ratios=(1.0, 1.0, 1.0), **attacks):
    keys = ("kl_ratio_median", "single_step_ratio_median", "blackbox_ratio_median")
    measured = {key: _number(value) for key, value in zip(keys, ratios, strict=True)}
    return {check.name: check for check in masking(attacks, measured)}


def test_ratios_far_from_one_are_signs_of_masked_gradients():
    assert {check.sign for check in _checks().values()} == {"no sign", "not tested"}
    signs = _checks((0.1, 0.2, 3.0))
    assert [check.sign for check in signs.values() if check.sign != "not tested"] == ["sign"] * 3
    assert _checks((math.nan, 1.0, 1.0))["divergence over ½ λ ε²"].sign == "not tested"


def test_attacks_that_disagree_are_signs_of_masked_gradients():
    led = _attacked(AutoProjectedGradient(2, 0.5), [True, False, False, False], [0.5] * 4)
    free = _attacked(AutoAttack(2, 0.5), [True, True, False, False], [0.5] * 4)
    far = _attacked(MinimalPerturbation(), [True, True, True, True], [0.1, 0.2, 0.3, 2.0])
    checks = _checks(led=led, free=free, far=far)
    assert checks["free where led failed"].sign == "sign"
    assert checks["free where led failed"].value == "1 of 3 images still correct"
    # the third image; the fourth is outside the ball
    assert checks["missed by free"].value == "1 of 2 images still correct"
    assert checks["missed by led"].value == "2 of 3 images still correct"
    assert "a search without gradients" not in checks
    assert checks["zero gradients after led"].sign == "no sign"
    assert checks["zero gradients after far"].sign == "not tested"  # no image is left
    other_ball = _attacked(AutoProjectedGradient(2, 0.25), [True, False, False, False], [0.25] * 4)
    checks = _checks(led=other_ball, free=free)
    assert checks["a search without gradients"].sign == "not tested"
    assert not any(name.startswith("missed") for name in checks)


def test_the_names_of_the_numbers_are_unique():
    known = names(ATTACKS)
    assert len(known) == len(set(known))
    assert {"accuracy", "masked_share", "attacks.minimal.median_distance_of_all"} <= set(known)
