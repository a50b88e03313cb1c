"""Several trainings by Hydra's plugins, and one training in several processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes.summarize import read_runs

ROOT = Path(__file__).parents[2]
TINY = [
    "penalty=none",
    "logger=csv",
    "callbacks=no_monitor",
    "model.layers=[1,0,0,0]",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
]


def _run(*arguments):
    command = [sys.executable, "-m", "recipes.train", *arguments, *TINY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"]),
    ],
)
def test_two_jobs_of_a_launcher_leave_two_runs(tmp_path, plugin, launcher):
    pytest.importorskip(f"hydra_plugins.{plugin}", reason="comes with fisher-reg[sweeps]")
    _run("-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${hydra.job.num}", *launcher)
    found = [json.loads((tmp_path / job / "summary.json").read_text()) for job in "01"]
    assert [summary["seed"] for summary in found] == [0, 1]
    assert all(summary["status"] == "finished" and summary["objective"] == summary["objective"] for summary in found)


@pytest.mark.slow
def test_a_sweep_lies_in_the_folder_that_tensorboard_is_shown_under_short_names(tmp_path):
    command = [
        sys.executable,
        "-m",
        "recipes.train",
        "-m",
        "model=vgg,resnet",
        "seed=0,1",
        *_but("model."),
        "logger=tensorboard",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 600, "check": False}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    runs = {path.parent for path in (tmp_path / "outputs").rglob("events.out.tfevents.*")}
    assert {path.name for path in runs} == {"vgg_seed0", "vgg_seed1", "resnet_seed0", "resnet_seed1"}
    assert {path.parent.parent for path in runs} == {tmp_path / "outputs" / "train"}
    assert len(read_runs(tmp_path / "outputs")) == 4


def _but(start):
    """The settings of a tiny run but for those that begin like this, and for its logger."""
    return [text for text in TINY if not text.startswith((start, "logger="))]


@pytest.mark.slow
def test_optuna_minimises_the_objective(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="comes with fisher-reg[sweeps]")
    sweep = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={tmp_path}"]
    _run("-m", *sweep, "optimizer.lr=tag(log, interval(0.001, 0.1))")
    found = [json.loads(path.read_text())["objective"] for path in tmp_path.glob("*/summary.json")]
    assert len(found) == 2
    assert OmegaConf.load(tmp_path / "optimization_results.yaml").best_value == min(found)
    assert all("+" not in path.name and "limit" not in path.name for path in tmp_path.iterdir())
    assert len(list(tmp_path.glob("lr0.*_[01]"))) == 2


@pytest.mark.slow
def test_two_processes_train_together_and_the_first_one_writes(tmp_path):
    done = _run("trainer.strategy=ddp", "trainer.devices=2", f"hydra.run.dir={tmp_path}")
    assert done.stdout.count("Audit: ") == 1
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
    with (tmp_path / "curves" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/loss"]]) == 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"epoch_000.ckpt", "last.ckpt"}
