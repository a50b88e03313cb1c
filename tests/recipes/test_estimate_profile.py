import pandas as pd
import pytest

from recipes.estimate_profile import estimate_profile, kind_of
from recipes.runtime.command import composed


def test_passes_and_operations_of_an_estimate_are_taken_apart(tmp_path):
    cases = "cases=[{name: VGG, network: vgg, data: {num_digits: 1, num_train: 64}}]"
    small = [cases, "num_images=4", "num_rounds=1"]
    estimate_profile(composed("estimate_profile", [f"output_dir={tmp_path}", *small]))
    passes = pd.read_csv(tmp_path / "estimate_passes.csv").set_index("pass")
    steps = passes.loc[["backward pass", "difference quotient"], "calls"]
    assert (steps >= 2).all()
    assert passes.loc["everything", "forwards"] > 1
    operations = pd.read_csv(tmp_path / "estimate_operations.csv").set_index("operation")
    assert operations.share.sum() == pytest.approx(1, abs=0.01)
    assert (operations.loc[["convolution", "convolution, backward", "pooling"], "share"] > 0).all()
    assert "| everything |" in (tmp_path / "estimate_profile.md").read_text()
    assert (tmp_path / "estimate_profile.json").exists()


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution, backward"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention, backward"),
        ("aten::addmm", "matrix product"),
        ("aten::native_layer_norm", "normalisation"),
        ("aten::max_pool2d_with_indices", "pooling"),
        ("aten::fill_", "copy and fill"),
        ("aten::gelu", "other"),
    ],
)
def test_an_operation_has_its_kind(operation, kind):
    assert kind_of(operation) == kind
