"""A training that is killed and resumed ends with the numbers of one that is left alone."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each life of the training is a fork"),
]
# At 2 there is no checkpoint yet. None is resumed from 12 or 24, where a checkpoint lies just before a validation
# within the epoch, which Lightning skips when it resumes.
KILLED_AT = (2, 8, 17, 22)
WHOLE_EPOCH = 31  # last step of the one epoch that begins in the last life


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    script = [sys.executable, "-m", "tests.callbacks.killed", str(folder), *map(str, KILLED_AT)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [_end(folder / name) for name in ("whole", "killed")]


def _end(folder):
    lines = [json.loads(line) for line in (folder / "logged.jsonl").read_text().splitlines()]
    logged = {
        (line["step"], key): value for line in lines for key, value in line.items()
    }  # of a step the last life counts
    return torch.load(folder / "end.pt", weights_only=True) | {"logged": logged}


def _timeless(entry):
    return {key: value for key, value in entry.items() if "seconds" not in str(key)}


def _is_mean_of_an_epoch(key):
    return "penalty" in key or "lambda_control" in key


def test_the_weights_and_the_adapted_weight_of_the_penalty_are_those_of_a_training_left_alone(ends):
    whole, killed = ends
    assert_close(killed["weights"], whole["weights"], rtol=0, atol=0)
    assert killed["weight"] == whole["weight"] != 0.1


@pytest.mark.parametrize(
    ("prefix", "steps"),
    [
        ("fisher", [4, 8, 12, 16, 20, 24, 28, 32]),
        ("every_second", [4, 20]),
        ("steps", [4, 9, 14, 19, 24, 29]),
        ("given", [1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31]),
    ],
)
def test_the_history_is_that_of_a_training_left_alone(ends, prefix, steps):
    whole, killed = ([_timeless(entry) for entry in end["history"][prefix]] for end in ends)
    assert [entry["step"] for entry in whole] == steps
    assert killed == whole


def test_the_logged_measurements_are_those_of_a_training_left_alone(ends):
    whole, killed = (
        {place: value for place, value in _timeless(end["logged"]).items() if not _is_mean_of_an_epoch(place[1])}
        for end in ends
    )
    assert killed == whole
    assert {key.split("/")[0] for _, key in whole} >= {"fisher", "every_second", "steps", "given", "val_loss"}


def test_an_epoch_that_was_not_interrupted_has_the_logged_penalties_of_a_training_left_alone(ends):
    # Lightning keeps no mean of an epoch in a checkpoint; the ratio is measured anew after a resume
    whole, killed = (
        {
            key: value
            for (step, key), value in end["logged"].items()
            if step == WHOLE_EPOCH and _is_mean_of_an_epoch(key) and "ratio" not in key
        }
        for end in ends
    )
    assert killed == whole
    assert {"fisher/penalty", "fisher/penalty_2", "fisher/lambda_control", "fisher/penalty_weight_2"} <= set(whole)
