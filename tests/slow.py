"""Which tests are slow: those named in ``slow.txt``, which ``python -m pytest -m "not slow"`` leaves out.

``python -m pytest --write-slow`` writes the file again from the seconds of that run: a line is a test function one of
whose cases took :data:`SECONDS` or more, or a file in which that much goes into what its tests share.
"""

from pathlib import Path

import pytest

SECONDS = 0.2
SHARED_SECONDS = 4.0  # more than reading the digits and the stored networks takes
FILE = Path(__file__).with_name("slow.txt")


def pytest_addoption(parser):
    parser.addoption("--write-slow", action="store_true", help=f"write {FILE.name} from the seconds of this run")


def pytest_configure(config):
    if config.getoption("--write-slow") and not hasattr(config, "workerinput"):  # not in the workers of xdist
        config.pluginmanager.register(Recorder())


def pytest_collection_modifyitems(items):
    slow = set(FILE.read_text().split()) if FILE.exists() else set()
    for item in items:
        path, _, test = item.nodeid.partition("::")
        if path in slow or f"{path}::{test.partition('[')[0]}" in slow:
            item.add_marker(pytest.mark.slow)


class Recorder:
    """Notes what takes long."""

    def __init__(self):
        self.slow = set()

    def pytest_runtest_logreport(self, report):
        path, _, test = report.nodeid.partition("::")
        limit = SHARED_SECONDS if report.when == "setup" else SECONDS
        if report.duration >= limit:
            self.slow.add(path if report.when == "setup" else f"{path}::{test.partition('[')[0]}")

    def pytest_sessionfinish(self):
        lines = [name for name in self.slow if name.partition("::")[0] not in self.slow or "::" not in name]
        FILE.write_text("".join(f"{name}\n" for name in sorted(lines)))
