"""The ranking of networks: its verdicts on orders that are known, its cache, and a small run."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from scipy.stats import kendalltau, spearmanr

from recipes.rank import measuring
from recipes.rank import study as rank
from recipes.rank.agreement import (
    COMPARISONS,
    compare,
    correlations,
    draw,
    markdown,
    model_table,
    notes,
    reproducibility,
)

CONF = Path(__file__).parents[2] / "conf"
TINY = [
    "{name: narrow, family: vgg, overrides: {layers: [4, M]}}",
    "{name: wide, family: vgg, overrides: {layers: [8, M]}}",
    "{name: vit, family: vit, overrides: {patch_size: 8, num_layers: 1, num_heads: 1, hidden_dim: 8, mlp_dim: 8}}",
]
SMALL = ["trainer.max_epochs=1", "+trainer.limit_train_batches=3", "num_images=4", "num_blockwise_images=2"]
SMALL += ["num_resamples=20", "device=cpu"]


def _rows(bounds, num_seeds=3, noise=0.05, family="abcd"):
    """Networks with log10 lambda = 0, 0.2, ... and bounds of which we know the order; lambda differs between seeds."""
    generator = np.random.default_rng(0)
    rows = []
    for index, bound in enumerate(bounds):
        for seed in range(num_seeds):
            size = index / 5 + noise * generator.normal()
            rows.append(
                {
                    "model": f"m{index}",
                    "family": family[index % len(family)],
                    "seed": seed,
                    "accuracy": 0.9,
                    "num_violations": 0,
                }
                | {name: 10**size for name in ("lambda_max", "lambda_max_few")}
                | {name: 10 ** (size - 1) for name in ("lambda_median", "lambda_median_few")}
                | {comparison.bound: bound + 3 + noise * generator.normal() for comparison in COMPARISONS}
            )
    return pd.DataFrame(rows)


def _over_models(rows):
    return pd.DataFrame([compare(rows, comparison, "models", num_resamples=100) for comparison in COMPARISONS])


def test_an_equal_order_is_found():
    found = _over_models(_rows(np.arange(10)))
    assert found.tau.to_numpy() == pytest.approx(np.ones(6))
    assert found.rho.to_numpy() == pytest.approx(np.ones(6))
    assert (found.tau_p < 0.02).all()
    assert found.verdict.str.contains(r"the (?:global|local|blockwise) bound ranks these models by lambda").all()


def test_an_order_with_exchanged_neighbours_is_found_in_part():
    found = _over_models(_rows([1, 0, 3, 2, 5, 4, 7, 6, 9, 8]))
    assert found.tau.to_numpy() == pytest.approx(np.full(6, 1 - 2 * 5 / 45))
    assert (found.tau_low > 0).all()
    assert found.verdict.str.contains("in part by lambda_.*: about 89% of the pairs").all()


def test_a_reversed_order_is_called_opposite():
    found = _over_models(_rows(-np.arange(10)))
    assert found.tau.to_numpy() == pytest.approx(-np.ones(6))
    assert found.verdict.str.contains("in the opposite order").all()


def test_an_unrelated_order_is_not_called_a_ranking():
    found = _over_models(_rows([4, 7, 1, 8, 3, 0, 6, 9, 2, 5]))
    assert ((found.tau_low < 0) & (found.tau_high > 0)).all()
    assert (found.tau_p > 0.05).all()
    assert found.verdict.str.contains("does not rank these models").all()


def test_the_seeds_of_a_model_do_not_count_as_independent_networks():
    rows = _rows([0, 3, 1, 4, 2], num_seeds=10)  # tau = 0.4 between five models: exact p = 0.48
    found = compare(rows, COMPARISONS[0], "networks", num_resamples=200)
    assert kendalltau(rows.log10_global, rows.lambda_median).pvalue < 1e-3  # 50 networks, taken for independent ones
    assert found["tau_p"] > 0.3
    assert found["tau_low"] < 0 < found["tau_high"]


@pytest.mark.parametrize("bounds", [[3, 7, 1, 8, 4, 0, 6, 9, 2, 5], [0, 2, 1, 4, 3, 5, 7, 6], [5, 4, 3, 2, 0, 1]])
def test_estimates_are_those_of_scipy_and_lie_in_their_intervals(bounds):
    rows = _rows(bounds, family="a")
    found = correlations(rows, num_resamples=50)
    assert len(found) == 12
    for name in ("tau", "rho"):
        assert (found[f"{name}_low"] <= found[name] + 1e-9).all()
        assert (found[name] <= found[f"{name}_high"] + 1e-9).all()
    networks = found[(found.over == "networks") & (found.bound == "log10_local_max")].iloc[0]
    assert networks.tau == pytest.approx(kendalltau(rows.log10_local_max, rows.lambda_max).statistic)
    means = rows.assign(size=np.log10(rows.lambda_max)).groupby("model")[["log10_local_max", "size"]].mean()
    models = found[(found.over == "models") & (found.bound == "log10_local_max")].iloc[0]
    assert models.rho == pytest.approx(spearmanr(means.log10_local_max, means["size"]).statistic)


def test_the_p_value_of_few_models_is_the_exact_one():
    rows = _rows([0, 2, 1, 4, 3], num_seeds=1)
    result = compare(rows, COMPARISONS[0], "models", num_resamples=200)  # more than 5! permutations
    assert result["tau_p"] == pytest.approx(kendalltau([0, 2, 1, 4, 3], range(5)).pvalue)


def test_ties_are_left_out_and_a_constant_bound_has_no_order():
    rows = _rows([0, 0, 1, 1, 2, 2], num_seeds=1, noise=0)
    found = _over_models(rows)
    assert found.tau.to_numpy() == pytest.approx(np.full(6, 12 / math.sqrt(12 * 15)))  # 3 of 15 pairs tied in the bound
    rows["log10_global"] = 7.0
    found = _over_models(rows).set_index("level")
    assert found.loc["global", ["tau", "tau_low", "tau_high", "tau_p", "rho", "rho_p"]].isna().all(axis=None)
    assert found.loc["global"].verdict.str.contains("undefined: the global bound or lambda_.* is the same").all()
    assert found.loc["local"].tau.notna().all()
    assert "nan" in markdown(rows, correlations(rows, 20))


def test_few_models_allow_no_verdict_and_families_of_three_are_compared():
    found = correlations(_rows(np.arange(9), family="ab"), num_resamples=10)
    assert list(found.over.unique()) == ["models", "networks", "models of a", "models of b"]
    few = found[found.over == "models of b"]
    assert (few.num_models == 4).all()
    assert few.tau.to_numpy() == pytest.approx(np.ones(6))
    assert (few.verdict == "4 models are too few: no ranking of the models of b can be significant.").all()
    assert set(correlations(_rows(np.arange(4), family="ab"), num_resamples=5).over) == {"models", "networks"}


def test_one_seed_is_said_to_say_nothing_of_training():
    rows = _rows(np.arange(8), num_seeds=1)
    assert _over_models(rows).verdict.str.contains("every pair in the same order").all()
    assert math.isnan(reproducibility(rows, "lambda_max"))
    assert any("One seed per model" in note for note in notes(rows))
    assert any("tau = 1.00 (lambda_median)" in note for note in notes(_rows(np.arange(8), noise=0.001)))


def test_a_bound_below_its_eigenvalue_is_reported():
    rows = _rows(np.arange(4))
    assert not any("bug" in note for note in notes(rows))
    rows.loc[2, "num_violations"] = 3
    assert any("3 times a bound was below" in note for note in notes(rows))


def test_ranks_count_from_the_least_sensitive():
    table = model_table(_rows([2, 0, 1], noise=0)).set_index("model")
    assert list(table.lambda_max) == ["1 (1)", "1.58 (2)", "2.51 (3)"]
    assert list(table.log10_global) == ["5.00 (3)", "3.00 (1)", "4.00 (2)"]


def test_the_figure_names_each_model_at_both_ends():
    figure = draw(_rows([2, 0, 1, 3]), correlations(_rows([2, 0, 1, 3]), num_resamples=20))
    left, right = figure.axes[1], figure.axes[3]
    assert [text.get_text() for text in left.get_yticklabels()] == ["m0", "m1", "m2", "m3"]
    assert [text.get_text() for text in right.get_yticklabels()] == ["m1", "m2", "m0", "m3"]


def _config(folder, *overrides, models=TINY, seeds="[0]"):
    given = [f"output_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}", f"seeds={seeds}", *SMALL]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("rank", [*given, f"models=[{','.join(models)}]", *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rank")
    rank.rank(_config(folder))
    return folder


def test_a_run_leaves_its_files(folder):
    rows = pd.read_csv(folder / "run" / "rank.csv")
    assert list(rows.model) == ["narrow", "wide", "vit"]
    assert (rows.lambda_median <= rows.lambda_max).all()
    assert (rows.num_violations == 0).all()
    assert (rows.log10_global >= np.log10(rows.lambda_max)).all()
    result = json.loads((folder / "run" / "rank.json").read_text(), parse_constant=pytest.fail)
    assert len(result["correlations"]) == 2 * len(COMPARISONS)
    assert all("3 models are too few" in row["verdict"] for row in result["correlations"])
    page = (folder / "run" / "rank.md").read_text(encoding="utf-8")
    assert "| narrow | 0." in page
    assert "One seed per model" in page
    with Image.open(folder / "run" / "rank.png") as image:
        assert image.width > 1000


def test_a_second_run_trains_nothing_and_finds_the_same(folder, monkeypatch):
    before = json.loads((folder / "run" / "rank.json").read_text())["correlations"]
    monkeypatch.setattr(measuring, "trained_network", lambda *_: pytest.fail("trained again"))
    rank.rank(_config(folder))
    assert json.loads((folder / "run" / "rank.json").read_text())["correlations"] == before


def test_a_killed_run_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    trained = []

    def killed_at_the_second(config, *rest):
        trained.append(config.seed)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(config, *rest)

    original = measuring.trained_network
    monkeypatch.setattr(measuring, "trained_network", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        rank.rank(_config(tmp_path))
    assert len(list((tmp_path / "cache").rglob("output.pkl"))) == 1
    assert list(pd.read_csv(tmp_path / "run" / "rank.csv").model) == ["narrow"]
    rank.rank(_config(tmp_path))
    assert len(trained) == 4  # one, the killed one, and the two that were missing
    same = [json.loads((path / "run" / "rank.json").read_text())["correlations"] for path in (folder, tmp_path)]
    assert same[0] == same[1]


@pytest.mark.parametrize("change", ["trainer.max_epochs=2", "num_images=5", "optimizer.lr=1e-3", "+data.image_size=8"])
def test_other_settings_are_another_network(tmp_path, change):
    ours, other = (
        rank.settings(config, config.models[0], 0) for config in (_config(tmp_path), _config(tmp_path, change))
    )
    assert ours != other


def test_the_run_folder_is_no_setting(tmp_path):
    one = _config(tmp_path, "trainer=default")
    other = OmegaConf.merge(one, {"output_dir": "elsewhere", "num_resamples": 7})
    assert rank.settings(one, one.models[0], 0) == rank.settings(other, other.models[0], 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"models": TINY[:2]}, r"at least 3 models; got \['narrow', 'wide'\]"),
        ({"models": [*TINY, TINY[0]]}, "models must have .* none twice"),
        ({"seeds": "[0, 0]"}, "seeds must have .* none twice"),
        ({"seeds": "[]"}, "seeds must have at least one"),
        (
            {"models": [*TINY, "{name: lenet, family: lenet}"]},
            r"lenet is of an unknown family 'lenet'; there are \['vgg'",
        ),
    ],
)
def test_bad_settings_are_refused_before_any_training(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(measuring, "trained_network", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        rank.rank(_config(tmp_path, **overrides))


@pytest.mark.parametrize("change", ["num_images=1000000", "num_blockwise_images=9", "num_blockwise_images=0"])
def test_impossible_numbers_of_images_are_refused(tmp_path, monkeypatch, change):
    monkeypatch.setattr(measuring, "trained_network", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="num_blockwise_images=.* <= num_images=.* <= 360"):
        rank.rank(_config(tmp_path, change))


def test_a_model_that_cannot_be_built_is_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "trained_network", lambda *_: pytest.fail("trained"))
    with pytest.raises(Exception, match="layerz"):
        rank.rank(_config(tmp_path, models=[*TINY, "{name: typo, family: vgg, overrides: {layerz: [4]}}"]))


def test_the_default_has_two_sizes_of_each_family(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("rank", [f"output_dir={tmp_path}"])
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    families = pd.Series([model.family for model in config.models]).value_counts()
    assert set(families.index) == {"vgg", "resnet", "densenet", "vit"}
    assert (families >= 2).all()
    rank.check(config, [rank.settings(config, model, 0) for model in config.models])
