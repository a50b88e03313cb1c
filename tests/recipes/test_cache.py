"""What a kept result depends on: settings, versions, source, data; and that it is there as a whole or not at all."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.data.files import ImageFolder
from recipes.data.sources import Digits, Npz
from recipes.runtime import cache
from recipes.runtime.cache import is_kept, kept, kept_file, source_digest, stamped

CALLS = []


def work(settings, folder):
    CALLS.append(settings)
    if settings.get("fails"):
        raise KeyboardInterrupt
    return {"order": list(settings)}


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def test_a_result_is_computed_once_and_its_settings_keep_their_order(tmp_path):
    assert not is_kept({"b": 1, "a": 2}, work, tmp_path)
    assert kept({"b": 1, "a": 2}, work, tmp_path) == {"order": ["b", "a"]}
    assert is_kept({"a": 2, "b": 1}, work, tmp_path)
    assert kept({"a": 2, "b": 1}, work, tmp_path) == {"order": ["b", "a"]}
    assert len(CALLS) == 1
    assert kept_file({"b": 1, "a": 2}, tmp_path, ".pt") == kept_file({"a": 2, "b": 1}, tmp_path, ".pt")


def test_one_object_twice_is_no_other_setting_than_two_equal_ones(tmp_path):
    part = [1]
    assert kept_file({"a": part, "b": part}, tmp_path, "") == kept_file({"a": [1], "b": [1]}, tmp_path, "")


def test_what_was_interrupted_is_not_half_there(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        kept({"fails": True}, work, tmp_path)
    assert not is_kept({"fails": True}, work, tmp_path)
    assert not list(tmp_path.rglob("output.pkl"))


def test_a_result_that_cannot_be_read_is_computed_again(tmp_path, caplog):
    kept({"a": 1}, work, tmp_path)
    (path,) = tmp_path.rglob("output.pkl")
    path.write_bytes(path.read_bytes()[:-5])
    assert kept({"a": 1}, work, tmp_path) == {"order": ["a"]}
    assert "Exception while loading results" in caplog.text
    assert len(CALLS) == 2


def test_processes_that_begin_a_cache_at_once_lose_nothing(tmp_path):
    code = "import sys; from pathlib import Path; from recipes.runtime.cache import kept; from tests.recipes.test_cache"
    code += " import work; [kept({'n': n}, work, Path(sys.argv[1])) for n in range(10)]"
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert len(list(tmp_path.rglob("output.pkl"))) == 10
    assert not [path for path in tmp_path.rglob("*") if "thread" in path.name]


@pytest.fixture
def project(tmp_path, monkeypatch):
    files = {
        "recipes/__init__.py": "",
        "recipes/work.py": "def f():\n    from recipes.used import thing\n",
        "recipes/used/__init__.py": "import recipes.deep\n",
        "recipes/deep.py": "import numpy\n",
        "recipes/built.py": "class Network: ...\n",
        "recipes/report.py": "import recipes.work\n",
        "fisher_reg/__init__.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cache, "_ROOTS", {name: tmp_path / name for name in ("fisher_reg", "recipes")})
    cache._digest.cache_clear()
    yield tmp_path
    cache._digest.cache_clear()


@pytest.mark.parametrize(
    ("file", "counts"),
    [("work", True), ("used/__init__", True), ("deep", True), ("built", True), ("report", False)],
)
def test_a_change_of_the_source_counts_where_the_work_imports_or_builds_it(project, file, counts):
    settings = {"network": [{"_target_": "recipes.built.Network"}, {"_target_": "torch.nn.Linear"}]}
    before = source_digest("recipes.work", settings)
    path = project / "recipes" / f"{file}.py"
    path.write_text(path.read_text() + "x = 1\n")
    cache._digest.cache_clear()
    assert (source_digest("recipes.work", settings) != before) == counts


@pytest.mark.parametrize(
    ("module", "free_of"),
    [
        ("recipes.compare.training", {"recipes/compare/report.py", "recipes/competitors/measurement.py"}),
        ("recipes.compare.stages", {"recipes/compare/report.py", "recipes/compare/analysis.py"}),
        ("recipes.penalties.training", {"recipes/penalties/report.py", "recipes/penalties/study.py"}),
        ("recipes.rank.measuring", {"recipes/rank/agreement.py", "recipes/rank/study.py"}),
    ],
)
def test_the_work_of_a_study_does_not_depend_on_its_report_nor_on_how_it_is_run(module, free_of):
    files = {path.as_posix() for path in cache._closure((module,))}
    assert {"recipes/models/training.py", "recipes/data/base.py", "fisher_reg/estimate.py"} & files
    assert not (free_of | {f"recipes/runtime/{name}.py" for name in ("jobs", "engines", "progress")}) & files


def test_other_content_under_the_same_name_is_other_data(tmp_path):
    path = tmp_path / "data.npz"
    digests = []
    for value in (0, 1):
        np.savez(path, x=np.full(3, value))
        digests.append(Npz(str(path)).digest())
    assert digests[0] != digests[1]
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / split / "cat" / "a.png")
    before = ImageFolder(str(tmp_path)).digest()
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "cat" / "a.png")
    assert ImageFolder(str(tmp_path)).digest() != before
    assert Digits().digest() == Digits().digest()


def test_a_stamp_says_what_the_result_depends_on(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    data = {"_target_": "recipes.data.sources.Npz", "path": str(tmp_path / "a.npz")}
    stamp = stamped({"data": data}, work)["stamp"]
    assert stamp["work"] == "tests.recipes.test_cache.work"
    assert stamp["data"] == Npz(data["path"]).digest()
    assert {"torch", "fisher-reg", "source"} <= set(stamp)
