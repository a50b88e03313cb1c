import logging
import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs; what tests start is interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the processes, and for those that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import cases
from tests import trained as stored
from tests.slow import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401 - hooks

NAMES = ("lightning", "lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning")
NAMES += tuple(f"{name}.utilities.rank_zero" for name in NAMES)
LEVELS = {name: logging.getLogger(name).level for name in NAMES}


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _loud():
    """Undo what a recipe that ran in this process did to the loggers."""
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def digits():
    return cases.digits()


@pytest.fixture(scope="session", params=cases.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def trained(family, digits):
    """A trained network of each family; copied where a test changes it."""
    return stored.load(family, digits)
