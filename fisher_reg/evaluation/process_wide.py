"""Settings of torch that hold for the whole process, changed while at least one block is open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack


class ProcessWide:
    """A change of a setting for all threads: made when the first block opens, reverted when the last one closes.

    Args:
        change: Opens the change.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self.change = change
        self.lock = threading.Lock()
        self.num_open = 0
        self.stack = ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.num_open == 0:
                self.stack.enter_context(self.change())
            self.num_open += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.num_open -= 1
            if self.num_open == 0:
                self.stack.close()
