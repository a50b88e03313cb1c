"""The study of whether a penalty means the same on other images, at a tiny size."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from fisher_reg import KLPenalty
from recipes.penalty_scale import chosen_penalty, methods, penalty_scale, plan
from recipes.runtime.command import composed

ROOT = Path(__file__).parents[2]
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def test_each_network_is_attacked_with_the_length_that_its_data_suggest(tmp_path):
    small = ["~models.ViT", "seeds=[0]", "epochs={digits_8: 1, digits_16: 1}", "num_attacked=16", "num_attack_steps=2"]
    small += ["num_probes=8", "+trainer.limit_train_batches=3", f"cache_dir={tmp_path}/cache"]
    penalty_scale(composed("penalty_scale", [f"output_dir={tmp_path}", *small]))
    frame = pd.read_csv(tmp_path / "penalty_scale.csv")
    assert list(frame.method) == ["none", "default", "from_batch"] * 2
    own = frame[frame.method == "from_batch"].set_index("data")
    assert (own.step == own.radius).all()
    assert own.step["digits_16"] > 1.3 * own.step["digits_8"]
    assert (tmp_path / "penalty_scale.md").read_text().count("\n") == 2 + 6
    assert "digits_8" in json.loads((tmp_path / "penalty_scale.json").read_text())["datasets"]


def test_the_factor_of_the_divergence_is_the_same_in_both_methods():
    compared = methods(KLPenalty(step=0.125))
    assert compared["none"] is None
    for name in ("default", "from_batch"):
        step = compared[name]["penalty"]["step"]
        assert 2 * compared[name]["weight"] / step**2 == pytest.approx(0.8)


def test_the_experiment_composes_and_its_runs_differ_by_data_set(tmp_path):
    arrays = {name: np.random.default_rng(0).integers(0, 3, 80 if name[0] == "y" else (80, 8, 8)) for name in _ARRAYS}
    np.savez(tmp_path / "m.npz", **{name: array.astype(np.uint8) for name, array in arrays.items()})
    overrides = ["experiment=penalty_scale/three", f"mnist={tmp_path}/m.npz", "cifar10=c.npz", "output_dir=x"]
    overrides += ["datasets.mnist_28.num_train=80"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("penalty_scale", overrides)
    runs = plan(config, dict.fromkeys(config.datasets, KLPenalty(step=0.1)))
    assert len(runs) == 3 * 6 * 2 * 3
    assert {name for name, _ in runs} == {
        *("digits_8", "digits_16", "mnist_16", "mnist_28", "cifar10_16", "cifar10_32")
    }
    assert chosen_penalty(config, config.datasets.digits_8).step == pytest.approx(0.0842, rel=0.05)
    assert chosen_penalty(config, config.datasets.mnist_28).step > 0
