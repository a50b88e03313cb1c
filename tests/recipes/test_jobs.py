"""Work in several processes: with joblib's own workers, with Dask, with Ray; killed, interrupted, and kept."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from recipes.runtime.cache import stamped
from recipes.runtime.engines import Dask, Local, Ray
from recipes.runtime.jobs import Workers, execute

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DASK_DISTRIBUTED__WORKER__DAEMON": "False",
}


def square(run, folder):
    (folder / f"pid_{run['x']}").write_text(str(os.getpid()))
    time.sleep(run.get("seconds", 0))
    if run["x"] < 0:
        raise ValueError("negative")
    return {"y": run["x"] ** 2}


def train(run, folder):
    """A tiny network, whose weights depend on every bit of its seed, data and threads."""
    (folder / f"pid_{run['seed']}").write_text(str(os.getpid()))
    torch.manual_seed(run["seed"])
    network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
    optimizer = torch.optim.Adam(network.parameters())
    for _ in range(run["num_steps"]):
        optimizer.zero_grad()
        network(torch.randn(512, 64)).square().mean().backward()
        optimizer.step()
    return {"weights": [parameter.tolist() for parameter in network.parameters()], "threads": torch.get_num_threads()}


def _trained(workers, folder, num_steps=5):
    runs = [{"seed": seed, "num_steps": num_steps} for seed in range(3)]
    found = execute("networks", [stamped(run, train) for run in runs], train, workers, str, folder)
    return [result for _, result in sorted(found)]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_run_comes_back_with_its_place(tmp_path, num_processes):
    runs = [{"x": x} for x in range(5)]
    found = list(execute("squares", runs, square, Workers(Local(), num_processes), str, tmp_path))
    assert sorted((place, result["y"]) for place, result in found) == [(x, x * x) for x in range(5)]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_failure_is_raised_and_what_is_finished_is_kept(tmp_path, num_processes):
    runs = [{"x": 1}, {"x": -1}]
    with pytest.raises(ValueError, match="negative"):
        list(execute("squares", runs, square, Workers(Local(), num_processes), str, tmp_path))
    (tmp_path / "pid_1").unlink()
    assert list(execute("squares", runs[:1], square, Workers(Local()), str, tmp_path)) == [(0, {"y": 1})]
    assert not (tmp_path / "pid_1").exists()


def test_several_processes_give_the_bits_of_one(tmp_path):
    serial = _trained(Workers(Local()), tmp_path / "one")
    assert serial == _trained(Workers(Local(), 2), tmp_path / "two")
    assert [result["threads"] for result in serial] == [1] * 3
    assert os.getpid() != int((tmp_path / "two" / "pid_0").read_text())


@contextmanager
def _dask(folder):
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    command += ["--scheduler-file", str(folder / "scheduler.json")]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(folder / "scheduler.json")]
    worker += ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ENVIRONMENT, "cwd": ROOT}
    processes = [subprocess.Popen(part, **quiet) for part in (command, worker, worker)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_dask_gives_the_same_bits_though_a_worker_is_killed(tmp_path):
    from distributed import Client

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with _dask(tmp_path) as (_, *workers), Client(scheduler_file=str(tmp_path / "scheduler.json")) as client:
        client.wait_for_workers(2, timeout=120)
        dask = Workers(Dask(client.scheduler.address), 2)
        runs = [{"seed": seed, "num_steps": 400} for seed in range(3)]
        found = execute("networks", [stamped(run, train) for run in runs], train, dask, str, tmp_path / "two")
        results = [next(found)]
        victim = next(worker for worker in workers if str(worker.pid) in _pids(tmp_path / "two"))
        victim.kill()
        results += found
    assert [result for _, result in sorted(results)] == _trained(Workers(Local()), tmp_path / "one", 400)


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install fisher-reg[engines]")
def test_ray_gives_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert _trained(Workers(Ray(), 2), tmp_path / "two") == _trained(Workers(Local()), tmp_path / "one")
    assert str(os.getpid()) not in _pids(tmp_path / "two")


@pytest.mark.parametrize(("engine", "package"), [(Dask, "dask and distributed"), (Ray, "ray")])
def test_a_missing_package_is_said_before_any_work(monkeypatch, engine, package):
    monkeypatch.setattr("recipes.runtime.engines.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}: pip install"):
        engine()


def _pids(folder):
    return [path.read_text() for path in folder.glob("pid_*")]


SLOW = """
from pathlib import Path
from tests.recipes.test_jobs import Local, Workers, execute, square
from recipes.runtime.command import command

@command("rank")
def main(config):
    runs = [{{"x": x, "seconds": 600 * (x > 0)}} for x in range(4)]
    list(execute("slow", runs, square, Workers(Local(), {num_processes}), str, Path({folder!r})))

if __name__ == "__main__":
    main()
"""


def _slow(folder, num_processes, finished):
    (folder / "slow.py").write_text(SLOW.format(folder=str(folder), num_processes=num_processes))
    command = [sys.executable, str(folder / "slow.py"), f"hydra.run.dir={folder}/run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, start_new_session=True, **pipes)
    _eventually(lambda: _pids(folder), length=finished + num_processes)
    _eventually(lambda: list(folder.rglob("output.pkl")), length=1)
    return parent


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    parent = _slow(tmp_path, 2, 1)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    _eventually(lambda: [pid for pid in _pids(tmp_path) if not _is_alive(pid)], length=3)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_interrupt_says_in_one_line_what_is_done_and_leaves_no_process(tmp_path, num_processes):
    parent = _slow(tmp_path, num_processes, 1)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert errors == "Interrupted. slow: 1 of 4 done; run the same command to go on.\n"
    _eventually(lambda: [pid for pid in _pids(tmp_path) if not _is_alive(pid)], length=1 + num_processes)


def _is_alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _eventually(look, length):
    deadline = time.monotonic() + 120
    while len(found := look()) < length:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found
