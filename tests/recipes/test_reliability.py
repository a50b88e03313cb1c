import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from fisher_reg import Exact
from recipes.reliability.spectra import KINDS, Diagonal, interval_rows, ritz_rows
from recipes.reliability.study import as_markdown, reliability

ROOT = Path(__file__).parents[2]
SMALL = [
    "num_spectra=40",
    "num_batches=2",
    "num_outputs=12",
    "failure_probabilities=[0.1]",
    "num_ritz_values=20",
    "num_images=2",
    "num_models=6",
    "num_queried=2",
]


def test_the_campaign_leaves_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.reliability.solvers._NUM_STEPS", 1)
    monkeypatch.setattr("recipes.reliability.blackbox._NUM_STEPS", 1)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        tables = reliability(compose("reliability", [*SMALL, f"output_dir={tmp_path}"]))
    assert set(tables) == {"interval", "ritz", "solvers", "black_box"}
    assert (tmp_path / "reliability.md").read_text() == as_markdown(tables)
    kept = json.loads((tmp_path / "reliability.json").read_text())
    assert kept["config"]["num_spectra"] == 40
    kinds = {row["models"] for row in kept["tables"]["solvers"]}
    assert {"24 networks", "linear, Gaussian", "decoupled classes", "multi-label heads"} <= kinds
    assert all(row["of these converged"] == 0 for row in kept["tables"]["solvers"])


def test_promises_are_kept_on_every_kind_of_spectrum():
    rows = interval_rows(num_spectra=2000, size=30, num_batches=10, probabilities=[0.3], seed=1)
    assert len(rows) == 2 * len(KINDS)
    for row in rows:
        # 200 spectra and ten random vectors: two standard errors of the share are 6 %
        assert row["observed"] <= 0.36
        assert row["lower end above"] == 0
    assert any(row["observed"] > 0 for row in rows)


def test_ritz_values_are_counted_against_the_truth():
    for row in ritz_rows(num_values=40, seed=0):
        assert row["above λ by more than 10 roundings"] == row["lower ends above λ"] == 0


def test_a_diagonal_operator_has_the_squares_of_its_roots():
    operator = Diagonal(torch.tensor([[1.0, 3.0, 2.0]]), torch.ones(1, 3))
    assert Exact().solve(operator).eigenvalue.item() == pytest.approx(9.0)


def test_the_kept_tables_say_what_the_readme_says():
    text = (ROOT / "recipes" / "results" / "reliability.md").read_text(encoding="utf-8")
    kept = json.loads((ROOT / "recipes" / "results" / "reliability.json").read_text(encoding="utf-8"))
    assert text == as_markdown(kept["tables"])
