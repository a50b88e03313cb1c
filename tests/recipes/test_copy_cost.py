import pandas as pd

from recipes.copy_cost import copy_cost
from recipes.runtime.command import composed


def test_the_copy_is_measured_beside_the_estimate(tmp_path):
    small = ["image_size=32", "num_images=2", "num_rounds=1", "~networks.vit_b_16", "~networks.densenet121"]
    copy_cost(composed("copy_cost", [f"output_dir={tmp_path}", *small]))
    (row,) = pd.read_csv(tmp_path / "copy_cost.csv").to_dict("records")
    assert row["network"] == "resnet50"
    assert 0 < row["copied_mb"] < 0.01 * row["model_mb"]
    assert row["share"] > 0
    assert (tmp_path / "copy_cost.json").exists()
