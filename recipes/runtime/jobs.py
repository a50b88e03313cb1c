"""Independent pieces of work, several at a time, on the engine of the configuration."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import joblib
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from recipes.runtime.cache import Result, Settings, Work, is_kept, kept
from recipes.runtime.engines import Engine
from recipes.runtime.noise import quiet
from recipes.runtime.progress import Progress


@dataclass(frozen=True)
class Workers:
    """The workers of a study.

    Attributes:
        engine: Runs the pieces of work.
        num_processes: Number of simultaneous pieces of work; with 1 and a local engine they run in this process.
        num_threads: Number of torch's threads in each piece of work; ``None`` does not change it.
    """

    engine: Engine
    num_processes: int = 1
    num_threads: int | None = 1

    @classmethod
    def of(cls, config: DictConfig) -> Workers:
        """Return the workers of a configuration; checked before any work, since the engine may need a package.

        Raises:
            ValueError: If there is no process or no thread.
        """
        for name in ("num_processes", "num_threads"):
            if config[name] is not None and config[name] < 1:
                raise ValueError(f"{name} must be at least 1; got {config[name]}.")
        return cls(instantiate(config.engine), config.num_processes, config.num_threads)

    def warn_of_timings(self) -> None:
        """Warn that several processes change measured times."""
        if self.num_processes > 1 or type(self.engine).__name__ != "Local":
            Console().print(
                "Simultaneous calls slow each other down: seconds and ratios of this run differ from "
                "those of single calls. Use num_processes=1 and engine=local to compare times."
            )


def execute(
    title: str,
    runs: Sequence[Settings],
    work: Work,
    workers: Workers,
    describe: Callable[[Settings], str],
    cache: Path | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Do the work of all runs and yield the index and the result of each as they complete; cached ones come first.

    Args:
        title: Title of the progress.
        runs: Settings of the work; plain values, :func:`~recipes.runtime.cache.stamped` if results are cached.
        work: A module-level function, so that other processes can import it; called with a run and ``cache``.
        workers: The workers.
        describe: Returns a short description of a finished run.
        cache: Cache folder; without one nothing is cached.

    Raises:
        KeyboardInterrupt: When the user interrupts; its text has the number of finished runs. All workers are ended.
    """
    known = [index for index, run in enumerate(runs) if cache and is_kept(run, work, cache)]
    yield from ((index, kept(runs[index], work, cache)) for index in known if cache)
    call, done = joblib.delayed(_piece), len(known)
    todo = sorted({*range(len(runs))} - {*known})
    calls = [call(index, runs[index], work, cache, workers.num_threads, os.getpid()) for index in todo]
    if not calls:
        return
    try:
        with workers.engine.open(workers.num_processes), Progress(title, len(runs), done) as progress:
            for index, result in joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls):
                done += 1
                progress.advance(describe(runs[index]))
                yield index, result
    except KeyboardInterrupt as error:
        kept_where = "run the same command to go on" if cache else "the files have the rows of these"
        raise KeyboardInterrupt(f"{title}: {done} of {len(runs)} done; {kept_where}.") from error


def folders(config: DictConfig) -> tuple[Path, Path]:
    """Create and return the folder of the results and the cache folder."""
    made = Path(config.output_dir), Path(config.cache_dir)
    for path in made:
        path.mkdir(parents=True, exist_ok=True)
    return made


def _piece(
    index: int, run: Settings, work: Work, cache: Path | None, num_threads: int | None, parent: int
) -> tuple[int, Result]:
    """Do one piece with its number of threads, on which sums of floating-point numbers depend."""
    _begin(parent)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        return index, work(run, Path()) if cache is None else kept(run, work, cache)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits when it is interrupted
            raise KeyboardInterrupt from error
        raise
    finally:
        torch.set_num_threads(before)


@lru_cache
def _begin(parent: int) -> None:
    """Set a process up, once: a worker of this machine ends with the process that started it."""
    quiet()
    if os.getppid() == parent and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is also interrupted, and ends its workers
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)  # safe, since results are written atomically
