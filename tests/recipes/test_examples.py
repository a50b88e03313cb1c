import math
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ("plain_loop", "fabric", "accelerate_loop", "hugging_face")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_penalty_of_an_example_lowers_what_it_prints(name, capsys):
    main = import_module(f"recipes.examples.{name}").main
    plain = main(weight=0.0, num_epochs=2)
    penalised = main(num_epochs=2)
    assert len(plain) == len(penalised) == 2
    assert all(math.isfinite(value) and value > 0 for value in plain + penalised)
    assert penalised[-1] < 0.75 * plain[-1]
    assert f"epoch 1: mean λ {penalised[-1]:.3g}" in capsys.readouterr().out


def test_the_readme_links_the_examples():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in EXAMPLES:
        assert f"(recipes/examples/{name}.py)" in readme
