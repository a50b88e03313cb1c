"""Independent pieces of work, several at a time, with a progress bar."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

Settings = dict[str, Any]
Work = Callable[[Settings], dict[str, Any]]


def execute(
    title: str,
    runs: Sequence[Settings],
    work: Work,
    *,
    describe: Callable[[Settings], str],
    num_processes: int = 1,
    num_threads: int = 1,
) -> Iterator[tuple[Settings, dict[str, Any]]]:
    """Do the work of all runs and yield the results as they come.

    Args:
        title: Of the progress bar.
        runs: What the work depends on; plain values.
        work: Importable, so that other processes can do it.
        describe: A few words for what has just been finished.
        num_processes: Pieces of work that are done at once; 1 does them here.
        num_threads: Of each process, where there are several.

    Yields:
        Each run with its result.
    """
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task(title, total=len(runs))
        for number, (run, result) in enumerate(_results(runs, work, num_processes, num_threads), 1):
            progress.update(task, completed=number, description=f"{title}: {describe(run)}")
            yield run, result


def quiet() -> None:
    """Silence the greetings and hints of Lightning and foolbox, which come once per network."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|foolbox")


def _results(
    runs: Sequence[Settings], work: Work, num_processes: int, num_threads: int
) -> Iterator[tuple[Settings, dict[str, Any]]]:
    if num_processes <= 1:
        yield from ((run, work(run)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _begin, (num_threads,)) as pool:
        futures = {pool.submit(work, run): run for run in runs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin(num_threads: int) -> None:
    """Set a worker up: its threads, and an end with the process that started it, should that be killed."""
    torch.set_num_threads(num_threads)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)  # a result that is half written is not in its place yet

    threading.Thread(target=end_with_parent, daemon=True).start()
