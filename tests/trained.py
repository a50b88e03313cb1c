"""The trained networks of the tests, stored: ``python -m tests.trained`` makes ``tests/weights/<family>.pt`` again.

They are kept in half precision (650 kB), so that a test sees the same networks on every machine, without a training.
"""

from pathlib import Path

import torch

from tests import cases

FOLDER = Path(__file__).parent / "weights"


def load(family, data):
    """Return the network of a family as it was trained, in evaluation mode."""
    model = cases.network(family, data)
    stored = torch.load(FOLDER / f"{family}.pt", weights_only=True)
    model.load_state_dict({key: value.to(model.state_dict()[key].dtype) for key, value in stored.items()})
    return model.eval()


def main():
    """Train each of the families on the digits and store its weights."""
    FOLDER.mkdir(exist_ok=True)
    data = cases.digits()
    for family in cases.FAMILIES:
        model = cases.train(cases.network(family, data), data)
        weights = {
            key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()
        }
        torch.save(weights, FOLDER / f"{family}.pt")


if __name__ == "__main__":
    main()
