"""Progress of a long loop and its remaining time: a bar in a terminal, else lines of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 30.0
_FOREVER = 1e9  # rich forgets steps after 30 s by default, and steps take minutes here


class Progress:
    """The progress of ``total`` steps, of which ``done`` are already done.

    In a terminal it is a bar; otherwise a line at the beginning, after the first and the last step, and every 30
    seconds between.

    Args:
        title: Title of the work.
        total: Number of steps.
        done: Number of steps that took no time and are not used to estimate the remaining time.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._done, self._known = title, total, done, done
        self._console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(
            *columns,
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=_FOREVER,
        )
        self._task = self._bar.add_task(title, total=total, completed=done)
        self._begin, self._last_line = time.monotonic(), -_FOREVER

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Show what is to be done."""
        self._bar.start()
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: {self._done} of {self._total}", soft_wrap=True, highlight=False)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def describe(self, description: str) -> None:
        """Show the current step; only in a terminal."""
        self._bar.update(self._task, description=f"{self._title}: {description}")

    def advance(self, description: str = "") -> None:
        """Count a finished step."""
        self._done += 1
        title = f"{self._title}: {description}" if description else self._title
        self._bar.update(self._task, completed=self._done, description=title)
        now = time.monotonic()
        is_due = now - self._last_line >= _SECONDS_BETWEEN_LINES or self._done == self._total
        if is_due and not self._console.is_terminal:
            self._last_line = now
            self._console.print(f"{title}, {self._line(now - self._begin)}", soft_wrap=True, highlight=False)

    def _line(self, seconds: float) -> str:
        left = seconds / (self._done - self._known) * (self._total - self._done)
        times = [str(timedelta(seconds=round(number))) for number in (seconds, left)]
        return f"{self._done} of {self._total} after {times[0]}, about {times[1]} left"


def track(steps: Sequence[T], title: str, describe: Callable[[T], str] = str) -> Generator[T, None, None]:
    """Yield each of ``steps`` and show the progress."""
    with Progress(title, len(steps)) as progress:
        for step in steps:
            progress.describe(describe(step))
            yield step
            progress.advance(describe(step))
