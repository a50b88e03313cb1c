import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.runtime.jobs import execute

ROOT = Path(__file__).parents[2]


def _square(run, folder=None):
    if folder is not None:
        (folder / str(run["x"])).write_text(str(os.getpid()))
        time.sleep(run.get("seconds", 0))
    if run["x"] < 0:
        raise ValueError("negative")
    return {"y": run["x"] ** 2}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_run_comes_back_with_its_own_result(num_processes):
    runs = [{"x": x} for x in range(5)]
    found = list(execute("squares", runs, _square, describe=str, num_processes=num_processes))
    assert sorted((run["x"], result["y"]) for run, result in found) == [(x, x * x) for x in range(5)]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_failure_is_raised(num_processes):
    with pytest.raises(ValueError, match="negative"):
        list(execute("squares", [{"x": 1}, {"x": -1}], _square, describe=str, num_processes=num_processes))


def test_workers_end_with_the_process_that_started_them(tmp_path):
    code = (
        "from functools import partial\n"
        "from tests.recipes.test_jobs import Path, _square, execute\n"
        "if __name__ == '__main__':\n"
        f"    work = partial(_square, folder=Path({str(tmp_path)!r}))\n"
        "    list(execute('slow', [{'x': x, 'seconds': 600} for x in range(4)], work, describe=str, num_processes=2))\n"
    )
    (tmp_path / "slow.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "slow.py")], env=environment, cwd=ROOT)
    workers = _eventually(lambda: [int(text) for n in "01" if (text := _read(tmp_path / n))], length=2)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _eventually(lambda: [worker for worker in workers if not _is_alive(worker)], length=2)


def _read(path):
    return path.read_text() if path.is_file() else ""


def _is_alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _eventually(look, length):
    deadline = time.monotonic() + 120
    while len(found := look()) < length:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found
