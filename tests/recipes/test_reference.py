"""What a value of λ means: the law, its error on other networks, and the place of a network among known ones."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

from recipes.evaluate.reference import FILE, comparison
from recipes.reference.prediction import fitted, held_out
from recipes.reference.study import errors, reference, undefended
from recipes.runtime.command import composed
from recipes.statistics.law import Law

RADII = {"near": 0.25, "far": 0.5}


def _examples(num_images=400, shift=0.0):
    """Return images that obey a law with a = 0.5 + shift of the second family and b = -2."""
    generator = np.random.default_rng(0)
    parts = []
    for model, offset in {"m0": 0.0, "m1": shift}.items():
        for dataset in ("d0", "d1"):
            for training, scale in {"standard": 10.0, "pgd": 1.0}.items():
                values = scale * 10 ** generator.normal(0, 0.5, num_images)
                frame = pd.DataFrame({"dataset": dataset, "model": model, "training": training, "seed": 0}, range(1))
                frame = frame.loc[[0] * num_images].reset_index(drop=True)
                frame = frame.assign(correct=generator.random(num_images) < 0.9, distance_minimal=values**-0.5)
                for metric in ("lambda", "lambda_tempered"):
                    frame[metric] = values
                for name, radius in RADII.items():
                    robust = generator.random(num_images) < expit(0.5 + offset - 2 * np.log10(values * radius**2))
                    frame[f"misclassified_{name}"] = ~(robust & frame.correct)
                parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def test_the_law_is_found_from_images_that_obey_it():
    law = fitted(_examples(4000), "lambda", RADII)
    assert law.intercept == pytest.approx(0.5, abs=0.05)  # three standard errors of 50,000 pairs
    assert law.slope == pytest.approx(-2, abs=0.06)
    assert Law(0.5, -2).survival(np.array([1.0]), 1.0) == pytest.approx(expit(0.5))
    assert Law(0.5, -2).survival(np.array([0.0]), 1.0) == pytest.approx(1.0)


def test_networks_that_obey_the_law_are_predicted_to_the_error_of_their_images():
    found = held_out(_examples(1000), "lambda", RADII, "model")
    assert len(found) == 8 * 2
    assert (found.predicted - found.observed).abs().max() < 4 * np.sqrt(0.25 / 1000)


def test_a_prediction_uses_nothing_of_the_family_that_is_left_out():
    """The second family has another law; were it used, both families would be missed by half of the difference."""
    plain, shifted = (held_out(_examples(1000, shift), "lambda", RADII, "model") for shift in (0.0, 2.0))
    second = shifted.model == "m1"
    assert shifted[second].predicted.to_numpy() == pytest.approx(plain[second].predicted.to_numpy(), abs=0.02)
    missed = (shifted.observed - shifted.predicted)[second]
    assert missed.mean() > 0.15
    by_group = errors(shifted)["lambda"]["model"]
    points = 100 * (shifted.predicted - shifted.observed).abs()
    assert by_group == {
        "mean": pytest.approx(points.mean(), abs=0.01),
        "p90": pytest.approx(points.quantile(0.9), abs=0.01),
    }


def test_the_undefended_networks_are_those_trained_plainly():
    found = undefended(_examples())
    assert set(found) == {"d0", "d1"}
    assert all(len(found["d0"][metric]) == 2 for metric in ("lambda", "lambda_tempered"))
    assert found["d0"]["lambda"] == sorted(found["d0"]["lambda"])
    assert min(found["d0"]["lambda"]) > 5  # the defended ones have a median of 1


@pytest.fixture
def folder(tmp_path):
    _examples().to_csv(tmp_path / "examples.csv.gz", index=False)
    attacks = {name: {"norm": 2, "epsilon": radius} for name, radius in RADII.items()}
    (tmp_path / "compare.json").write_text(json.dumps({"settings": {"attacks": attacks | {"minimal": {}}}}))
    return tmp_path


def test_the_command_leaves_its_files(folder, tmp_path):
    config = composed("reference", [f"folder={folder}", "attacks=[near,far]", f"output_dir={tmp_path / 'out'}"])
    record = reference(config)
    assert record["radii"] == RADII
    for suffix in ("csv", "json", "md", "png"):
        assert (tmp_path / "out" / f"reference.{suffix}").stat().st_size > 0
    assert "| λ_max at equal margins |" in (tmp_path / "out" / "reference.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["attacks=[minimal]"], ValueError, "must be some of the attacks in a Euclidean ball, near, far"),
        (["attacks=[]"], ValueError, "must be some of the attacks"),
        (["folder=nowhere"], FileNotFoundError, "has no examples.csv.gz"),
    ],
)
def test_what_cannot_be_done_is_refused(folder, tmp_path, changes, error, message):
    config = composed("reference", [f"folder={folder}", f"output_dir={tmp_path / 'out'}", *changes])
    with pytest.raises(error, match=message):
        reference(config)


def test_the_kept_reference_is_that_of_the_kept_comparison(tmp_path):
    config = composed("reference", [f"folder={FILE.parent / 'compare'}", f"output_dir={tmp_path}"])
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    record = json.loads(json.dumps(reference(config)))
    for name in ("radii", "errors", "undefended"):
        assert record[name] == kept[name]
    for metric, law in record["laws"].items():
        assert law == pytest.approx(kept["laws"][metric], rel=1e-3)


def _audit(values, correct, data):
    numbers = {metric: torch.tensor(values, dtype=torch.float64) for metric in ("lambda", "lambda_tempered")}
    measurement = SimpleNamespace(values=numbers)
    return SimpleNamespace(settings={"data": data}, measurement=measurement, correct=torch.tensor(correct))


def test_an_audit_says_its_place_among_undefended_networks_and_the_predicted_accuracy():
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    others = kept["undefended"]["digits"]
    value = (others["lambda"][2] + others["lambda"][3]) / 2  # between the third and the fourth of eight
    place, expected = comparison(_audit([value] * 4, [True, True, True, False], {"_target_": "recipes.data.Digits"}))
    tempered = sum(other > value for other in others["lambda_tempered"])
    assert f"the median λ ({value:.3g}) is smaller than that of 5 of the 8" in place
    assert f"at equal margins ({value:.3g}) is smaller than that of {tempered} of the 8" in place
    law = Law(**kept["laws"]["lambda_tempered"])
    for radius in (0.25, 0.5):
        share = 0.75 * float(law.survival(np.array([value]), radius)[0])
        assert f"{share:.0%} at a radius of {radius:g}" in expected
    assert f"mean error of this prediction is {kept['errors']['lambda_tempered']['model']['mean']:.0f}" in expected


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"_target_": "recipes.data.sources.TorchvisionArrays", "name": "CIFAR10"}, "on cifar10 "),
        ({"_target_": "recipes.data.sources.TorchvisionArrays", "name": "MNIST"}, "on mnist "),
        ({"_target_": "recipes.data.sources.Npz", "path": "images.npz"}, "no reference for these data"),
    ],
)
def test_an_audit_is_compared_on_its_own_data_alone(data, name):
    assert name in comparison(_audit([1.0], [True], data))[0]
