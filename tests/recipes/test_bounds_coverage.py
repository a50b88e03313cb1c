"""The recipe that counts the classifiers with a bound: its list of models, its files, and what it says of refusals."""

import json
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from recipes.bounds_coverage import (
    coverage,
    hugging_face,
    markdown,
    missing,
    narrowed,
    operation,
    shares,
    summary,
    varied,
)
from recipes.runtime.command import composed

CONF = Path(__file__).parents[2] / "conf"


class Bounded(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))


class Jumps(Bounded):
    """Something that no rule can bound."""

    def forward(self, x):
        return super().forward(torch.remainder(x, 0.3))


TINY = [
    f"{{library: tests, name: {kind.lower()}, size: 8, network: {{_target_: {__name__}.{kind}}}}}"
    for kind in ("Bounded", "Jumps", "NotThere")
]
ABSENT = "{library: no_such_library, name: absent, size: 8, network: {_target_: no_such_library.absent}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coverage")
    models = f"models=[{','.join([*TINY, ABSENT])}]"
    with redirect_stdout(StringIO()) as output:
        coverage(composed("bounds_coverage", [f"output_dir={folder}", models, "num_classes=3"]))
    said = "local 2 of 4. Violations: 0, in 2 models that have a bound and lambda. Not installed: 1."
    assert said in output.getvalue()
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return pd.read_csv(folder / "coverage.csv").set_index("model")


def test_a_model_with_rules_has_every_bound_and_none_below_its_eigenvalue(rows):
    row = rows.loc["bounded"]
    assert row.status == "global, local"
    assert row.local_log10 <= row.global_log10
    assert row.lambda_log10 <= row.global_log10
    assert row.num_violations == 0
    assert row[["global_refusal", "domain_refusal", "local_refusal", "domain_log10"]].isna().all()
    assert row.num_parameters == sum(parameter.numel() for parameter in Bounded(3).parameters())


def test_a_model_without_a_rule_says_which(rows):
    row = rows.loc["jumps"]
    assert row.status == "local"  # at an input the Jacobian says it all
    assert row.lambda_log10 > -20
    for level in ("global", "domain"):
        assert operation(row[f"{level}_refusal"]) == "remainder jumps"


def test_what_is_not_there_is_said_and_does_not_stop_the_rest(rows):
    assert rows.loc["absent"].status == "not installed"
    assert rows.loc["notthere"].status.startswith("not built: ")
    assert rows.loc[["absent", "notthere"]].num_violations.isna().all()


def test_the_other_files_hold_the_shares_the_refusals_and_the_versions(folder):
    result = json.loads((folder / "coverage.json").read_text(), parse_constant=pytest.fail)
    expected = {"models": 4, "not_installed": 1, "global": 1, "domain": 1, "local": 2, "compared": 2, "violations": 0}
    assert result["shares"] == expected
    assert {"torch", "torchvision", "timm", "transformers", "fisher-reg"} <= set(result["environment"])
    assert {item["operation"] for item in result["missing"]} == {"remainder jumps"}
    assert {item["models"] for item in result["missing"]} == {"tests jumps"}
    assert [item["model"] for item in result["models"]] == ["bounded", "jumps", "notthere", "absent"]
    page = (folder / "coverage.md").read_text(encoding="utf-8")
    assert "global 1 of 4" in page
    assert "| tests bounded | 8 |" in page
    assert "| not installed |" in page


def test_the_list_has_eighty_models_of_three_libraries(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("bounds_coverage", [f"output_dir={tmp_path}"])
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert Counter(entry.library for entry in config.models) == {"torchvision": 22, "timm": 50, "transformers": 8}
    assert len({(entry.library, entry.name) for entry in config.models}) == 80


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ("No bound rule for the function einsum at 'a.b' (or it has hooks, …", "the function einsum"),
        ("At 'a': No bound rule for Unfold at 'a' (or", "Unfold"),
        ("'mul_3' (mul) combines two values that depend on the input, which has no", "mul combines two values that "
         "depend on the input"),
        ("Dot-product attention has no global Lipschitz constant on an unbounded domain, and there is no layer norm",
         "Dot-product attention has no global Lipschitz constant on an unbounded domain"),
        ("'pad' (pad) pads with copies; use a padding module, which has a rule.", "pad pads with copies"),
        ("Net cannot be traced. torch.fx: x (net.py, line 3) torch.export: y", "tracing"),
    ],
)  # fmt: skip
def test_a_refusal_is_named_without_its_place(refusal, expected):
    assert operation(refusal) == expected


def _row(model, status="no bound", **fields):
    empty = {f"{level}_{key}": None for level in ("global", "domain", "local") for key in ("log10", "refusal")}
    row = {"library": "a", "model": model, "image_size": 8, "num_parameters": 1.0, "status": status, "seconds": 1.0}
    return row | {"lambda_log10": 0.0, "lambda_refusal": None, "num_violations": 0} | empty | fields


def test_shares_and_refusals_are_counted():
    einsum, unfold = "No bound rule for the function einsum at 'x'", "No bound rule for Unfold at 'y'"
    frame = pd.DataFrame(
        [
            _row("m", "global, local", global_log10=1.0, local_log10=1.0),
            _row(
                "n",
                "domain",
                lambda_log10=None,
                lambda_refusal="ValueError: no",
                global_refusal=einsum,
                domain_log10=2.0,
                local_refusal=unfold,
            ),
            _row("o", global_refusal=unfold, domain_refusal=unfold, local_refusal=einsum, num_violations=2),
            _row("p", global_refusal=einsum, domain_refusal=einsum, local_refusal=einsum),
        ]
    )
    expected = {"models": 4, "not_installed": 0, "global": 1, "domain": 2, "local": 1, "compared": 1, "violations": 2}
    assert shares(frame) == expected
    assert "with a domain 2 of 4" in summary(frame)
    found = missing(frame)
    assert list(found[found.level == "global"].operation) == ["the function einsum", "Unfold"]
    assert list(found[found.level == "global"].models) == ["a n, a p", "a o"]
    assert list(found[found.level == "local"]["count"]) == [2, 1]
    page = markdown(frame)
    assert "| local | the function einsum | 2 | a o, a p |" in page
    assert "| the function einsum; λ: ValueError: no |" in page


def test_constants_are_drawn_and_batch_norms_see_the_images():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    nn.init.zeros_(network[3].weight)
    kept = network[0].weight.clone()
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    assert not varied(network, images).training
    assert torch.equal(network[0].weight, kept)
    assert network[3].weight.std() > 0
    assert network[1].weight.std() > 0
    torch.testing.assert_close(network[1].running_mean, network[0](images).mean((0, 2, 3)))
    assert network[1].momentum == 0.1


def test_wide_classifiers_are_narrowed():
    wide = nn.Sequential()
    wide.classifier = nn.Sequential(nn.Linear(6, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.Linear(4096, 1000))
    layers = narrowed(wide, width=5, num_classes=3).classifier
    sizes = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    assert sizes == [(6, 5), (5, 5), (5, 3)]
    assert isinstance(layers[1], nn.ReLU)


def test_classifiers_of_transformers_return_logits():
    pytest.importorskip("transformers")
    network = hugging_face("ResNet", num_classes=4, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, 4)
