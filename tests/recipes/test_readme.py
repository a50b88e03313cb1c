"""What the README and the page of results say: tables, links, commands, and every block of Python."""

import re
import shlex
from pathlib import Path

import pytest

from recipes.document import TABLES, updated
from recipes.runtime.command import CONF, composed

ROOT = Path(__file__).parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "recipes" / "results" / "README.md"
API = ROOT / "fisher_reg" / "API.md"
DOCUMENTS = [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in (README, RESULTS, API)]
TEXTS = {path: path.read_text(encoding="utf-8") for path in (README, RESULTS, API)}


def _blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[path], re.DOTALL | re.MULTILINE)


def _commands():
    """Return the arguments of each command of a recipe, in an indented block or in backticks."""
    for path, text in TEXTS.items():
        lines = re.sub(r" *\\\n\s*", " ", text)
        for found in re.finditer(r"python -m recipes\.(\w+)([^\n`&]*)", lines):
            words = shlex.split(found[2].split("#")[0].split("  ")[0])
            yield pytest.param(found[1], words, id=f"{path.parent.name}: {found[0][10:60].strip()}")


def test_the_readme_is_read_in_five_minutes():
    assert len(TEXTS[README].splitlines()) <= 150


@pytest.mark.parametrize("path", DOCUMENTS)
def test_the_tables_are_those_of_the_kept_files(path):
    assert updated(TEXTS[path]) == TEXTS[path]


def test_every_table_has_a_place():
    shown = [name for text in TEXTS.values() for name in re.findall(r"<!-- (\w[\w ]*) -->", text)]
    assert sorted(shown) == sorted(TABLES)


def test_a_table_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="no table 'speed'"):
        updated("<!-- speed -->\nold\n<!-- /speed -->")


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_link_leads_to_a_file_or_a_section(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[path]):
        name, _, section = target.partition("#")
        if not name.startswith("http"):
            file = path.parent / name if name else path
            assert file.exists(), target
            assert not section or f"\n## {section}\n" in file.read_text(encoding="utf-8"), target


@pytest.mark.parametrize(("recipe", "words"), _commands())
def test_every_command_is_known(recipe, words):
    if not (CONF / f"{recipe}.yaml").is_file():
        assert (ROOT / "recipes" / f"{recipe}.py").is_file()
        return
    if "--config-name" in words:
        place = words.index("--config-name")
        recipe = words[place + 1]
        del words[place : place + 2]
    sweep = "-m" in words
    words = [word.split(",")[0] if sweep else word for word in words if not word.startswith("-")]
    if not any(word.startswith(("run=", "resume=", "hydra/")) for word in words):
        composed(recipe, words)


def test_the_first_number_of_the_readme_is_the_one_it_prints(capsys):
    block = _blocks(README, "python")[0]
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed, promised = (_numbers(text) for text in (capsys.readouterr().out, _blocks(README, "text")[0]))
    assert len(printed) == len(promised) == 2
    for row, wanted in zip(printed, promised, strict=True):
        assert row[:4] == pytest.approx(wanted[:4], rel=0.02)  # other processors round otherwise


def _numbers(text):
    """Return the numbers in the rows of a printed estimate; the residuals are round-off."""
    return [[float(cell) for cell in line.split()[:5]] for line in text.splitlines() if line.split()[0].isdigit()]


@pytest.mark.parametrize(
    ("path", "number"),
    [
        pytest.param(path, number, id=f"{path.relative_to(ROOT).as_posix()}-{number}")
        for path in (README, RESULTS, API)
        for number in range(1 if path == README else 0, len(_blocks(path, "python")))
    ],
)
def test_every_block_of_python_runs(path, number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(_blocks(path, "python")[number], path.name, "exec"), {"__name__": "block"})
    assert capsys.readouterr().out
