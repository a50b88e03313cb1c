"""The study as a user starts it, small."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image

from fisher_reg import GradientNormPenalty, KLPenalty, LInf, NuclearNormPenalty
from recipes.competitors.penalties import TradesPenalty
from recipes.data.spec import ImageSpec
from recipes.penalties.report import draw, finalists, markdown, short, summarize
from recipes.penalties.study import compare_penalties, plan
from recipes.penalties.training import attack_name, callbacks
from recipes.runtime.command import composed

ROOT = Path(__file__).parents[2]
SMALL = [
    "~models.ResNet",
    *(f"~methods.{name}" for name in ("spectral", "trace", "bound", "vat", "jacobian", "input_gradient", "kl")),
    "methods.default.strengths=[0.1,0.2]",
    "methods.pgd_3.strengths=[0.01]",
    "seeds=[0,1]",
    "trainer.max_epochs=1",
    "+trainer.limit_train_batches=6",
    "num_attacked=16",
    "num_attack_steps=3",
    "num_probes=8",
    "auto_attacks.num_images=4",
    "auto_attacks.attacks=[{norm: 2, epsilon: 0.25}]",
]


def _run(folder, *overrides):
    own = [f"output_dir={folder}/run", f"cache_dir={folder}/cache"]
    compare_penalties(composed("compare_penalties", [*own, *SMALL, *overrides]))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with redirect_stdout(StringIO()) as output:
        _run(folder)
    return folder, output.getvalue()


def test_the_study_leaves_its_table_and_its_figure(study):
    folder, output = study
    frame = pd.read_csv(folder / "run" / "penalties.csv")
    assert len(frame) == (1 + 2 + 1) * 2
    assert set(frame.method) == {"none", "default", "pgd_3"}
    assert frame[["clean", "l2_0.25", "linf_2/255", "calibration_error"]].stack().between(0, 1).all()
    assert (frame["l2_0.5"] <= frame.clean + 1).all()
    assert (frame.seconds > 0).all()
    best = frame[frame["auto_l2_0.25"].notna()]
    assert len(best) == 3 * 2  # one setting of each method, two seeds
    assert (best["auto_l2_0.25"] <= best["same_l2_0.25"] + 0.25).all()  # of four images
    with Image.open(folder / "run" / "penalties.png") as image:
        assert image.width > 800
    table = (folder / "run" / "penalties.md").read_text(encoding="utf-8")
    assert "PGD ℓ₂ 0.25" in table
    assert markdown(short(summarize(frame))).splitlines()[2][:40] in output
    settings = json.loads((folder / "run" / "penalties.json").read_text())
    assert settings["seeds"] == [0, 1]


def test_what_is_finished_is_not_done_again(study):
    folder, _ = study
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*") if path.is_file()}
    results = [path.parent for path in sorted(kept) if path.name == "output.pkl"]
    texts = {path: (path / "metadata.json").read_text() for path in results}
    lost = next(path for path, text in texts.items() if '"strength\\": 0.2' in text and "attack_again" not in text)
    shutil.rmtree(lost)
    _run(folder)
    again = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*") if path.is_file()}
    changed = {path for path in again if again[path] != kept[path]}
    assert {path for path in changed if path.suffix != ".pt"} == {lost / "output.pkl", lost / "metadata.json"}
    assert len(changed) == 3  # the weights of that network


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[0,0]", "A seed occurs twice"),
        ("num_attacked=100000", "num_attacked=100000.*360 test images"),
        ("seeds=[]", "There is nothing to train"),
        ("methods.default.strengths=[-1]", "finite weight >= 0; got -1"),
    ],
)
def test_a_study_that_would_fail_is_refused_before_any_training(tmp_path, override, message):
    overrides = [f"output_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", *SMALL, override]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("compare_penalties", overrides)
    with pytest.raises((ValueError, InstantiationException), match=message):
        compare_penalties(config)
    assert not (tmp_path / "cache").exists()


def test_the_experiment_composes():
    path = ["experiment=compare_penalties/cifar10_subset", "data.path=x.npz", "output_dir=x"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("compare_penalties", path)
    assert config.data.batch_size == 64
    assert len(plan(config)) == 3 * 2 * (1 + 9 * 3)


def test_the_experiment_for_a_gpu_builds_each_method_and_its_network():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("compare_penalties", ["experiment=compare_penalties/cifar10_gpu", "output_dir=x"])
    runs = plan(config)
    built = {(run["method"], run["strength"]): callbacks(run) for run in runs}
    assert [type(callback).__name__ for (callback,) in list(built.values())[1:]] == (
        ["FisherRegularizer"] * 6 + ["FastAdversarialTraining", "AdversarialTraining", "FisherRegularizer"]
    )
    assert built["none", 0] == []
    for method, every in (("kl", 1), ("default", 10)):
        ((callback,),) = (value for (name, _), value in built.items() if name == method)
        assert callback.every_n_steps == every
        assert callback.penalty == KLPenalty(step=callback.penalty.step, geometry=LInf())
        assert callback.weight == pytest.approx(callback.penalty.default_weight, rel=1e-5)
        assert callback.penalty.step == pytest.approx(8 / 255)
    assert built["gradient_norm", 1.5][0].penalty == GradientNormPenalty()
    assert built["nuclear_norm", 4.5][0].penalty == NuclearNormPenalty()
    assert built["trades", 6][0].penalty == TradesPenalty()
    spec = ImageSpec(10, 3, 32, (0.5,) * 3, (0.2,) * 3)
    (network,) = config.models.values()
    assert round(sum(weight.numel() for weight in instantiate(network, spec=spec).parameters()) / 1e6, 2) == 11.17
    optimizer = instantiate(config.optimizer)([torch.zeros(1, requires_grad=True)])
    assert optimizer.defaults | {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4} == optimizer.defaults
    transform = instantiate(config.data.train_transform)
    assert transform(torch.rand(3, 32, 32)).shape == (3, 32, 32)
    assert [attack_name(attack) for attack in config.auto_attacks.attacks] == [attack_name(config.attacks[0])]
    assert attack_name(config.attacks[0]) == "linf_8/255"


def _frame():
    rows = [("none", 0.0, 0.80, 0.20), ("kl", 0.1, 0.79, 0.50), ("kl", 0.5, 0.70, 0.60), ("pgd", 4.0, 0.50, 0.55)]
    return pd.DataFrame(
        [
            {"model": "VGG", "method": method, "strength": strength, "seed": seed}
            | {"clean": clean + 0.01 * seed, "l2_0.25": robust, "seconds": 10.0 + strength}
            for method, strength, clean, robust in rows
            for seed in (0, 1)
        ]
    )


def test_the_finalist_is_the_most_robust_of_those_that_keep_the_accuracy():
    assert finalists(_frame(), 0.02) == {("VGG", "none", 0.0), ("VGG", "kl", 0.1), ("VGG", "pgd", 4.0)}
    assert ("VGG", "kl", 0.5) in finalists(_frame(), 0.2)


def test_another_attack_can_choose_the_finalists():
    frame = _frame().assign(**{"linf_8/255": 1 - _frame()["l2_0.25"]})
    assert ("VGG", "kl", 0.1) in finalists(frame, 0.2, "linf_8/255")
    assert "linf_8/255" in short(summarize(frame), "linf_8/255").columns
    assert draw(frame, "linf_8/255").axes[0].get_ylabel().endswith("8/255")


def test_the_table_has_means_and_standard_errors():
    lines = markdown(summarize(_frame())).splitlines()
    assert lines[0] == "| model | method | strength | seeds | clean | PGD ℓ₂ 0.25 | seconds |"
    assert lines[3] == "| VGG | kl | 0.1 | 2 | 0.795 ± 0.005 | 0.500 ± 0 | 10.1 ± 0 |"


def test_the_figure_has_a_curve_for_each_method():
    figure = draw(_frame())
    assert len(figure.axes) == 2
    assert {text.get_text() for legend in figure.legends for text in legend.get_texts()} == {"none", "kl", "pgd"}


@pytest.mark.parametrize(
    ("norm", "epsilon", "name"),
    [(2, 0.25, "l2_0.25"), ("inf", 2 / 255, "linf_2/255"), ("inf", 0.0156862745, "linf_4/255")],
)
def test_attacks_are_named_by_norm_and_radius(norm, epsilon, name):
    assert attack_name({"norm": norm, "epsilon": epsilon}) == name
