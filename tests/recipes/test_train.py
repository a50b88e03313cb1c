"""The recipe as a user starts it."""

import csv
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG as SESSION_START_INFO
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.testing import assert_close

from recipes.models.runs import with_run
from recipes.runtime.command import composed
from recipes.train import train

ROOT = Path(__file__).parents[2]


def _run(*arguments):
    command = [sys.executable, "-m", "recipes.train", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def _stopped(folder, stop):
    """Start the run of the fixture, and stop it after its first checkpoint."""
    arguments = ["experiment=smoke", "model=vgg", f"hydra.run.dir={folder}"]
    command = [sys.executable, "-m", "recipes.train", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    process.send_signal(stop)
    errors = process.communicate(timeout=600)[1]
    return process.returncode, errors


def _resumed(folder):
    return train(composed("train", [f"resume={folder}"]))


def _rows(folder):
    with (folder / "curves" / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if name != "fisher/seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = _run("experiment=smoke", "model=vgg", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.fixture(scope="module")
def run(finished):
    folder, done = finished
    return folder, done.stdout


def test_the_run_leaves_what_the_readme_promises(run):
    folder, _ = run
    assert list(folder.glob("events.out.tfevents.*"))
    assert list((folder / "checkpoints").glob("*.ckpt"))
    with Image.open(folder / "bound_versus_empirical.png") as image:
        assert image.width > 500
    with (folder / "curves" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["fisher/lambda_max_mean"]]
    assert len(rows) == 3  # two epochs and the test
    config = OmegaConf.load(folder / "config.yaml")
    assert config.trainer.max_epochs == 2
    assert "${" not in (folder / "config.yaml").read_text()


def test_tensorboard_has_one_row_of_final_numbers_the_configuration_and_few_curves(run):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    assert [path.name for path in folder.rglob("events.out.tfevents.*") if path.parent != folder] == []
    events = EventAccumulator(str(folder)).Reload()
    final = {name: events.Scalars(f"summary/{name}") for name in ("accuracy", "log10_lambda", "log10_bound")}
    assert [len(values) for values in final.values()] == [1, 1, 1]
    assert final["accuracy"][0].value == pytest.approx(summary["test_accuracy"])
    assert final["log10_lambda"][0].value == pytest.approx(math.log10(summary["lambda_max_mean"]))
    assert final["log10_bound"][0].value == pytest.approx(summary["log10_bound"])
    rows = events.summary_metadata[SESSION_START_INFO]
    begun = HParamsPluginData.FromString(rows.plugin_data.content).session_start_info.hparams
    assert {name: value.string_value or value.number_value for name, value in begun.items()} == {
        "model": "vgg",
        "data": "Digits",
        "penalty": "KLPenalty",
        "weight": 0.1,
        "seed": 0.0,
    }
    (text,) = events.Tensors("configuration/text_summary")
    (shown,) = text.tensor_proto.string_val
    assert shown.decode() == f"```yaml\n{(folder / 'config.yaml').read_text()}```"
    fisher = {name for name in events.Tags()["scalars"] if name.startswith("fisher/")}
    assert len(fisher) == 8
    assert {"fisher/lambda_max_mean", "fisher/bound_global", "fisher/penalty_weighted"} < fisher
    assert "fisher/sensitive_examples" in events.Tags()["images"]


def test_a_file_of_output_has_lines_with_the_time_left_and_no_noise_of_other_packages(finished):
    _, done = finished
    shown = done.stdout.splitlines()
    assert shown[0] == "training: 0 of 12"
    assert re.fullmatch(r"training: epoch 1, 1 of 12 after .*, about .* left", shown[1])
    assert any(line.startswith("training: epoch 2, 12 of 12 after") for line in shown)
    assert "\r" not in done.stdout
    for word in ("GPU available", "litlogger", "train_dataloader", "LeafSpec", "torch.jit", "weights_only"):
        assert word not in done.stdout + done.stderr


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
    names = {path.name for path in (run[0] / "checkpoints").iterdir()}
    assert names == {"epoch_001.ckpt", "last.ckpt"}
    checkpoint = torch.load(run[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(key.startswith("network.") for key in checkpoint["state_dict"])


def test_the_curves_of_the_figure_are_kept_as_numbers(run):
    rows = pd.read_csv(run[0] / "bound_versus_empirical.csv")
    assert rows.epoch.tolist() == [0, 1]
    assert (rows["fisher/log10_bound_global"] > rows["fisher/log10_lambda_max_max"]).all()


def test_a_killed_run_is_resumed_to_the_same_bits(run, tmp_path):
    whole, folder = run[0], tmp_path / "killed"
    assert _stopped(folder, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    moved = folder.rename(tmp_path / "moved")
    summary = _resumed(moved)
    first, second = (json.loads((path / "summary.json").read_text()) for path in (whole, moved))
    measured = [name for name in first if "seconds" not in name and name != "provenance"]
    assert [first[name] for name in measured] == [second[name] for name in measured]
    assert summary == second
    assert _rows(whole) == _rows(moved)
    one, other = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (whole, moved))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_close(one[part], other[part], rtol=0, atol=0)
    assert not list((moved / "checkpoints").glob("next*"))
    assert not list((moved / "curves").glob("*.kept"))


def test_ctrl_c_leaves_a_summary_and_says_how_to_go_on(tmp_path):
    status, errors = _stopped(tmp_path / "run", signal.SIGINT)
    assert status == 130
    assert f"python -m recipes.train resume={tmp_path}/run" in errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted after epoch 1"
    assert summary["seed"] == 0


def test_a_finished_run_is_not_trained_again(run, capsys):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    assert _resumed(folder) == summary
    output = capsys.readouterr().out
    assert "This training is already finished" in output
    assert f"{summary['log10_gap']:.2f}" in output


def test_a_folder_without_a_run_or_with_another_one_is_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no training.*Pass the folder"):
        _resumed(tmp_path)
    with pytest.raises(ValueError, match=r"already has a training.*resume="):
        train(composed("train", [f"output_dir={run[0]}"]))


def test_a_resumed_run_keeps_its_settings_and_an_audited_one_its_network(run, monkeypatch):
    monkeypatch.setattr("recipes.train.overrides", lambda: ["resume=x", "seed=3"])
    with pytest.raises(ValueError, match=r"original settings.*leave out seed=3, or"):
        _resumed(run[0])
    monkeypatch.setattr("recipes.models.runs.overrides", lambda: ["run=x", "model=vit", "num_images=3"])
    with pytest.raises(ValueError, match=r"takes data and network from its own config.yaml; leave out model=vit, or"):
        with_run(composed("evaluate", [f"run={run[0]}"]))


def test_a_job_that_slurm_has_requeued_goes_on(run, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begun = []
    monkeypatch.setattr("recipes.train._train", lambda config, folder, stopped: begun.append(stopped.epoch))
    train(composed("train", [f"output_dir={run[0]}"]))
    assert begun == [1]


def test_the_audit_of_a_run_takes_its_data_network_and_last_checkpoint(run):
    folder, output = run
    assert f"python -m recipes.evaluate run={folder}" in output
    config = with_run(composed("evaluate", [f"run={folder}", "num_images=7"]))
    assert config.model._target_ == "recipes.models.vgg"
    assert config.checkpoint == str(folder / "checkpoints" / "last.ckpt")
    assert config.num_images == 7
    alone = with_run(composed("evaluate", [f"checkpoint={folder}/checkpoints/epoch_001.ckpt"]))
    assert alone.model == config.model
    assert alone.checkpoint.endswith("epoch_001.ckpt")
    with pytest.raises(FileNotFoundError, match=r"has no training.*no config.yaml"):
        with_run(composed("evaluate", [f"run={folder}/checkpoints"]))


def test_the_summary_says_how_it_was_made(run):
    provenance = json.loads((run[0] / "summary.json").read_text())["provenance"]
    assert provenance["command"] == f"python -m recipes.train experiment=smoke model=vgg hydra.run.dir={run[0].name}"
    assert provenance["seed"] == 0
    assert len(provenance["commit"]) > 10
    assert provenance["environment"]["torch"] == torch.__version__.split("+")[0]


def test_an_unknown_choice_is_answered_with_those_that_there_are():
    done = _run("model=lenet")
    assert done.returncode == 1
    assert done.stderr.startswith("There is no model=lenet. Choose one of densenet, ")
    assert len(done.stderr.splitlines()) == 1


def test_missing_data_is_told_before_any_work(tmp_path):
    done = _run("data=npz", "data.path=nowhere.npz", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("There is no file")
    assert "data.path" in line
    assert not (tmp_path / "config.yaml").exists()
