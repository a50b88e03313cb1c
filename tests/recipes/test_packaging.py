"""What a user gets who installs the wheel and has no clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    pytest.importorskip("hatchling", reason="builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("fisher_reg", "recipes", "conf", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_the_recipes_with_all_configurations_and_of_results_what_audits_read(unpacked):
    for folder, inside in (("conf", "recipes/conf"), ("recipes", "recipes"), ("fisher_reg", "fisher_reg")):
        wanted = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()}
        wanted = {
            path
            for path in wanted
            if path.suffix in (".html", ".json", ".py", ".yaml", ".typed") and path.parts[0] != "results"
        }
        found = {path.relative_to(unpacked / inside) for path in (unpacked / inside).rglob("*") if path.is_file()}
        assert wanted - found == set()
    assert not (unpacked / "tests").exists()
    assert not (unpacked / "conf").exists()
    assert [path.name for path in (unpacked / "recipes" / "results").iterdir()] == ["reference.json"]


def test_a_recipe_of_the_wheel_starts_in_any_folder(unpacked, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    show = "from recipes.runtime.command import CONF, composed; print(CONF, composed('train', ['experiment=smoke']))"
    done = subprocess.run(
        [sys.executable, "-c", show], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(unpacked / "recipes" / "conf") in done.stdout
    assert "'limit_train_batches': 6" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "recipes.train", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "penalty: bound, gradient_norm" in done.stdout
