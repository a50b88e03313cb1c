"""The audit as a user starts it, and what its sentences claim."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close

from recipes.evaluate.audit import correlation, ranking, share
from recipes.evaluate.reading import verdict
from recipes.evaluate.study import evaluate
from recipes.reporting.records import plain, without_folders
from recipes.runtime.command import composed

ROOT = Path(__file__).parents[2]
SMALL = [
    "device=cpu",
    "num_images=9",
    "num_shown=2",
    "num_eigenvalues=3",
    "effort.num_clever=1",
    "effort.num_blockwise=2",
    "effort.clever.num_batches=3",
    "effort.clever.batch_size=4",
    "attacks.pgd.num_steps=3",
    "attacks.minimal.num_steps=5",
    "attacks.auto_attack.num_steps=2",
    "attacks.auto_attack.num_queries=3",
]
TAGS = {"audit/accuracy", "fisher/lambda_max_mean", "fisher/lambda_max_p95", "fisher/log10_bound_global"}


class Brightness(nn.Module):
    """Tells bright images from dark ones, and from nothing in between, with logits of a given size."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, images):
        level = self.scale * (images.flatten(1).mean(1) - 0.5)
        return torch.stack([-level, level, level - self.scale], 1)


def _npz(path, num_channels=3, size=8):
    """Write dark, bright and white images of three classes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("test", 12)):
        labels = np.arange(count) % 3
        level = np.array([0, 0.5, 0.8])[labels][:, None, None, None]
        arrays[f"x_{split}"] = (level + 0.2 * rng.random((count, size, size, num_channels))).astype(np.float32)
        arrays[f"y_{split}"] = labels
    np.savez(path, **arrays)
    return arrays


def _run(folder, *arguments):
    command = [sys.executable, "-m", "recipes.evaluate", *SMALL, f"hydra.run.dir={folder}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def _audit(folder, *arguments):
    return evaluate(composed("evaluate", [*SMALL, f"output_dir={folder}", *arguments]))


def _check_files(folder, attacks=("pgd", "auto_attack", "carlini_wagner", "minimal")):
    """Check that page, record and events are whole, and return the record and the page."""
    page = (folder / "audit.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<link|<script|src=\"(?!data:)|url\(", page)
    assert page.count('src="data:image/png;base64,') == 4
    text = (folder / "audit.json").read_text(encoding="utf-8")
    assert str(folder) not in text
    assert str(ROOT) not in text
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(record["attacks"]) == set(attacks)
    assert all(len(record["images"][name]) == 9 for name in ("lambda", "label", "effective_rank", "lambda_blackbox"))
    widths = [math.inf if width == "inf" else width for width in record["images"]["interval_width"]]
    num_wide = sum(width > 0.05 for width in widths)
    assert record["wide_interval_share"] == pytest.approx(num_wide / 9)
    assert re.search(
        rf"intervals of λ wider than 5%, at a failure probability of 2%.*?{num_wide} of 9", page, re.DOTALL
    )
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0, "tensors": 0}).Reload().Tags()
    assert TAGS - {"fisher/log10_bound_global"} <= set(events["scalars"])
    assert {f"attack/{name}/accuracy" for name in attacks} <= set(events["scalars"])
    assert {"audit/most_sensitive", "audit/distribution", "audit/bounds", "audit/black_box"} == set(events["images"])
    assert "fisher/log10_lambda_max" in events["histograms"] or record["num_lambda_zero"] == 9
    assert "audit/reading/text_summary" in events["tensors"]
    return record, page


def test_a_checkpoint_of_the_training_recipe_is_audited_as_a_user_starts_it(tmp_path):
    train = ["-m", "recipes.train", "experiment=smoke", "trainer.max_epochs=1", "penalty=none", "logger=none"]
    train += ["callbacks=no_monitor", "model.layers=[1,0,0,0]", f"hydra.run.dir={tmp_path / 'a training'}"]
    done = subprocess.run([sys.executable, *train], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    command = shlex.split(re.search(r"Audit: python (.*)", done.stdout)[1])
    command += [*SMALL, f"hydra.run.dir={tmp_path / 'audit'}"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record, page = _check_files(tmp_path / "audit")
    assert "Audit of recipes.models.resnet with last.ckpt" in page
    assert "Traceback" not in done.stderr
    assert record["settings"]["checkpoint"] == "last.ckpt"
    images = record["images"]
    assert record["accuracy"]["value"] == np.mean(images["correct"])
    order = np.argsort(images["lambda"])[::-1]
    assert record["most_sensitive"]["index"] == order[:2].tolist()
    for index, pairs in zip(order, record["most_sensitive"]["eigenvalues"], strict=False):
        assert_close(pairs[0], images["lambda"][index], rtol=1e-2, atol=1e-6)
        assert sum(pairs) <= images["trace"][index] * 1.001
        assert_close(
            images["effective_rank"][index], images["trace"][index] / images["lambda"][index], rtol=1e-2, atol=0
        )
    assert max(images["lambda"]) < 10 ** images["log10_global"][0]
    for text in (*record["reading"], f"{record['accuracy']['value']:.1%}"):
        assert text.split("'")[0] in page.replace("&#39;", "'").replace("&amp;", "&")
    assert f"{record['accuracy']['value']:.1%}" in done.stdout


@pytest.mark.parametrize(
    "factory",
    [
        ("~model", "model._target_=torchvision.models.resnet18", "model.num_classes=3"),
        (
            "~model",
            "model._target_=timm.create_model",
            "model.model_name=vit_tiny_patch16_224",
            "model.img_size=32",
            "model.num_classes=3",
        ),
    ],
    ids=["torchvision", "timm"],
)
def test_a_network_that_this_project_did_not_train_runs_untouched(tmp_path, factory):
    if "timm" in factory[1]:
        pytest.importorskip("timm")
    _npz(tmp_path / "rgb.npz", size=32)
    normalize = "normalize={mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"
    done = _run(tmp_path / "audit", "data=npz", f"data.path={tmp_path / 'rgb.npz'}", normalize, *factory)
    assert done.returncode == 0, done.stderr[-3000:]
    record, page = _check_files(tmp_path / "audit")
    assert "with the weights of its factory" in page
    assert record["settings"]["data"]["path"] == "rgb.npz"
    for name, reason in record["images"]["missing"].items():
        assert reason in " ".join(record["reading"]), name


def test_a_lightning_module_is_its_own_network(tmp_path):
    _npz(tmp_path / "grey.npz", num_channels=1)
    factory = ["~model", "model._target_=tests.recipes.test_checkpoints.Module"]
    record = _audit(tmp_path / "audit", "data=npz", f"data.path={tmp_path / 'grey.npz'}", "noise=0.1", *factory)
    _check_files(tmp_path / "audit")
    assert record["settings"]["noise"] == 0.1


def test_masked_gradients_are_warned_of_on_the_page_and_in_the_record(tmp_path):
    _npz(tmp_path / "grey.npz", num_channels=1)
    factory = ["~model", f"model._target_={__name__}.Brightness"]
    data = ["data=npz", f"data.path={tmp_path / 'grey.npz'}"]
    with pytest.warns(UserWarning, match="ProjectedGradient had no effect on 6 of the 6 images"):
        _audit(tmp_path / "masked", *data, *factory, "model.scale=1e6")
    record, page = _check_files(tmp_path / "masked")
    assert record["attacks"]["pgd"]["num_masked"] == 6
    assert "ProjectedGradient had no effect on" in record["attacks"]["pgd"]["warnings"][0]
    assert "ProjectedGradient had no effect on" in page
    assert "Masked gradients: 6 images survived pgd because the gradient is exactly zero" in page
    assert "λ is exactly zero at 9 of 9 images" in page
    assert record["num_saturated"] == 9

    record = _audit(tmp_path / "open", *data, *factory, "model.scale=4")
    assert [found["num_masked"] for found in record["attacks"].values()] == [0, 0, 0, 0]
    assert not any(found["warnings"] for found in record["attacks"].values())
    assert not any("exactly zero" in text for text in record["reading"])


def test_bad_input_is_refused_before_any_work(tmp_path, monkeypatch):
    arrays = _npz(tmp_path / "grey.npz", num_channels=1)
    data = ["data=npz", f"data.path={tmp_path / 'grey.npz'}"]
    monkeypatch.setattr("recipes.evaluate.study.measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="K=10 outputs, the data 3 classes"):
        _audit(tmp_path, *data, "~model", "model._target_=tests.recipes.test_evaluate.Ten")
    with pytest.raises(ValueError, match=r"num_shown=2 <= num_images=13 <= 12 \(the test images"):
        _audit(tmp_path, *data, "num_images=13")
    with pytest.raises(ValueError, match="noise is a share"):
        _audit(tmp_path, *data, "noise=1.5")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is of another network: .* 'normalize.mean': missing"):
        _audit(tmp_path, *data, f"checkpoint={tmp_path / 'other.pt'}")
    np.savez(
        tmp_path / "wide.npz", **{name: 255 * array if name[0] == "x" else array for name, array in arrays.items()}
    )
    with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
        _audit(tmp_path, "data=npz", f"data.path={tmp_path / 'wide.npz'}")
    kept = arrays["y_test"] != 1
    lacking = arrays | {"x_test": arrays["x_test"][kept], "y_test": arrays["y_test"][kept]}
    np.savez(tmp_path / "lacking.npz", **lacking)
    with pytest.raises(ValueError, match="class"):
        _audit(tmp_path, "data=npz", f"data.path={tmp_path / 'lacking.npz'}")


class Ten(Brightness):
    """Ten classes."""

    def forward(self, images):
        return super().forward(images).repeat(1, 4)[:, :10]


def test_pixels_that_slip_past_the_data_are_refused(tmp_path, monkeypatch):
    _npz(tmp_path / "grey.npz", num_channels=1)
    monkeypatch.setattr(
        "recipes.evaluate.study.chosen_examples", lambda *_: (2 * torch.ones(9, 1, 8, 8), torch.zeros(9))
    )
    with pytest.raises(ValueError, match=r"must be pixels in \[0, 1\].*they are in \[2, 2\]"):
        _audit(tmp_path, "data=npz", f"data.path={tmp_path / 'grey.npz'}")


def test_the_order_of_lambda_is_judged_by_closed_forms():
    values, misclassified = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([False, True, False, True])
    assert ranking(values, misclassified)["value"] == 0.75  # 3 of the 4 pairs
    perfect = ranking(values, torch.tensor([False, False, True, True]))
    assert (perfect["low"], perfect["value"], perfect["high"]) == (1, 1, 1)
    assert_close(perfect["p"], 1 / 3)  # 2 of the 6 ways to choose two of four are as far from the middle
    assert ranking(values, torch.ones(4, dtype=torch.bool)) is None
    single = ranking(values, torch.tensor([True, False, False, False]))
    assert 0 <= single["low"] <= single["value"] <= single["high"] <= 1
    line = torch.arange(12.0)
    assert_close(correlation(line, -(line**3))["value"], -1.0)
    assert correlation(line, torch.ones(12)) is None
    assert correlation(line[:9], line[:9]) is None


def test_no_order_is_claimed_from_a_few_images():
    few, many = (ranking(torch.arange(2.0 * n), torch.arange(2 * n) >= n) for n in (2, 20))
    words = (0.5, "above", "below", "neither")
    assert verdict(few, *words) == "neither"
    assert verdict(many, *words) == "above"
    assert verdict(ranking(torch.arange(40.0), torch.arange(40) < 20), *words) == "below"
    assert verdict(ranking(torch.arange(40.0), torch.arange(40) % 2 == 0), *words) == "neither"


def test_a_share_has_wilsons_interval():
    found = share(torch.tensor([True] * 8 + [False] * 2))
    n, p, z = 10, 0.8, 1.959964
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    expected = [p, (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert_close([found["value"], found["low"], found["high"]], expected, rtol=1e-5, atol=0)


def test_the_record_is_json_without_folders():
    found = {"a": torch.tensor([1.0, torch.nan, torch.inf]), "b": (float("-inf"), True, None)}
    assert plain(found) == {"a": [1.0, None, "inf"], "b": ["-inf", True, None]}
    settings = {"path": "some/where/x.npz", "other": ["/tmp/y", "a/b"], "model": {"_target_": "a.b"}}
    assert without_folders(settings) == {"path": "x.npz", "other": ["y", "a/b"], "model": {"_target_": "a.b"}}
