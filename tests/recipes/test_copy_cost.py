import subprocess
import sys

import pandas as pd


def test_the_copy_is_measured_beside_the_estimate(tmp_path):
    command = [sys.executable, "-m", "recipes.copy_cost", f"hydra.run.dir={tmp_path}", "image_size=32", "num_images=2"]
    small = ["num_rounds=1", "~networks.vit_b_16", "~networks.densenet121"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = pd.read_csv(tmp_path / "copy_cost.csv").to_dict("records")
    assert row["network"] == "resnet50"
    assert 0 < row["copied_mb"] < 0.01 * row["model_mb"]
    assert row["share"] > 0
    assert (tmp_path / "copy_cost.json").exists()
