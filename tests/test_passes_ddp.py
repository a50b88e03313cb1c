import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passes")
    script = [sys.executable, "-m", "tests.passes_ddp", str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*_*.pt")}


@pytest.mark.parametrize("who", ["metric", "monitor"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_each_of_n_processes_does_an_nth_of_the_passes(saved, who, kind):
    assert set(saved) == {"1_0", "2_0", "2_1", "3_0", "3_1", "3_2"}
    alone = saved["1_0"][who][kind]
    assert alone >= 3 * 12  # of twelve batches
    for name, of_process in saved.items():
        num_processes = int(name[0])
        # an example that takes a step more or less costs its batch a pass
        assert abs(num_processes * of_process[who][kind] / alone - 1) < 0.15, name


def test_all_processes_have_the_numbers_of_one(saved):
    alone = saved["1_0"]
    assert len(alone["norms"]) == 48
    for of_process in saved.values():
        assert_close(of_process["norms"], alone["norms"], rtol=1e-5, atol=0)
        mine, theirs = of_process["history"], alone["history"]
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"step", "fisher/seconds"}:
            assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-6, msg=key)
