"""The recipe as a user starts it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

ROOT = Path(__file__).parents[2]


def _run(*arguments):
    command = [sys.executable, "-m", "recipes.train", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = _run("experiment=smoke", "model=vgg", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_the_run_leaves_what_the_readme_promises(run):
    folder, _ = run
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert list((folder / "checkpoints").glob("*.ckpt"))
    with Image.open(folder / "bound_versus_empirical.png") as image:
        assert image.width > 500
    with (folder / "curves" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["fisher/lambda_max_mean"]]
    assert len(rows) == 3  # two epochs and the test
    config = OmegaConf.load(folder / "config.yaml")
    assert config.trainer.max_epochs == 2
    assert "${" not in (folder / "config.yaml").read_text()


def test_the_table_shows_the_summary(run):
    folder, output = run
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{summary['test_accuracy']:.4f}" in output
    assert f"{summary['lambda_max_mean']:.4g}" in output
    assert f"10^{summary['log10_bound']:.2f}" in output
    assert f"{summary['log10_gap']:.2f}" in output
    assert summary["log10_gap"] > 0
    assert 0 < summary["lambda_max_median"] <= summary["lambda_max_p95"] <= summary["lambda_max_max"]
    assert summary["lambda_max_max"] < 10 ** summary["log10_bound"]


def test_the_checkpoint_is_a_plain_one(run):
    (path,) = (run[0] / "checkpoints").glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert all(key.startswith("network.") for key in checkpoint["state_dict"])


def test_an_unknown_value_shows_hydras_own_message():
    done = _run("model=lenet")
    assert done.returncode != 0
    assert "Could not find 'model/lenet'" in done.stderr
    assert "resnet" in done.stderr


def test_missing_data_is_told_before_any_work(tmp_path):
    done = _run("data=npz", "data.path=nowhere.npz", f"hydra.run.dir={tmp_path}")
    assert done.returncode != 0
    assert "There is no file" in done.stderr
    assert "data.path" in done.stderr
