"""What makes an audit one that can be signed: who, what, when, how many, and of which guarantee."""

import copy
import hashlib
import json
import math
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf
from torch import nn
from torch.testing import assert_close

from recipes.evaluate.audit import median
from recipes.evaluate.identity import SCHEMA, digest_of_tensors
from recipes.evaluate.record import SCHEMA_FILE
from recipes.evaluate.study import evaluate
from recipes.runtime.command import composed
from tests.recipes.test_evaluate import SMALL, _npz

PGD = ["~attacks.auto_attack", "~attacks.carlini_wagner", "~attacks.minimal"]


BRIGHTNESS = ("model._target_=tests.recipes.test_evaluate.Brightness", "model.scale=4")


def _audit(folder, *arguments, model=BRIGHTNESS):
    path = folder / "grey.npz"
    if not path.exists():
        _npz(path, num_channels=1)
    small = [text for text in SMALL if "~" + ".".join(text.split(".")[:2]) not in arguments]
    settings = [*small, f"output_dir={folder}", "data=npz", f"data.path={path}", "~model"]
    return evaluate(composed("evaluate", [*settings, *model, *arguments]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    _audit(
        folder,
        "+attack@attacks.auto_pgd=auto_pgd",
        "attacks.auto_pgd.num_steps=2",
        "author=Ada",
        "hub_dataset=ada/grey",
        "thresholds={accuracy: {min: 0.99}, attacks.pgd.accuracy: {min: 0, max: 1}, lambda_p95: {max: 1000}}",
    )
    return folder


@pytest.fixture(scope="module")
def record(folder):
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_record_is_as_its_schema_says(record, validator):
    assert [error.message for error in validator.iter_errors(record)] == []
    assert record["schema"] == validator.schema["properties"]["schema"]["const"] == SCHEMA
    assert validator.schema["$id"].endswith(f":{SCHEMA.rpartition('/')[2]}")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema",), "fisher-reg/audit/2"),
        (("identity", "weights_sha256"), "abc"),
        (("identity", "date"), "yesterday"),
        (("identity", "author"), " "),
        (("numbers", "accuracy", "guarantee"), "proven"),
        (("numbers", "accuracy", "count"), -1),
        (("thresholds", 0, "verdict"), "maybe"),
        (("attacks", "pgd", "num_adversarial"), 0.5),
        (("images", "lambda"), ["large"]),
        (("unknown",), 1),
    ],
)
def test_a_wrong_record_is_told(record, validator, place, value):
    wrong = copy.deepcopy(record)
    node = wrong
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    assert not validator.is_valid(wrong)


def test_a_record_that_lacks_something_is_told(record, validator):
    for name in record:
        assert not validator.is_valid({key: value for key, value in record.items() if key != name}), name


def test_the_images_can_be_taken_again_from_their_indices_and_digest(folder, record):
    who = record["identity"]
    arrays = np.load(folder / "grey.npz")
    indices = who["image_indices"]
    assert len(indices) == len(set(indices)) == 9
    images = torch.from_numpy(arrays["x_test"][indices]).movedim(3, 1)
    labels = torch.from_numpy(arrays["y_test"][indices])
    assert record["images"]["label"] == labels.tolist()
    assert who["images_sha256"] == digest_of_tensors({"images": images, "labels": labels})
    other = digest_of_tensors({"images": images.flip(0), "labels": labels})
    assert who["images_sha256"] != other


def test_the_digest_of_weights_is_the_documented_one():
    weights = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3)}
    text = b"a\0torch.int64\0()\0" + np.int64(3).tobytes()
    text += b"b\0torch.float32\0(1, 2)\0" + np.array([1, 2], np.float32).tobytes()
    assert digest_of_tensors(weights) == hashlib.sha256(text).hexdigest()
    layer = nn.Linear(3, 2)
    moved = {name: value.t().contiguous().t() for name, value in layer.state_dict().items()}  # other strides
    assert digest_of_tensors(moved) == digest_of_tensors(layer.state_dict())
    assert digest_of_tensors(layer.half().state_dict()) != digest_of_tensors(moved)
    assert len(digest_of_tensors({"x": torch.ones(2, dtype=torch.bfloat16)})) == 64


def test_a_checkpoint_has_the_digest_of_its_file(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    model = [f"model._target_={__name__}.linear", f"checkpoint={tmp_path / 'model.pt'}"]
    who = _audit(tmp_path, *PGD, model=model)["identity"]
    assert who["checkpoint_sha256"] == hashlib.sha256((tmp_path / "model.pt").read_bytes()).hexdigest()
    assert who["weights_sha256"] == digest_of_tensors(network.state_dict())


def linear():
    """A network of one layer, for images of 8 x 8."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def test_the_page_says_who_has_made_the_audit_and_has_lines_to_sign_on(folder, record):
    who, page = record["identity"], (folder / "audit.html").read_text(encoding="utf-8")
    assert who["author"] == "Ada"
    assert who["reviewer"] is None
    assert "Author: <b>Ada</b>" in page
    assert "Reviewer: <b></b>" in page
    made = datetime.fromisoformat(who["date"])
    assert made.utcoffset().total_seconds() == 0
    assert made <= datetime.now(timezone.utc)
    for text in (who["date"], who["weights_sha256"], who["images_sha256"], record["provenance"]["commit"]):
        assert text in page
    assert ", ".join(map(str, who["image_indices"])) in page


def test_each_number_has_its_guarantee_and_says_from_how_many_images_it_is(record, folder):
    numbers = record["numbers"]
    expected = {
        "log10_bound_global": "certified",
        "log10_bound_local_median": "certified",
        "log10_bound_blockwise_median": "estimate",
        "lambda_median": "estimate",
        "clever_median": "estimate",
        "wide_interval_share": "probabilistic",
        "attacks.pgd.accuracy": "attack",
        "attacks.minimal.median_distance": "attack",
    }
    assert {name: numbers[name]["guarantee"] for name in expected} == expected
    assert numbers["clever_median"]["count"] == 1
    assert numbers["log10_bound_blockwise_median"]["count"] == 2
    assert numbers["accuracy"]["count"] == 9
    assert numbers["accuracy"]["interval"]["guarantee"] == "probabilistic"
    page = (folder / "audit.html").read_text(encoding="utf-8")
    for count in ("1 of 9", "2 of 9", "9 of 9"):
        assert f"<td>{count}</td>" in page


def test_the_statistics_of_lambda_are_those_of_the_images_and_inside_their_intervals(record):
    images, numbers = record["images"], record["numbers"]
    values = np.array(images["lambda"])
    expected = {
        "median": np.median(values),
        "mean": values.mean(),
        "p95": np.quantile(values, 0.95),
        "max": max(values),
    }
    for name, value in expected.items():
        number = numbers[f"lambda_{name}"]
        assert_close(number["value"], float(value), rtol=1e-9, atol=0)
        assert number["interval"]["low"] <= value <= number["interval"]["high"] < 1.1 * value
        assert number["interval"]["level"] == 0.98
    for low, value, high in zip(images["lambda_lower"], values, images["lambda_upper"], strict=True):
        assert low * (1 - 1e-4) <= value <= high * (1 + 1e-4)


def test_a_few_successes_do_not_make_an_attack_look_strong():
    few = torch.cat([torch.full((2,), 0.1), torch.full((14,), math.inf)]).double()
    many = torch.cat([torch.full((11,), 0.5), torch.full((5,), math.inf)]).double()
    assert median(few[:2])["value"] < median(many[:11])["value"]
    assert median(few)["value"] == math.inf > median(many)["value"] == 0.5
    assert (median(few[:2])["low"], median(few[:2])["high"]) == (0, math.inf)  # two numbers enclose no median at 95 %
    assert median(few[:0])["count"] == 0
    assert math.isnan(median(few[:0])["value"])
    line = torch.arange(1.0, 7.0).double()
    assert (median(line)["low"], median(line)["high"]) == (1, 6)  # 2 / 2^6 < 5 %


def test_the_attack_table_tells_how_many_of_how_many(folder, record):
    page = (folder / "audit.html").read_text(encoding="utf-8")
    for found in record["attacks"].values():
        misclassified, correct = np.array(found["misclassified"]), np.array(record["images"]["correct"])
        assert found["num_adversarial"] == (misclassified & correct).sum()
        assert f"{found['num_adversarial']} of {found['num_correct']}: " in page
        distances = np.where(misclassified, found["euclidean"], np.inf)[correct]
        middle = found["distance_of_all"]["value"]
        assert_close(math.inf if middle == "inf" else middle, float(np.median(distances)))
    assert "ooled" not in page


def test_the_scope_is_what_was_run(record, tmp_path):
    scope = record["scope"]
    text = "ProjectedGradient(norm=inf, epsilon=8/255, num_steps=3, step_size=2/255)"
    assert f"Attack pgd, in the ball ℓ∞ ≤ 8/255: {text}." in scope["covered"]
    assert record["attacks"]["pgd"]["attack"] == text
    assert "epsilon=0.5," in record["attacks"]["auto_attack"]["attack"]
    assert any("ℓ₁, ℓ₀" in line for line in scope["not_tested"])
    none = _audit(tmp_path, "~attacks.pgd", *PGD, "noise=0.1")
    assert "Attacks of any kind: no attack was configured." in none["scope"]["not_tested"]
    assert any("share of 0.1" in line for line in none["scope"]["covered"])
    assert none["numbers"]["masked_share"]["value"] is None
    validator = Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    assert validator.is_valid(none)


def test_the_hub_reads_both_files(folder, record):
    hub = pytest.importorskip("huggingface_hub")
    card = OmegaConf.to_container(OmegaConf.load(folder / "model_card.yaml"))
    results = hub.ModelCardData(**card).eval_results
    found = {result.metric_type: result for result in results}
    assert found["accuracy"].metric_value == record["accuracy"]["value"]
    assert found["accuracy"].metric_args["images"] == 9
    assert found["attacks.pgd.accuracy"].metric_args["guarantee"] == "attack"
    files = sorted(path.name for path in (folder / ".eval_results").iterdir())
    assert files == [
        "accuracy.yaml",
        "attacks_auto_attack_accuracy.yaml",
        "attacks_auto_pgd_accuracy.yaml",
        "attacks_pgd_accuracy.yaml",
    ]
    (entry,) = hub.parse_eval_result_entries(
        OmegaConf.to_container(OmegaConf.load(folder / ".eval_results" / files[3]))
    )
    assert (entry.dataset_id, entry.task_id) == ("ada/grey", "default")
    assert entry.value == record["attacks"]["pgd"]["accuracy"]["value"]
    assert "9 test images under pgd" in entry.notes


def test_who_and_where_must_mean_something(tmp_path):
    with pytest.raises(ValueError, match="author must be a name, or null"):
        _audit(tmp_path, "author=' '")
    with pytest.raises(ValueError, match="hub_dataset must be owner/name"):
        _audit(tmp_path, "hub_dataset=mnist")
