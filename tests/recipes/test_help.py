"""What ``python -m recipes.X --help`` says."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from recipes.runtime.command import CONF
from recipes.runtime.help import plain

ROOT = Path(__file__).parents[2]
RECIPES = [path.stem for path in sorted(CONF.glob("*.yaml")) if not path.stem.startswith(("benchmark_", "gpu_check_"))]
FILES = ["document", "summarize"]


def _module(recipe):
    folder = "penalties" if recipe == "compare_penalties" else recipe
    is_folder = (ROOT / "recipes" / folder).is_dir()
    return importlib.import_module(f"recipes.{folder}.study" if is_folder else f"recipes.{folder}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_says_what_a_recipe_does_what_it_leaves_and_how_long_it_takes(recipe, monkeypatch, tmp_path, capsys):
    module = _module(recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [recipe, "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    HydraConfig.instance().cfg = None
    shown = capsys.readouterr().out
    assert shown.startswith(plain(inspect.getdoc(module).splitlines()[0]))
    assert f"python -m recipes.{recipe}" in shown
    flat = " ".join(shown.split())
    for words in ("Writes ", "Takes ", "two CPU cores", "--hydra-help"):
        assert words in flat
    assert "``" not in shown
    assert "output_dir: ${hydra:runtime.output_dir}" in shown or recipe == "redraw"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", FILES)
def test_help_of_a_command_for_files_says_what_it_does_what_it_leaves_and_how_long_it_takes(recipe):
    command = [sys.executable, "-m", f"recipes.{recipe}", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True).stdout
    assert plain(inspect.getdoc(_module(recipe)).splitlines()[0]) in shown
    assert "Writes " in shown
    assert "Takes " in shown
