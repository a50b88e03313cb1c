"""The progress of a long loop, in a file and in a terminal."""

import io

import pytest
from rich.console import Console

from recipes.runtime import progress
from recipes.runtime.progress import Progress, track


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_file_gets_a_line_at_the_beginning_and_with_the_time_left_at_most_every_30_seconds(clock, capsys):
    with Progress("training", 12, done=2) as shown:
        for _ in range(10):
            clock.now += 10
            shown.advance("VGG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training: 2 of 12"
    assert lines[1] == "training: VGG, 3 of 12 after 0:00:10, about 0:01:30 left"
    assert lines[2] == "training: VGG, 6 of 12 after 0:00:40, about 0:01:00 left"
    assert lines[-1] == "training: VGG, 12 of 12 after 0:01:40, about 0:00:00 left"
    assert len(lines) == 5


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda: screen)
    assert list(track([1, 2], "networks")) == [1, 2]
    shown = screen.file.getvalue()
    assert "networks: 2" in shown
    assert "2/2" in shown
    assert "0:00:00" in shown
    assert " left" not in shown
