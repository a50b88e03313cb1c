"""The comparison as a user starts it, small; killed in each of its stages; and its statistics on made-up rows."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from PIL import Image
from torch.testing import assert_close

from recipes.attacks import ProjectedGradient
from recipes.classifier import Classifier
from recipes.compare import compare, plan, stage_settings
from recipes.compare_analysis import (
    analyse,
    corrected,
    distance_table,
    example_table,
    network_powers,
    roc_area,
    saturation_table,
)
from recipes.compare_report import markdown, metric_table
from recipes.measure import METRICS
from tests import cases

ROOT = Path(__file__).parents[2]
SMALL = [
    "+datasets.digits.num_train=300",
    "+datasets.digits.batch_size=32",
    "~models.DenseNet",
    "~models.ResNet",
    "~trainings.cw",
    "models.VGG.layers=[8,M,16,M]",
    "models.ViT.num_layers=1",
    "trainings.pgd.attack.num_steps=2",
    "trainer.max_epochs=6",
    "seeds=[0]",
    "num_images=20",
    "effort.clever.num_batches=5",
    "effort.clever.batch_size=2",
    "+effort.num_clever=4",
    "+effort.num_blockwise=2",
    "+attacks.minimal.num_steps=10",
    "+attacks.auto_pgd.num_steps=5",
    "num_resamples=20",
]


def _start(folder, *overrides):
    command = [sys.executable, "-m", "recipes.compare", f"hydra.run.dir={folder}/run"]
    command += [f"cache_dir={folder}/cache", *SMALL, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def _finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, _finish(_start(folder))


def _tables(folder):
    names = ("networks.csv", "examples.csv.gz", "per_example.csv", "per_model.csv")
    frames = {name: pd.read_csv(folder / "run" / name) for name in names}
    return {name: frame[[c for c in frame if not c.startswith("seconds")]] for name, frame in frames.items()}


def test_a_run_leaves_its_files_and_its_page(study):
    folder, output = study
    tables = _tables(folder)
    assert len(tables["networks.csv"]) == 2 * 2
    assert len(tables["examples.csv.gz"]) == 2 * 2 * 20
    assert set(METRICS) <= set(tables["networks.csv"])
    assert tables["examples.csv.gz"].groupby("model")["clever"].count().tolist() == [8, 8]
    assert tables["networks.csv"].filter(like="success_").stack().between(0, 1).all()
    saved = json.loads((folder / "run" / "compare.json").read_text())
    assert saved["settings"]["seeds"] == [0]
    assert saved["findings"][0].startswith("4 networks; accuracy on all test images: digits 0.")
    assert "4 networks in" in output
    for name in ("metric_against_attack", "ranking", "white_box_against_black_box", "distance", "power"):
        with Image.open(folder / "run" / f"{name}.png") as image:
            assert image.width > 400
    html = (folder / "run" / "compare.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 5
    assert not re.search(r"<link|<script|https?://", html)
    assert "λ_max at equal margins" in html
    assert "| λ_max of F |" in (folder / "run" / "compare.md").read_text(encoding="utf-8")


def test_a_run_that_is_killed_in_each_stage_ends_with_the_same_numbers(study, tmp_path):
    finished, _ = study
    cache = tmp_path / "cache"
    stages = {
        "training": lambda: list(cache.glob("*.epochs/*.ckpt")),
        "attacks": lambda: _done(cache, "attacks"),
        "metrics": lambda: _done(cache, "metrics"),
    }
    for stage, begun in stages.items():
        process = _start(tmp_path)
        deadline = time.monotonic() + 300
        while not begun():
            assert process.poll() is None, (stage, process.communicate()[0][-3000:])
            assert time.monotonic() < deadline, stage
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if stage == "training":
            assert begun()  # an epoch is kept, and its training was not finished
            assert len(_done(cache, "training")) < 4
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.json")}
    assert len(_done(cache, "metrics")) < 4
    _finish(_start(tmp_path, "num_processes=2"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name, frame in _tables(tmp_path).items():
        pd.testing.assert_frame_equal(frame, _tables(finished)[name], check_exact=True)


def _done(cache, stage):
    return [path for path in cache.glob("*.json") if json.loads(path.read_text())["settings"]["stage"] == stage]


def _config(tmp_path, *overrides):
    overrides = [f"output_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", *SMALL, *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("compare", overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["seeds=[0,0]"], "A seed occurs twice"),
        (["seeds=[]"], "There is nothing to compare"),
        (["num_images=361"], "num_images=361 must be between 1 and the 360 test images of digits"),
        (["noise=1"], r"noise is a share .* got 1"),
        (["~attacks.minimal"], "needs the attack minimal"),
        (["attacks.pgd.norm=3"], "norm must be 2 or infinity; got 3"),
        (["models.ViT.patch_size=5"], "indivisible"),
        (["+models.VGG16={_target_:recipes.models.torchvision_model,name:vgg16}"], "takes RGB images"),
        (["effort.num_clever=-1"], "num_clever must be at least 0; got -1"),
    ],
)
def test_a_comparison_that_would_fail_is_refused_before_any_training(tmp_path, override, message):
    config = _config(tmp_path, *override)
    with pytest.raises((ValueError, InstantiationException), match=message):
        compare(config)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("experiment", ["cpu", "paper"])
def test_the_presets_compose_with_all_their_networks(experiment):
    extra = ["datasets.xrays.path=x.npz"] if experiment == "cpu" else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("compare", ["output_dir=x", f"experiment=compare/{experiment}", *extra])
    runs = plan(config)
    assert {run["training"] for run in runs} == {"standard", "pgd", "cw"}
    assert len(runs) == len(config.datasets) * 4 * 3 * len(config.seeds)
    if experiment == "paper":
        assert {run["network"]["name"] for run in runs} == {"vgg16", "resnet18", "densenet121", "vit_b_16"}
        assert (config.optimizer.lr, config.trainer.max_epochs, config.annealed) == (3e-5, 10, False)
        assert config.trainings.pgd.attack.num_steps == 20
        assert not {"digits"} & set(config.datasets)


def test_no_two_networks_share_a_result():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("compare", ["output_dir=x"])
    for stage in ("training", "attacks", "metrics"):
        keys = [json.dumps(stage_settings(config, stage, run), sort_keys=True) for run in plan(config)]
        assert len(set(keys)) == len(keys) == 1 * 4 * 3 * 2


def test_adversarial_training_sees_each_batch_and_its_attacked_images(tmp_path, digits):
    seen = []
    network = cases.network("vgg", digits)
    network.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().clone()) if module.training else None
    )
    attack = ProjectedGradient(math.inf, 0.05, 2)
    module = Classifier(network, 10, lambda weights: torch.optim.SGD(weights, 0.0), attack)
    images = [(part.clone(), label) for part, label in digits.splits["train"]][:8]
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    ).fit(module, loader)
    assert len(seen) == 2
    for (clean, _), both in zip(loader, seen, strict=True):
        assert_close(both[:4], clean)
        assert 0 < (both[4:] - clean).abs().max() <= 0.05 * 1.001


def _rows(num_networks=4, num_images=60):
    """Images whose distance is known to the metrics called linearised distance and λ at equal margins, but not to λ."""
    generator = np.random.default_rng(0)
    frames = []
    for network in range(num_networks):
        distance = np.exp(generator.normal(size=num_images) - network)
        frame = pd.DataFrame({name: generator.random(num_images) for name in METRICS})
        frame = frame.assign(linearised_distance=distance, lambda_tempered=distance**-2.0, log10_global=3.0)
        frame = frame.assign(fooled_pgd=distance < np.median(distance), fooled_minimal=True, masked_pgd=False)
        frame = frame.assign(distance_minimal=distance, masked_minimal=False, distance_pgd=1.0)
        frame = frame.assign(correct=True, confidence=generator.random(num_images), blackbox_error=0.0)
        names = {"dataset": "d", "model": f"m{network}", "training": "standard", "seed": 0}
        frames.append(frame.assign(**names))
    examples = pd.concat(frames, ignore_index=True)
    networks = examples[["dataset", "model", "training", "seed"]].drop_duplicates().reset_index(drop=True)
    seconds = {f"seconds_{name}": 1.0 for name in METRICS}
    return networks.assign(accuracy=0.5, seconds_training=1.0, **seconds), examples


def test_a_metric_that_knows_the_distance_orders_everything_and_a_random_one_nothing():
    found = analyse(*_rows(), ["pgd", "minimal"], 100)
    examples = found.per_example.set_index(["metric", "target"])
    for metric in ("linearised_distance", "lambda_tempered"):
        assert examples.value[metric, "pgd"] == pytest.approx(1)
        assert examples.value[metric, "distance"] == pytest.approx(1)
    assert abs(examples.value["lambda", "pgd"] - 0.5) < 0.15
    assert "log10_global" not in examples.index.get_level_values(0)  # one number per network orders no image
    models = found.per_model[found.per_model.statistic == "rho"].set_index(["metric", "target"])
    assert models.value["lambda_tempered", "distance"] == pytest.approx(1)
    assert models.p["lambda_tempered", "distance"] == pytest.approx(2 / math.factorial(4))
    distances = found.distances.set_index("predictor")
    assert distances.spread["linearised_distance"] == pytest.approx(0, abs=1e-9)
    assert distances.spread["lambda_tempered"] == pytest.approx(0, abs=1e-9)
    assert distances.c["lambda_tempered"] == pytest.approx(0.5)
    assert distances.spread["lambda"] > 0.5
    said = next(text for text in found.findings if text.startswith("Which networks of a data set (distance"))
    assert "not to be told from chance" in said  # four networks are too few
    assert "| λ_max of F |" in markdown(found)
    assert (
        metric_table(found.per_example, found.per_model, found.networks)["metric"]
        == [metric.title for metric in METRICS.values()]
    ).all()


def test_only_images_that_were_right_are_judged():
    networks, examples = _rows()
    wrong = examples.index % 3 == 0
    examples.loc[wrong, "correct"] = False
    examples.loc[wrong, "linearised_distance"] = 1e6
    examples.loc[wrong, "fooled_pgd"] = True
    found = analyse(networks, examples, ["pgd", "minimal"], 20).per_example.set_index(["metric", "target"])
    assert found.value["linearised_distance", "pgd"] == pytest.approx(1)


def test_an_area_is_undefined_where_all_fall_or_the_score_is_constant():
    assert math.isnan(roc_area(pd.Series([True, True]), pd.Series([1.0, 2.0])))
    assert math.isnan(roc_area(pd.Series([True, False]), pd.Series([1.0, 1.0])))
    assert roc_area(pd.Series([True, False, False]), pd.Series([3.0, 1.0, 2.0])) == 1


def test_intervals_over_cells_keep_the_seeds_of_a_cell_together():
    cells = np.repeat(np.random.default_rng(0).uniform(0.5, 1, 6), 20)  # twenty seeds that say the same
    powers = pd.DataFrame({"dataset": "d", "model": np.repeat(range(6), 20), "training": "t", "seed": [*range(20)] * 6})
    table = example_table(powers.assign(metric="lambda", target="pgd", value=cells), 500)
    row = table.iloc[0]
    assert row.num_networks == 120
    assert row.p == pytest.approx(2 / 2**6)  # six cells above one half, not 120
    error = cells[::20].std() / math.sqrt(6)
    assert 2.5 * error < row.high - row.low < 4.5 * error


def test_p_values_are_corrected_for_all_tests_of_a_table():
    table = corrected(pd.DataFrame({"p": [0.01, 0.04, 0.5]}))
    harmonic = 1 + 1 / 2 + 1 / 3
    assert table.p_corrected.to_numpy() == pytest.approx([0.01 * 3 * harmonic, 0.04 * 3 / 2 * harmonic, 0.5 * harmonic])


def test_confident_images_that_fall_are_counted_by_their_confidence():
    _, examples = _rows()
    examples["confidence"] = np.where(examples.index % 2 == 0, 0.9999, 0.5)
    examples["fooled_pgd"] = examples.confidence > 0.9
    examples["lambda"] = np.where(examples.confidence > 0.9, 1e-8, 1.0)
    table = saturation_table(examples, ["pgd"])
    assert table.confidence.tolist() == ["0 to 0.9", "0.999 to 1"]
    assert table.fooled_pgd.tolist() == [0, 1]
    assert table["lambda"].tolist() == [1, 1e-8]
    assert table.num_examples.sum() == len(examples)


def test_images_that_were_not_reached_have_no_distance():
    _, examples = _rows(num_networks=1)
    examples.loc[:9, "fooled_minimal"] = False
    examples.loc[:9, "distance_minimal"] = 0.0
    assert (distance_table(examples).num_examples == 50).all()
    powers = network_powers(examples, ["pgd"]).set_index(["metric", "target"])
    assert powers.value["linearised_distance", "distance"] == pytest.approx(1)


def test_masked_images_are_said():
    networks, examples = _rows()
    examples.loc[:4, "masked_pgd"] = True
    found = analyse(networks, examples, ["pgd", "minimal"], 20)
    assert any(
        text.startswith("pgd could do nothing to 5 images that survived it, of 1 networks") for text in found.findings
    )
