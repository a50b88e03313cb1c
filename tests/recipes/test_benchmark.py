"""The benchmark as a user starts it, small; its peers."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from fisher_reg import Exact, fisher_spectral_norm
from recipes.benchmark.study import METHODS, available_methods, benchmark
from recipes.competitors import estimators as peers
from recipes.runtime.command import composed
from recipes.runtime.environment import environment, installed
from recipes.runtime.timing import peak_memory

ROOT = Path(__file__).parents[2]
SMALL = ["num_images=8", "num_peer_images=1", "num_rounds=2", "max_seconds=0.5", "trainer.max_epochs=1"]
SMALL += ["data.num_train=256", "data.num_workers=0", "networks.vgg.layers=[8,M,8,M]"]
CASES = "cases=[{name: one, network: vgg, data: {num_digits: 1}},{name: two, network: vgg, data: {num_digits: 2}}]"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    benchmark(composed("benchmark", [*SMALL, CASES, f"output_dir={folder}", "device=cpu"]))
    return folder


def test_every_method_is_measured_in_every_case(folder):
    rows = pd.read_csv(folder / "benchmark.csv")
    names = [method.name for method in available_methods(None)]
    assert [*zip(rows.case, rows.method, strict=True)] == [(case, name) for case in ("one", "two") for name in names]
    assert list(rows.groupby("case").num_classes.first()) == [10, 100]
    assert (rows[["forwards", "images_per_second"]] > 0).all(axis=None)
    assert (rows.set_index("method").memory_ratio["default"] > 0).all()
    assert (rows.num_rounds >= 1).all()
    errors = rows.set_index(["case", "method"]).p95_error
    for case in ("one", "two"):
        assert errors[case, "Exact"] == 0
        assert errors[case, "default"] < 0.02
        assert errors[case, "BlackBoxMax"] > 0.5


def test_the_settings_and_versions_are_kept(folder):
    result = json.loads((folder / "benchmark.json").read_text())
    assert result["environment"] == environment(CPU)
    assert torch.__version__.startswith(result["environment"]["torch"].split("+")[0])
    assert result["config"]["num_images"] == 8
    assert len(result["rows"]) == len(pd.read_csv(folder / "benchmark.csv"))
    with Image.open(folder / "benchmark.png") as image:
        assert image.width > 800


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"no methods \['Lanzcos'\]; there are \['default'"):
        available_methods(["default", "Lanzcos"])


def test_methods_of_absent_packages_are_left_out_aloud(monkeypatch, capsys):
    monkeypatch.setattr("recipes.benchmark.study.installed", lambda name: None)
    assert {method.source for method in available_methods(None)} == {"fisher_reg", "paper"}
    assert "curvlinops-for-pytorch, plenoptic" in capsys.readouterr().out


@pytest.fixture
def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5)).eval()


@pytest.mark.parametrize("method", [method for method in METHODS if method.source not in ("fisher_reg", "paper")])
def test_peers_compute_the_same_number(method, classifier):
    if installed(method.source) is None:
        pytest.skip(f"{method.source} is not installed")
    images = torch.rand(2, 3, 4, 4)
    exact = fisher_spectral_norm(classifier, images, solver=Exact()).eigenvalue
    torch.testing.assert_close(method.estimate(classifier, images), exact, rtol=2e-2, atol=0)
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_the_papers_values_are_largest_quotients(classifier):
    images = torch.rand(3, 3, 4, 4)
    exact = fisher_spectral_norm(classifier, images, solver=Exact()).eigenvalue
    few, many = (peers.paper_white_box(classifier, images, count) for count in (2, 20_000))
    assert (many <= exact * 1.0001).all()
    torch.testing.assert_close(many, exact, rtol=0.05, atol=0)
    assert (few < 0.95 * many).any()
    quotients = peers.paper_black_box(classifier.double(), images.double(), 3000)
    assert (quotients < exact).all()
    assert (quotients > 0.2 * exact).all()


def test_peak_memory_counts_what_is_held_at_once():
    def one_after_another():
        return [float(torch.ones(2**18).sum()) for _ in range(4)]

    def together():
        return [torch.ones(2**18) for _ in range(4)]

    assert peak_memory(one_after_another, CPU) == pytest.approx(2**20, rel=0.01)
    assert peak_memory(together, CPU) == pytest.approx(4 * 2**20, rel=0.01)


def test_the_large_preset_is_large(tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("benchmark_gpu", [f"output_dir={tmp_path}"])
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert container["data"]["image_size"] == 224
    assert {case["data"]["num_digits"] for case in container["cases"]} == {1, 2, 3}
