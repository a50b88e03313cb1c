"""The recipe that attaches the callbacks to public modules: what it says of one that works, one refused, one absent."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_method
from omegaconf import OmegaConf

from fisher_reg import Bernoulli, Categorical, Exact, Gaussian, fisher_spectral_norm
from recipes.public_modules import Public
from recipes.public_modules import study as public_modules

ROOT = Path(__file__).parents[2]
CHOSEN = ("BoringModel", "LitAutoEncoder of the quick start", "resnet10t in a LightningModule",
          "BertForSequenceClassification")  # fmt: skip


@pytest.fixture(scope="module")
def config():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("public_modules", ["output_dir=unused"])


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    chosen = OmegaConf.to_container(config)
    modules = {entry["name"]: entry for entry in chosen["modules"] if entry["name"] in CHOSEN}
    unaided = {key: value for key, value in modules[CHOSEN[1]].items() if key != "needs"}
    absent = {"package": "no_such_package", "name": "absent", "build": "no_such_package.absent"}
    chosen |= {"output_dir": str(folder)}
    chosen["modules"] = [*modules.values(), unaided | {"name": "without arguments"}, absent]
    public_modules.public_modules(OmegaConf.create(chosen))
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return pd.read_csv(folder / "public_modules.csv", keep_default_na=False).set_index("module")


def test_each_module_is_measured_untouched_or_with_what_it_needs(rows):
    assert rows.loc[list(CHOSEN), "status"].tolist() == [
        "works", "works with arguments", "works", "works with arguments",
    ]  # fmt: skip
    assert rows.loc["BertForSequenceClassification", "untouched"].startswith("MisconfigurationException: The inputs")
    assert "inputs_embeds=x" in rows.loc["BertForSequenceClassification", "needed"]


def test_what_is_logged_is_the_eigenvalue_of_an_explicit_jacobian(rows):
    measured = rows.loc[list(CHOSEN)]
    assert measured.is_equal.tolist() == ["True"] * 4
    assert (measured["lambda"].astype(float) > 0).all()


def test_a_refusal_and_an_absent_package_are_rows(rows):
    assert rows.loc["absent", "status"] == "not installed"
    assert rows.loc["without arguments", "status"] == "refused"
    assert rows.loc["without arguments", "untouched"].startswith("ForwardError: LitAutoEncoder.forward")


def test_the_files_say_what_was_used(folder):
    assert "6 modules. " in (folder / "public_modules.md").read_text(encoding="utf-8")
    assert json.loads((folder / "public_modules.json").read_text(encoding="utf-8"))["environment"]["timm"]


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_the_explicit_jacobian_gives_the_librarys_eigenvalue(likelihood):
    torch.manual_seed(0)
    network, x = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)), torch.randn(6, 5)
    public = Public(network, x, network, lambda: x)
    expected = fisher_spectral_norm(network, x[:4], likelihood=likelihood, solver=Exact()).eigenvalue.mean()
    assert public_modules.by_hand(public, likelihood, 4) == pytest.approx(float(expected), rel=1e-4)


def test_every_build_exists(config):
    for entry in config.modules:
        assert callable(get_method(entry.build))


def test_the_kept_table_is_that_of_its_file_and_has_the_modules_of_the_configuration(config):
    results = ROOT / "recipes" / "results"
    frame = pd.read_csv(results / "public_modules.csv")
    for name in ("batch", "untouched", "needed", "status", "bound", "warning"):
        frame[name] = frame[name].fillna("")
    assert public_modules.markdown(frame) == (results / "public_modules.md").read_text(encoding="utf-8")
    assert frame.module.tolist() == [entry.name for entry in config.modules]
