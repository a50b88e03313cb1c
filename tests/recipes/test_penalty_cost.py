import pandas as pd
import pytest

from recipes.penalty_cost import mean_of_medians, penalty_cost
from recipes.runtime.command import composed


def test_the_cost_of_a_method_is_measured_beside_the_plain_step(tmp_path):
    kept = ("none", "default", "spectral", "pgd_3")
    dropped = ("kl", "kl_quarter_of_batch", "spectral_3_steps", "trace", "label_contrast", "bound")
    dropped += ("jacobian", "vat", "input_gradient", "few_per_cent", "kl_every_5th", "kl_half_of_batch", "kl_linf")
    dropped += ("gradient_norm", "nuclear_norm")
    small = ["num_rounds=1", "num_cycles=1", "~networks.ResNet", "~networks.DenseNet", "data=digits"]
    small += [f"output_dir={tmp_path}", "~data.num_digits", *(f"~methods.{name}" for name in dropped)]
    penalty_cost(composed("penalty_cost", small))
    frame = pd.read_csv(tmp_path / "penalty_cost.csv")
    assert set(frame.network) == {"VGG", "ViT"}
    assert list(frame.method[:4]) == list(kept)
    assert (frame[frame.method == "none"][["ratio", "memory_ratio"]] == 1).all(axis=None)
    assert (frame[frame.method == "spectral"].memory_ratio > 1.2).all()
    assert "| default |" in (tmp_path / "penalty_cost.md").read_text()


def test_a_cycle_costs_the_mean_of_its_places():
    rounds = [[4.0, 1.0, 1.0, 6.0, 1.0, 2.0], [5.0, 1.0, 1.0]]
    assert mean_of_medians(rounds, 3) == pytest.approx((5 + 1 + 1) / 3)
    assert mean_of_medians([[1.0, 2.0, 9.0]], 1) == 2.0
