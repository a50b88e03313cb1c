"""The recipe of the bounds: its ladder, its references, and a small run."""

import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from fisher_reg import Lanczos, Tightening
from recipes.bounds import speed as bounds_speed
from recipes.bounds import study as bounds
from recipes.bounds.speed import reference_norm, without_zero_layers
from recipes.bounds.tightness import cumulative, gaps

CONF = Path(__file__).parents[2] / "conf"
CONV = "{_target_: torch.nn.Conv2d, in_channels: 2, out_channels: 3, kernel_size: 3, padding: 1, bias: false}"
STRIDED = "{_target_: torch.nn.Conv2d, in_channels: 3, out_channels: 4, kernel_size: 3, stride: 2, bias: false}"
NETWORK = (
    "{_target_: torchvision.models.MobileNetV2, num_classes: 3, width_mult: 0.1, "
    "inverted_residual_setting: [[1, 8, 1, 1], [2, 8, 2, 2]]}"
)
TINY = [
    "networks.densenet={growth_rate: 4, block_config: [2, 1], num_init_features: 4}",
    "networks.vit={num_layers: 1, num_heads: 1, hidden_dim: 8, mlp_dim: 8}",
    "families=[densenet,vit]",
    "+data.image_size=8",
    "trainer.max_epochs=1",
    "+trainer.limit_train_batches=4",
    "num_images=6",
    "num_blockwise_images=2",
    "num_ball_images=2",
    "num_attacks=4",
    "radii=[0.01,0.1]",
    f"speed_models=[{NETWORK}]",
    "speed_image_size=32",
    f"convolutions=[{{name: small, size: 5, conv: {CONV}}},{{name: strided, size: 7, conv: {STRIDED}}}]",
    "device=cpu",
]


def _config(folder, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("bounds", [f"output_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bounds")
    config = _config(folder, *TINY)
    for step in config.ladder:
        if "balancing_steps" in step.tightening:
            step.tightening.balancing_steps = 5
    bounds.measure(config)
    return folder


@pytest.fixture(scope="module")
def ladders(folder):
    return pd.read_csv(folder / "tightness.csv")


def test_the_configuration_composes_and_resolves(tmp_path):
    config = _config(tmp_path)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    steps = list(cumulative(config.ladder).values())
    off, on = (
        {field.name: bool(getattr(step, field.name)) for field in fields(Tightening)} for step in (steps[0], steps[-1])
    )
    assert not any(off.values())
    assert all(on.values())  # a new field of Tightening needs a step
    assert config.baseline in cumulative(config.ladder)
    for case in config.convolutions:
        conv = instantiate(case.conv)
        assert conv.bias is None
        assert conv.padding_mode == "zeros"


def test_no_certified_bound_lies_below_its_eigenvalue(ladders):
    assert (ladders.num_violations == 0).all()
    assert (ladders[["gap_of_max", "gap_of_median", "mean_gap"]] > -1e-6).all(axis=None)
    whole = ladders[ladders.level == "global"]
    assert (whole.log10_bound >= whole.log10_lambda_max).all()


def test_steps_never_loosen_the_global_bound_where_the_mathematics_says_so(ladders):
    # A head or a matrix replaces a norm by a smaller one, and the best of two coordinates or compositions is kept.
    gained = ladders[ladders.level == "global"].set_index("step").gained
    for step in ("head with softmax", "dense matrices", "balanced"):
        assert (gained[step] > -1e-4).all(), step  # circular norms are certified to 1e-3 only
    assert (ladders[ladders.step == "batch norm folded"].gained_since_baseline == 0).all()


def test_gains_add_up(ladders):
    for _, rows in ladders.groupby(["network", "level"]):
        assert rows.gained.isna().to_list() == [True] + [False] * (len(rows) - 1)
        assert rows.gained.sum() == pytest.approx(rows.log10_bound.iloc[0] - rows.log10_bound.iloc[-1], abs=1e-3)


def test_the_local_bound_is_never_above_the_global_one(ladders):
    levels = ladders.pivot(index=["network", "step"], columns="level", values="log10_bound")
    both = levels.dropna()
    assert (both["local"] <= both["global"] + 1e-4).all()
    assert list(levels.index.difference(both.index).unique("step")) == ["blocks averaged"]  # the global bound alone


def test_one_segment_is_the_eigenvalue_itself(folder):
    curves = pd.read_csv(folder / "segments.csv")
    tolerance = -math.log10(1 - Lanczos().rtol)  # the blockwise bound iterates from below, to that residual
    assert curves[curves.num_segments == 1].mean_gap.to_numpy() == pytest.approx(np.zeros(2), abs=tolerance)
    assert (curves.mean_gap > -tolerance).all()
    for _, curve in curves.groupby("network"):
        assert list(curve.num_segments) == list(range(len(curve), 0, -1))


def test_the_norms_of_convolutions_are_bounds_of_the_exact_one(folder):
    rows = pd.read_csv(folder / "convolutions.csv")
    assert (rows.reference_kind == "exact").all()
    assert (rows[rows.source == "fisher-reg"].excess > -1e-6).all()
    exact = rows[rows.method == "conv_norm"].excess.to_numpy()
    assert exact == pytest.approx(np.zeros(len(exact)), abs=2e-6)


def test_the_large_networks_have_rows_and_a_table(folder):
    rows = pd.read_csv(folder / "networks.csv")
    assert list(rows.level) == ["global", "local"]
    assert np.isfinite(rows.log10_bound).all()
    assert (rows.seconds > 0).all()
    assert list(rows.network) == ["MobileNetV2"] * 2
    layers = json.loads((folder / "bounds.json").read_text())["networks"][0]["layers"]
    assert "classifier.1" in layers
    assert "global bound 10^" in layers


def test_a_run_leaves_its_summary_tables_and_figure(folder):
    result = json.loads((folder / "bounds.json").read_text(), parse_constant=pytest.fail)
    assert result["environment"]["torch"]
    assert result["environment"]["fisher-reg"]
    assert result["config"]["seed"] == 0
    assert {"tightness", "balls", "segments", "networks", "convolutions"} <= set(result)
    page = (folder / "bounds.md").read_text(encoding="utf-8")
    assert page.count("|---|") == 6
    assert "| densenet | batch norm folded |" in page
    with Image.open(folder / "bounds.png") as image:
        assert image.width > 1000


def test_no_attack_exceeds_a_bound_in_a_ball_and_the_larger_ball_has_the_larger_bound(folder):
    rows = pd.read_csv(folder / "balls.csv")
    assert (rows.num_violations == 0).all()
    for _, network in rows.groupby("network"):
        small, large, certified = network.iloc[:3].itertuples()
        assert small.log10_attacked <= small.log10_bound <= large.log10_bound <= large.log10_global + 1e-9
        assert certified.radius.startswith("certified, median")
        assert certified.gained_median >= 1  # the ratio to the radius of one constant


def test_each_part_can_be_left_out(tmp_path):
    assert bounds.measure(_config(tmp_path, "tightness=false", "speed=false")) == {}
    assert not (tmp_path / "bounds.png").exists()


def test_a_missing_peer_is_said_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(bounds_speed, "installed", lambda name: None if name == "orthogonium" else "1")
    assert [norm.source for norm in bounds_speed.available_norms()] == ["fisher-reg", "fisher-reg", "torch"]
    assert "Not installed, left out: orthogonium" in capsys.readouterr().out


def test_steps_of_the_ladder_add_up():
    steps = cumulative(
        [
            {"name": "none", "tightening": {}},
            {"name": "two", "tightening": {"folded": True, "balancing_steps": 3}},
            {"name": "three", "tightening": {"head": True, "balancing_steps": 0}},
        ]
    )
    assert steps["none"] == Tightening(folded=False, merged=False, head=False, dense=False)
    assert steps["three"] == Tightening(folded=True, merged=False, head=True, dense=False)


def test_steps_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        cumulative([{"name": "a", "tightening": {}}, {"name": "a", "tightening": {"head": True}}])


@pytest.mark.parametrize(
    ("override", "message"), [("baseline=nowhere", "is no step"), ("num_blockwise_images=500", "must lie in 1..")]
)
def test_settings_that_cannot_work_fail_before_any_training(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        bounds.measure(_config(tmp_path, override))


def test_gaps_compare_like_with_like():
    found = gaps(torch.tensor([1.0, 4.0, 2.0]), torch.tensor([0.0, 3.0, 2.5]))
    assert found["log10_bound"] == pytest.approx(7 / 3)
    assert found["gap_of_max"] == 1.0
    assert found["gap_of_median"] == -0.5
    assert found["mean_gap"] == pytest.approx(0.5)
    assert found["num_violations"] == 1


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}], ids=str)
def test_both_references_agree(options):
    conv = nn.Conv2d(2, 4, 3, padding=1, bias=False, **options)
    exact, below = (reference_norm(conv, 6, side) for side in (1000, 1))
    assert (exact[1], below[1]) == ("exact", "from below")
    assert below[0] == pytest.approx(exact[0], rel=1e-7)


def test_a_kernel_of_one_tap_has_the_norm_of_its_matrix():
    conv = nn.Conv2d(2, 2, 1, bias=False)
    conv.weight.data = torch.tensor([[3.0, 0.0], [0.0, -4.0]]).view(2, 2, 1, 1)
    assert reference_norm(conv, 3, 100)[0] == pytest.approx(4.0)


def test_layers_set_to_zero_are_drawn_and_no_others():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(network[1].weight)
    before = network[0].weight.clone()
    without_zero_layers(network)
    assert network[1].weight.abs().min() > 0
    torch.testing.assert_close(network[0].weight, before, rtol=0, atol=0)
    assert math.isfinite(float(network[1].weight.detach().sum()))


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}], ids=str)
def test_values_of_orthogonium_are_bounds(options):
    pytest.importorskip("orthogonium")
    conv = nn.Conv2d(2, 4, 3, padding=1, bias=False, **options)
    (norm,) = (norm for norm in bounds_speed.available_norms() if norm.source == "orthogonium")
    exact = reference_norm(conv, 6, 1000)[0]
    assert exact * (1 - 1e-5) <= norm.compute(conv, 6, 4) <= 2 * exact  # in single precision
