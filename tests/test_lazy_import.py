"""The package without Lightning and torchmetrics: they are imported when a name that needs them is asked for."""

import ast
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import typing
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import fisher_reg
from fisher_reg.lazy import lazy_names

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("hydra", "lightning", "lightning_fabric", "lightning_utilities", "matplotlib", "numpy.testing", "pandas"),
    *("pytorch_lightning", "scipy", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp"),
    *("torchmetrics", "torchvision", "transformers"),
}

LOADED = f"""
import json, sys, torch
already = set(sys.modules)
import fisher_reg
found = lambda: sorted({HEAVY} & (set(sys.modules) - already))
steps = {{"import": found()}}
dir(fisher_reg)
steps["dir"] = found()
network, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
network(x).backward(torch.ones(2, 3))  # for which torch itself imports sympy
already |= {{name for name in sys.modules if name.partition(".")[0] == "sympy"}}
fisher_reg.fisher_spectral_norm(network, x)
steps["estimate"] = found()
fisher_reg.KLPenalty()(network, x).backward()
steps["penalty"] = found()
fisher_reg.check_model(network, x)
steps["check"] = found()
fisher_reg.local_fisher_bound(network, x)
steps["bound"] = found()
fisher_reg.FisherTrace()
steps["metric"] = found()
print(json.dumps(steps))
"""

IN_A_NEW_PROCESS = """
from hydra.utils import get_class
found = get_class("fisher_reg.FisherMonitor")
import fisher_reg
assert found is fisher_reg.FisherMonitor is vars(fisher_reg)["FisherMonitor"]
names = {}
exec("from fisher_reg import *", names)
assert set(fisher_reg.__all__) <= set(names)
print("as expected")
"""


def _output_of(script):
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_plain_torch_needs_neither_lightning_nor_torchmetrics():
    steps = json.loads(_output_of(LOADED))
    without = {"import": [], "dir": [], "estimate": [], "penalty": [], "check": [], "bound": []}
    assert {name: steps[name] for name in without} == without
    assert "torchmetrics" in steps["metric"]  # so that the list can be anything but empty


def test_names_come_by_hydra_by_attribute_and_by_star():
    pytest.importorskip("hydra")
    assert _output_of(IN_A_NEW_PROCESS) == "as expected"


def test_every_public_name_is_there_and_listed():
    assert all(hasattr(fisher_reg, name) for name in fisher_reg.__all__)
    assert set(fisher_reg.__all__) <= set(dir(fisher_reg))
    assert dir(fisher_reg) == sorted(set(dir(fisher_reg)))
    assert len(fisher_reg.__all__) == len(set(fisher_reg.__all__))


def test_what_is_imported_late_is_what_type_checkers_see():
    """The names under TYPE_CHECKING and those of ``lazy_names`` are written twice."""
    tree = ast.parse(inspect.getsource(fisher_reg))
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {part.module.partition(".")[2]: {alias.name for alias in part.names} for part in branch.body}
    (call,) = (node for node in ast.walk(branch.orelse[0]) if isinstance(node, ast.Call))
    late = {module: set(names) for module, names in ast.literal_eval(call.args[1]).items()}
    assert late == seen


def test_a_wrong_name_is_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="^module 'fisher_reg' has no attribute 'FisherMonitr'"):
        _ = fisher_reg.FisherMonitr
    with pytest.raises(ImportError, match="cannot import name 'FisherMonitr' from 'fisher_reg'"):
        exec("from fisher_reg import FisherMonitr")


def test_a_late_name_is_imported_once(tmp_path, monkeypatch):
    package = tmp_path / "late_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inside.py").write_text("class Late:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("late_package")
    get, names = lazy_names("late_package", {"inside": ("Late",)})
    assert {"Late", "inside"} <= set(names())
    assert "late_package.inside" not in sys.modules
    assert get("Late") is module.Late
    assert get("inside") is module.inside
    with pytest.raises(AttributeError, match="module 'late_package' has no attribute 'late'"):
        get("late")


@pytest.mark.parametrize("name", ["FisherSpectralNorm", "FisherTrace", "LinearSchedule"])
def test_late_classes_can_be_pickled_and_have_type_hints(name):
    kind = getattr(fisher_reg, name)
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert isinstance(pickle.loads(pickle.dumps(kind())), kind)
    assert typing.get_type_hints(kind.__init__)


def test_the_version_is_that_of_the_distribution_or_unknown(monkeypatch):
    assert fisher_reg.__version__ == importlib.import_module("fisher_reg.version").__version__

    def missing(name):
        raise PackageNotFoundError(name)

    module = importlib.import_module("fisher_reg.version")
    before = module.__version__
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", missing)
        assert importlib.reload(module).__version__ == "0+unknown"
    assert importlib.reload(module).__version__ == before
