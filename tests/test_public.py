"""What is public is named in one table, which the modules keep to."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fisher_reg
from fisher_reg import Exact, InputFisher, deployed, evaluation_operator, fisher_spectral_norm
from fisher_reg.penalty import PointPenalty, squared_length

ROOT = Path(__file__).parents[1]
ARCHITECTURE = Path(fisher_reg.__file__).with_name("ARCHITECTURE.md").read_text()


def _public():
    """Return the names of each module in the table; None for all in its ``__all__``."""
    rows = re.findall(r"^\| `(fisher_reg[\w.]*)` \|[^|]*\| (.*) \|$", ARCHITECTURE, re.MULTILINE)
    return {module: None if names == "all" else re.findall(r"`(\w+)`", names) for module, names in rows}


PUBLIC = _public()


def test_the_table_is_read():
    assert {"fisher_reg", "fisher_reg.penalty", "fisher_reg.evaluation"} <= set(PUBLIC)
    assert "deployed" in PUBLIC["fisher_reg.evaluation"]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_says_so_and_has_its_names(name):
    module = importlib.import_module(name)
    assert name == "fisher_reg" or "\nPublic: " in module.__doc__
    names = PUBLIC[name] or module.__all__
    assert set(names) <= set(module.__all__)
    for each in names:
        value = getattr(module, each)
        has_docstring = inspect.isroutine(value) or inspect.isclass(value)  # a union or a callable type has none
        assert not has_docstring or inspect.getdoc(value), f"{name}.{each} has no docstring"


def test_what_an_estimate_is_made_from_can_be_used_alone():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3)), torch.randn(5, 4)
    function = deployed(network, x)
    assert_close(function(x), network.eval()(x))
    with evaluation_operator(network, x) as fisher:
        assert isinstance(fisher, InputFisher)
        result = Exact().solve(fisher)
        vector = result.eigenvector.flatten(1)
        assert_close(fisher.mv(vector), result.eigenvalue[:, None] * vector, rtol=1e-4, atol=1e-6)
    assert_close(result.eigenvalue, fisher_spectral_norm(network, x, solver=Exact()).eigenvalue)


class _Slope(PointPenalty):
    differentiates_twice = True

    def at(self, point, *, labels=None, generator=None):
        cotangent = torch.zeros_like(point.logits)
        cotangent[:, 0] = 1.0
        return squared_length(point.fisher(fisher_reg.Categorical(), None), cotangent).mean()


def test_a_penalty_of_your_own_needs_public_names_only():
    network = nn.Linear(4, 3)
    penalty = _Slope()(network, torch.randn(5, 4))
    assert_close(penalty, network.weight[0].square().sum())
    penalty.backward()
    assert_close(network.weight.grad[0], 2 * network.weight.detach()[0])


RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.py"))


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_imports_public_names_alone(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        assert not (isinstance(node, ast.Import) and any(name.name.startswith("fisher_reg.") for name in node.names))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fisher_reg":
            assert node.module in PUBLIC, f"{path}:{node.lineno}"
            public = PUBLIC[node.module] or importlib.import_module(node.module).__all__
            assert {name.name for name in node.names} <= set(public), f"{path}:{node.lineno}"


def test_the_page_of_names_has_all_of_them_and_no_other():
    page = Path(fisher_reg.__file__).with_name("API.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ((?:`[^`]*`(?:, )?)+) \|", page, re.MULTILINE)
    first = {re.match(r"\w+", text)[0] for cell in cells for text in re.findall(r"`([^`]+)`", cell)}
    arguments = {"result", "likelihood", "memory_budget", "input_std", "generator"}
    assert first - arguments <= set(fisher_reg.__all__)
    missing = {name for name in fisher_reg.__all__ if not re.search(rf"\b{name}\b", page)}
    assert not missing
