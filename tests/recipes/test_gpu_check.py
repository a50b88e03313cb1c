"""The check of a GPU, on a CPU and small: what it writes, and that it catches a wrong number."""

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from recipes.gpu_check import study as gpu_check
from recipes.gpu_check.numbers import CPU, compared, difference, numbers, reference
from recipes.gpu_check.timings import Timed, alternately

CONF = Path(__file__).parents[2] / "conf"
TINY = ["num_rounds=1", "~networks.ViT", "~networks.DenseNet", "~networks.ResNet", "timed.num_images=2"]
TINY += ["small.num_images=2", "variants.compiled.networks=[]", "variants.bf16-mixed.networks=[]"]
TINY += ["~methods.vat", "~methods.pgd_3", "large.num_images=2"]
TINY += ["large.network._target_=torchvision.models.squeezenet1_1"]


def _config(tmp_path, name="gpu_check_small", *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, [f"output_dir={tmp_path}", "device=cpu", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_check")
    config = _config(folder, "gpu_check_small", *TINY)
    return folder, gpu_check.gpu_check(config)


def test_every_section_leaves_its_rows(run):
    folder, sections = run
    assert {name: section["error"] for name, section in sections.items()} == dict.fromkeys(gpu_check.SECTIONS)
    rows = pd.read_csv(folder / "gpu_check.csv")
    assert set(rows.section) == set(gpu_check.SECTIONS)
    assert set(rows[rows.section == "numbers"].network) == {"VGG", "LSTM"}
    assert (rows[rows.section == "estimates"].forwards > 0).all()
    assert (rows[(rows.section == "steps") & (rows.what == "none")].steps == 1).all()
    assert rows[rows.section == "paper"].times_ours.max() > 0
    text = (folder / "gpu_check.md").read_text(encoding="utf-8")
    assert "| VGG | trace | 0 | 0.001 | yes | – |" in text


def test_no_number_is_wrong_and_only_the_lstm_has_no_bound(run):
    _, sections = run
    assert not gpu_check.wrong(sections)
    notes = {(row["network"], row["note"]) for row in sections["numbers"]["rows"] if row["note"]}
    assert notes == {("LSTM", "no bound")}


def test_the_json_names_no_folder(run):
    folder, _ = run
    text = (folder / "gpu_check.json").read_text(encoding="utf-8")
    assert str(folder) not in text
    assert json.loads(text)["config"]["output_dir"] == folder.name


@pytest.fixture
def given():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10)).eval()
    return network, torch.rand(2, 3, 2, 2), torch.tensor([1, 3])


def test_a_wrong_number_is_caught(given):
    some = [number for number in numbers() if number.name in ("trace", "linf", "KLPenalty, gradient norm")]
    expected = reference(*given, some)
    assert all(row["passed"] for row in gpu_check.compare(*given, some, CPU, expected))
    expected["trace"] = expected["trace"] * torch.tensor([1.0, 1.01])
    rows = gpu_check.compare(*given, some, CPU, expected)
    assert [row["number"] for row in rows if not row["passed"]] == ["trace"]
    assert gpu_check.wrong({"numbers": {"rows": rows, "error": None}})


def test_the_tolerances_hold_for_other_round_off(given):
    drawn = ("default", "linf", "Penalty")  # their random numbers are others in another precision
    some = [number for number in numbers() if not any(word in number.name for word in drawn)]
    network, images, labels = given
    found = reference(network, images, labels, some)
    exact = reference(network.double(), images.double(), labels, some)
    rows = compared(some, found, exact)
    assert all(row["passed"] for row in rows), rows
    assert max(row["difference"] for row in rows) > 0


def test_what_cannot_be_compared_is_wrong():
    one = torch.ones(2)
    assert difference(one, one) == 0
    assert difference(one, torch.tensor([1.0, 2.0])) == 0.5
    assert difference(torch.tensor([1.0, torch.nan]), one) == float("inf")
    assert difference("RuntimeError: no kernel", one) == float("inf")
    assert difference("RuntimeError: no kernel", "RuntimeError: no kernel") == float("inf")
    assert difference("no bound", "no bound") == 0


def test_a_section_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fail(config, device, rows):
        rows.append({"network": "A", "passed": True})
        raise RuntimeError("no kernel image")

    def work(config, device, rows):
        rows.append({"network": "B", "forwards": 2.0})

    monkeypatch.setattr(gpu_check, "SECTIONS", {"trainer": fail, "estimates": work})
    config = _config(tmp_path, "gpu_check_small", "sections=[trainer,estimates]")
    sections = gpu_check.gpu_check(config)
    assert sections["trainer"]["error"] == "RuntimeError: no kernel image"
    assert sections["estimates"]["rows"] == [{"network": "B", "forwards": 2.0}]
    assert "Error: RuntimeError: no kernel image" in (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    assert gpu_check.wrong(sections)
    with pytest.raises(SystemExit, match="1"):
        gpu_check.main.__wrapped__(config)


def test_no_round_begins_after_the_budget(given):
    network, images, _ = given
    calls = []
    some = [Timed("call", partial(calls.append, 0), 2)]
    (row,) = alternately(some, network, images, CPU, num_rounds=50, max_seconds=0)
    assert row["num_rounds"] == len(calls) - 1 == 1


def test_the_large_preset_has_the_sizes_of_the_question(tmp_path):
    config = OmegaConf.to_container(_config(tmp_path, "gpu_check"), resolve=True, throw_on_missing=True)
    assert (config["large"]["image_size"], config["large"]["network"]["num_classes"]) == (224, 1000)
    assert set(config["sections"]) == set(gpu_check.SECTIONS)
    assert sum(config["max_seconds"].values()) <= 480
