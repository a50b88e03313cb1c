"""The comparison, small; killed in each of its stages; and its statistics on made-up rows."""

import ast
import json
import math
import multiprocessing
import re
import shutil
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

from recipes.attacks import ProjectedGradient
from recipes.compare.analysis import (
    analyse,
    confident_table,
    corrected,
    saturation_table,
)
from recipes.compare.findings import findings
from recipes.compare.powers import areas, example_table, rank_correlations
from recipes.compare.report import markdown, metric_table
from recipes.compare.stages import STAGES
from recipes.compare.study import compare, plan, stage_settings
from recipes.compare.training import train, weights_path
from recipes.competitors.measurement import METRICS
from recipes.data.chosen import chosen_examples
from recipes.models.classifier import Classifier
from recipes.redraw import redraw
from recipes.runtime.cache import stamped
from tests import cases

ROOT = Path(__file__).parents[2]
SMALL = [
    "+datasets.digits.num_train=128",
    "+datasets.digits.batch_size=32",
    "+datasets.digits.num_workers=0",
    "+datasets.digits.train_transform._target_=torchvision.transforms.RandomHorizontalFlip",
    "~models.DenseNet",
    "~models.ResNet",
    "~trainings.cw",
    "models.VGG.layers=[8,M,16,M]",
    "models.ViT.num_layers=1",
    "trainings.pgd.attack.num_steps=2",
    "trainer.max_epochs=3",
    "seeds=[0]",
    "num_images=10",
    "effort.clever.num_batches=5",
    "effort.clever.batch_size=2",
    "+effort.num_clever=4",
    "+effort.num_blockwise=2",
    "+attacks.minimal.num_steps=10",
    "+attacks.auto_pgd.num_steps=5",
    "num_resamples=20",
]


# A process that has imported the recipe and done nothing else: those that are killed begin as copies of it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["recipes.compare.study"])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with redirect_stdout(StringIO()) as output:
        compare(_config(folder))
    return folder, output.getvalue()


def _tables(folder):
    names = ("networks.csv", "examples.csv.gz", "per_example.csv", "per_model.csv")
    frames = {name: pd.read_csv(folder / "run" / name) for name in names}
    return {name: frame[[c for c in frame if not c.startswith("seconds")]] for name, frame in frames.items()}


def test_a_run_leaves_its_files_and_its_page(study):
    folder, output = study
    tables = _tables(folder)
    assert len(tables["networks.csv"]) == 2 * 2
    assert len(tables["examples.csv.gz"]) == 2 * 2 * 10
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


def test_the_files_are_made_anew_from_the_rows_of_networks_and_examples(study, tmp_path):
    kept, anew = study[0] / "run", tmp_path / "compare"
    anew.mkdir()
    for name in ("networks.csv", "examples.csv.gz", "compare.json"):
        shutil.copy(kept / name, anew)
    assert "compare" not in redraw(tmp_path)
    for name in ("per_example.csv", "per_model.csv", "networks.csv"):  # from rows that are kept with six digits
        pd.testing.assert_frame_equal(*(pd.read_csv(path / name) for path in (anew, kept)), rtol=1e-5)
    new, old = (json.loads((path / "compare.json").read_text()) for path in (anew, kept))
    assert {name: new[name] for name in ("settings", "provenance")} == {
        name: old[name] for name in ("settings", "provenance")
    }
    assert len(new["findings"]) == len(old["findings"])
    pages = [(path / "compare.md").read_text(encoding="utf-8").splitlines() for path in (anew, kept)]
    assert [line[:12] for line in pages[0]] == [line[:12] for line in pages[1]]
    assert {path.name for path in anew.iterdir()} == {path.name for path in kept.iterdir()}


def test_what_is_measured_and_attacked_is_the_trained_network(study):
    folder, _ = study
    examples = pd.read_csv(folder / "run" / "examples.csv.gz")
    config = _config(folder)
    data = instantiate(config.datasets.digits)
    data.setup()
    images, labels = chosen_examples(data, 10, torch.Generator().manual_seed(0), config.noise)
    for run in plan(config):
        network = instantiate(run["network"], spec=data.spec)
        network.load_state_dict(torch.load(weights_path(stamped(run, train), folder / "cache"), weights_only=True))
        own = examples[(examples.model == run["model"]) & (examples.training == run["training"])]
        with torch.no_grad():
            logits = network.eval()(images)
        assert own.correct.tolist() == (logits.argmax(1) == labels).tolist()
        gaps = logits.topk(2, dim=1).values.double()
        np.testing.assert_allclose(own.margin, gaps[:, 0] - gaps[:, 1], rtol=1e-3, atol=1e-4)


def test_a_run_that_is_killed_in_each_stage_ends_with_the_same_numbers(study, tmp_path):
    finished, _ = study
    cache = tmp_path / "cache"
    stages = {
        "training": lambda: list(cache.glob("*.epochs/*.ckpt")),
        "attacks": lambda: _done(cache, "attacks"),
        "metrics": lambda: _done(cache, "metrics"),
    }
    for stage, begun in stages.items():
        process = SERVER.Process(target=compare, args=(_config(tmp_path),))
        process.start()
        deadline = time.monotonic() + 300
        while not begun():
            assert process.is_alive(), stage
            assert time.monotonic() < deadline, stage
            time.sleep(0.005)
        process.kill()
        process.join()
        if stage == "training":
            assert begun()  # an epoch is kept, and its training was not finished
            assert len(_done(cache, "training")) < 4
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("output.pkl")}
    assert len(_done(cache, "metrics")) < 4
    compare(_config(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name, frame in _tables(tmp_path).items():
        pd.testing.assert_frame_equal(frame, _tables(finished)[name], check_exact=True)


def _done(cache, stage):
    work = f"{STAGES[stage].__module__}.{STAGES[stage].__name__}"
    return [path for path in cache.rglob("metadata.json") if f'"work": "{work}"' in _key(path)]


def _key(path):
    return ast.literal_eval(json.loads(path.read_text())["input_args"]["key"])


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
        (["noise=1"], "noise is a share .* got 1"),
        (["~attacks.minimal"], "needs the distances of the attack minimal"),
        (["attacks.pgd.norm=3"], "norm must be 2 or infinity; got 3"),
        (["models.ViT.patch_size=5"], "indivisible"),
        (["+models.VGG16={_target_:recipes.models.torchvision_model,name:vgg16}"], "takes RGB images"),
        (["effort.num_clever=0"], "num_clever must be at least 1; got 0"),
        (["~models.ViT", "~trainings.pgd"], "A rank correlation needs at least 3 pairs of model and training"),
        (["num_resamples=0"], "num_resamples must be at least 1; got 0"),
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


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("optimizer.lr=1", {"training", "attacks", "metrics"}),
        ("trainings.pgd.attack.epsilon=0.5", {"training", "attacks", "metrics"}),
        ("datasets.digits.batch_size=16", {"training", "attacks", "metrics"}),
        ("attacks.pgd.epsilon=0.5", {"attacks"}),
        ("effort.num_clever=5", {"metrics"}),
        ("noise=0.1", {"attacks", "metrics"}),
        ("num_images=9", {"attacks", "metrics"}),
        ("num_processes=2", set()),
        ("num_resamples=30", set()),
    ],
)
def test_a_setting_does_anew_the_stages_that_depend_on_it_and_no_others(tmp_path, override, changed):
    digests = []
    for config in (_config(tmp_path), _config(tmp_path, override)):
        run = next(run for run in plan(config) if run["training"] == "pgd")
        digests.append({stage: stage_settings(config, stage, stamped(run, train)) for stage in STAGES})
    assert {stage for stage in STAGES if digests[0][stage] != digests[1][stage]} == changed


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


def _rows(num_networks=4, num_images=60, num_datasets=1):
    """Images whose distance is known to the metrics called linearised distance and λ at equal margins, but not to λ."""
    generator = np.random.default_rng(0)
    frames = []
    for dataset in range(num_datasets):
        for network in range(num_networks):
            distance = np.exp(generator.normal(size=num_images) - network)
            frame = pd.DataFrame({name: generator.random(num_images) for name in METRICS})
            frame = frame.assign(linearised_distance=distance, lambda_tempered=distance**-2.0, log10_global=3.0)
            frame = frame.assign(
                misclassified_pgd=distance < np.median(distance), misclassified_minimal=True, masked_pgd=False
            )
            frame = frame.assign(distance_minimal=distance, masked_minimal=False, distance_pgd=1.0)
            frame = frame.assign(correct=True, confidence=generator.uniform(0.1, 0.9, num_images), blackbox_error=0.0)
            names = {"dataset": f"d{dataset}", "model": f"m{network}", "training": "standard", "seed": 0}
            frames.append(frame.assign(**names))
    examples = pd.concat(frames, ignore_index=True)
    networks = examples[["dataset", "model", "training", "seed"]].drop_duplicates().reset_index(drop=True)
    seconds = {f"seconds_{name}": 1.0 for name in METRICS}
    return networks.assign(accuracy=0.5, seconds_training=1.0, **seconds), examples


ATTACKS = ["pgd", "minimal"]


def test_a_metric_that_knows_the_distance_orders_everything_and_a_random_one_nothing():
    found = analyse(*_rows(), ATTACKS, 200)
    examples = found.per_example.set_index(["metric", "target"])
    for metric in ("linearised_distance", "lambda_tempered"):
        for target in ("pgd", "distance"):
            assert examples.value[metric, target] == pytest.approx(1)
            assert examples.p[metric, target] == pytest.approx(2 / 201)
    assert abs(examples.value["lambda", "pgd"] - 0.5) < 0.15
    assert examples.p["lambda", "pgd"] > 0.05
    assert "log10_global" not in examples.index.get_level_values(0)  # one number per network orders no image
    models = found.per_model[(found.per_model.statistic == "rho") & (found.per_model.scope == "all")]
    models = models.set_index(["metric", "target"])
    assert models.value["lambda_tempered", "distance"] == pytest.approx(1)
    assert models.p["lambda_tempered", "distance"] == pytest.approx(2 / math.factorial(4))
    distances = found.distances.set_index("predictor")
    assert distances.spread["linearised_distance"] == pytest.approx(0, abs=1e-9)
    assert distances.spread["lambda_tempered"] == pytest.approx(0, abs=1e-9)
    assert distances.c["lambda_tempered"] == pytest.approx(0.5)
    assert distances.spread["lambda"] > 0.5
    texts = findings(found)
    said = next(
        text for text in texts if text.startswith("Prediction of the least robust networks of a data set (nearness")
    )
    assert "not significant" in said  # four networks are too few
    assert "| λ_max of F |" in markdown(found, texts)
    assert (metric_table(found.per_example, found.per_model, found.networks)["metric"] == TITLES).all()


TITLES = [metric.title for metric in METRICS.values()]


def test_only_images_that_were_right_are_judged():
    networks, examples = _rows()
    wrong = examples.index % 3 == 0
    examples.loc[wrong, "correct"] = False
    examples.loc[wrong, "linearised_distance"] = 1e6
    examples.loc[wrong, "misclassified_pgd"] = True
    found = analyse(networks, examples, ATTACKS, 20)
    assert found.per_example.set_index(["metric", "target"]).value["linearised_distance", "pgd"] == pytest.approx(1)
    assert found.networks.linearised_distance.max() < 1e6


def test_an_image_without_an_adversarial_example_is_the_farthest_and_not_the_nearest():
    networks, examples = _rows()
    hard = (examples.model == "m0") & (examples.groupby("model").cumcount() < 40)
    examples.loc[hard, "misclassified_minimal"] = False
    examples.loc[hard, "distance_minimal"] = 0.0
    examples.loc[hard, "lambda_tempered"] = 1e-9
    found = analyse(networks, examples, ATTACKS, 20)
    assert found.networks.set_index("model").distance["m0"] == math.inf
    models = found.per_model[(found.per_model.scope == "all") & (found.per_model.statistic == "rho")]
    assert models.set_index(["metric", "target"]).value["lambda_tempered", "distance"] == pytest.approx(1)
    assert found.per_example.set_index(["metric", "target"]).value["lambda_tempered", "distance"] == pytest.approx(1)
    assert any("No adversarial example was found for 40 images" in text for text in findings(found))
    assert found.distances.num_left_out.tolist() == [40] * 3


def test_areas_and_correlations_of_drawn_images_are_those_of_the_libraries():
    generator = np.random.default_rng(0)
    score, nearness = generator.integers(8, size=(2, 40)).astype(float)
    misclassified, known = generator.random((2, 40)) < 0.6
    draws = generator.integers(40, size=(5, 40))
    score[3] = math.inf
    for draw, area, link in zip(
        draws, areas(score, misclassified, known, draws), rank_correlations(score, nearness, known, draws), strict=True
    ):
        chosen = draw[known[draw]]
        ranks = rankdata(score[chosen])
        assert area == pytest.approx(roc_auc_score(misclassified[chosen], ranks))
        assert link == pytest.approx(spearmanr(ranks, nearness[chosen]).statistic)


def test_an_area_is_undefined_where_all_fall_or_the_score_is_constant():
    everything, whole = np.arange(3)[None], np.ones(3, dtype=bool)
    assert np.isnan(areas(np.arange(3.0), whole, whole, everything)).all()
    assert np.isnan(areas(np.ones(3), np.array([True, False, False]), whole, everything)).all()
    assert areas(np.array([3.0, 1.0, 2.0]), np.array([True, False, False]), whole, everything).tolist() == [1]
    assert np.isnan(rank_correlations(np.ones(3), np.arange(3.0), whole, everything)).all()


def test_networks_where_an_attack_fells_everything_are_counted_and_said():
    networks, examples = _rows()
    examples.loc[examples.model == "m1", "misclassified_pgd"] = True
    found = analyse(networks, examples, ATTACKS, 20)
    row = found.per_example.set_index(["metric", "target"]).loc[("lambda", "pgd")]
    assert (row.num_networks, row.num_all) == (3, 4)
    cells = metric_table(found.per_example, found.per_model, found.networks).set_index("metric")
    assert cells.loc["λ_max of F", "images: pgd, auc"].endswith("(3 of 4)")


def _null(seed, num_models=12, num_images=50):
    """Networks of one data set whose falls and whose metric follow the images, but not each other."""
    generator = np.random.default_rng(seed)
    hard, metric = generator.normal(size=(2, num_images))
    frames = []
    for model in range(num_models):
        frame = pd.DataFrame({name: 1.0 for name in METRICS}, index=range(num_images))
        frame["lambda"] = metric + 0.3 * generator.normal(size=num_images)
        frame["misclassified_pgd"] = hard + 0.3 * generator.normal(size=num_images) > 0
        frames.append(frame.assign(correct=True, distance=1.0, dataset="d", model=model, training="t", seed=0))
    return pd.concat(frames, ignore_index=True)


def test_images_that_all_networks_share_are_not_taken_for_evidence():
    tables = [example_table(_null(seed), ["pgd"], 100).set_index("metric") for seed in range(40)]
    assert sum(table.p["lambda"] <= 0.05 for table in tables) <= 6  # 2 expected; cells taken for independent: 15
    assert sum(table.low["lambda"] <= 0.5 <= table.high["lambda"] for table in tables) >= 34


def test_p_values_are_corrected_for_all_tests_of_a_table():
    table = corrected(pd.DataFrame({"p": [0.01, 0.04, 0.5, math.nan]}))
    harmonic = 1 + 1 / 2 + 1 / 3
    expected = [0.01 * 3 * harmonic, 0.04 * 3 / 2 * harmonic, 0.5 * harmonic]
    assert table.p_corrected.to_numpy()[:3] == pytest.approx(expected)
    assert math.isnan(table.p_corrected[3])


def test_what_is_missing_or_infinite_for_one_network_stops_nothing():
    networks, examples = _rows(num_datasets=2)
    first = (examples.dataset == "d0") & (examples.model == "m0")
    examples.loc[first, "log10_local"] = math.nan
    examples.loc[examples.index[first][0], "linearised_distance"] = math.inf
    examples.loc[(examples.dataset == "d1") & (examples.model == "m1"), "correct"] = False
    found = analyse(networks, examples, ATTACKS, 20)
    models = found.per_model[(found.per_model.scope == "all") & (found.per_model.statistic == "rho")]
    counts = models.set_index(["metric", "target"]).num_networks
    assert counts["lambda", "distance"] == 4  # of the data set where every network has an image
    assert ("log10_local", "distance") not in counts.index
    assert found.distances.num_left_out.iloc[0] == 1
    assert findings(found)


def test_confident_images_are_compared_with_others_of_the_same_network():
    _, examples = _rows()
    confident = examples.groupby("model").cumcount() < 20
    examples["confidence"] = np.where(confident, 0.9999, 0.5)
    examples["distance"] = np.where(confident, 2.0, 1.0)
    examples["lambda"] = np.where(confident, 1e-4, 1.0)
    table = confident_table(examples, ["pgd"])
    assert len(table) == 4
    assert (table.confident_num == 20).all()
    assert (table.other_num == 40).all()
    assert (table["confident_lambda"] == 1e-4).all()
    assert (table.confident_distance == 2).all()
    assert confident_table(examples.assign(confidence=0.5), ["pgd"]).empty
    bins = saturation_table(examples, ["pgd"])
    assert bins.confidence.tolist() == ["0 to 0.9", "0.999 to 1"]
    assert bins.num_examples.tolist() == [160, 80]
    networks, _ = _rows()
    said = [text for text in findings(analyse(networks, examples, ATTACKS, 5)) if text.startswith("Saturation")]
    assert "By λ, the adversarial examples of the confident images should be 1e+02 times as far away" in said[0]


def test_masked_images_are_said():
    networks, examples = _rows()
    examples.loc[:4, "masked_pgd"] = True
    texts = findings(analyse(networks, examples, ATTACKS, 20))
    assert any(text.startswith("pgd could not attack 5 images of 1 networks") for text in texts)


def test_networks_that_know_nothing_are_said_to_order_nothing():
    networks, examples = _rows()
    with pytest.raises(ValueError, match=r"Nothing can be ordered.*finished work is cached"):
        analyse(networks, examples.assign(correct=False), ATTACKS, 5)
