import pytest
import torch

from tests import cases


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    return cases.digits()


@pytest.fixture(scope="session", params=cases.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def trained(family, digits):
    """A trained network of each family; copied where a test changes it."""
    return cases.train(cases.network(family, digits), digits)
