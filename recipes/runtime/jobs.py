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
    """Who does the work.

    Attributes:
        engine: What runs it.
        num_processes: Pieces of work that are done at once; 1 does them here, if the engine is of this machine.
        num_threads: Of torch in each piece of work; ``None`` leaves them as they are.
    """

    engine: Engine
    num_processes: int = 1
    num_threads: int | None = 1

    @classmethod
    def of(cls, config: DictConfig) -> Workers:
        """Return those of a configuration, before any work: the engine may lack a package.

        Raises:
            ValueError: If there is no process or no thread.
        """
        for name in ("num_processes", "num_threads"):
            if config[name] is not None and config[name] < 1:
                raise ValueError(f"{name} must be at least 1; got {config[name]}.")
        return cls(instantiate(config.engine), config.num_processes, config.num_threads)

    def warn_of_timings(self) -> None:
        """Say what several processes do to measured times."""
        if self.num_processes > 1 or type(self.engine).__name__ != "Local":
            Console().print(
                "Calls that are timed beside each other slow each other down: seconds and ratios of this run are not "
                "those of calls alone. Take num_processes=1 and engine=local to compare times."
            )


def execute(
    title: str,
    runs: Sequence[Settings],
    work: Work,
    workers: Workers,
    describe: Callable[[Settings], str],
    cache: Path | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Do the work of all runs and yield the place of each with its result as they come; those kept come first.

    Args:
        title: Of the progress.
        runs: What the work depends on; plain values, :func:`~recipes.runtime.cache.stamped` if they are kept.
        work: A function of a module, so that other processes find it; called with a run and ``cache``.
        workers: Who does it.
        describe: A few words for what has just been finished.
        cache: Folder of results; without one nothing is kept.

    Raises:
        KeyboardInterrupt: When the user interrupts; its text says how many are done. No worker is left.
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
    """Make the folder of the results and that of what is kept, and return them."""
    made = Path(config.output_dir), Path(config.cache_dir)
    for path in made:
        path.mkdir(parents=True, exist_ok=True)
    return made


def _piece(
    index: int, run: Settings, work: Work, cache: Path | None, num_threads: int | None, parent: int
) -> tuple[int, Result]:
    """Do one piece with its own number of threads, which sums of floating-point numbers depend on."""
    _begin(parent)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        return index, work(run, Path()) if cache is None else kept(run, work, cache)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning ends the process when it is interrupted
            raise KeyboardInterrupt from error
        raise
    finally:
        torch.set_num_threads(before)


@lru_cache
def _begin(parent: int) -> None:
    """Set a process up, once: a worker of this machine ends with the process that started it."""
    quiet()
    if os.getppid() == parent and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, too, and ends its workers
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)  # a result that is half written is not in its place yet
