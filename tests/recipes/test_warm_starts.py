import pandas as pd

from recipes.runtime.command import composed
from recipes.warm_starts import warm_starts


def test_every_search_is_counted_and_compared_with_the_exact_eigenvalue(tmp_path):
    short = ["~model@networks.vit", "trainer.max_epochs=2", "num_images=24"]
    warm_starts(composed("warm_starts", [f"output_dir={tmp_path}", *short]))
    rows = pd.read_csv(tmp_path / "warm_starts.csv")
    assert list(rows[rows.epoch == 1].search) == ["cold", "cold, 1 step", "warm", "warm, 1 step", "perfect"]
    certified = rows[rows.search.isin(["cold", "warm", "perfect"])]
    assert (certified.error_max < 0.05).all()
    # one graph, two backward passes, two quotients; more only where an exact derivative replaces a quotient
    assert rows[rows.search == "cold, 1 step"].passes.between(5, 9).all()
    assert (tmp_path / "warm_starts.json").exists()
