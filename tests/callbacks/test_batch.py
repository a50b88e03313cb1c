import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from fisher_reg.callbacks.batch import find_inputs

X, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("batch", [X, (X, Y), [X, Y], {"image": X, "label": Y}, {"x": X, "weight": torch.zeros(2)}])
def test_inputs_are_found_where_there_is_no_doubt(batch):
    assert find_inputs(batch) is X


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ((Y, X), r"tuple of \[torch.int64 \(2,\), torch.float32 \(2, 3\)\]"),
        ({"a": X, "b": X}, r"'a': torch.float32 \(2, 3\), 'b'"),
        ({"tokens": Y}, "'tokens': torch.int64"),
        ({"image": torch.zeros(2, 3, 3, dtype=torch.uint8), "soft_label": X}, "'image': torch.uint8"),
        (X.long(), "torch.int64"),
        ([], "list of"),
        ("text", "str"),
    ],
)
def test_doubt_is_an_error_that_describes_the_batch_and_shows_inputs_fn(batch, described):
    with pytest.raises(MisconfigurationException, match=rf"{described}(.|\n)*inputs_fn=lambda batch"):
        find_inputs(batch)


class _Slotted:
    """As a batch of molecules of chemprop."""

    __slots__ = ("V", "edges")

    def __init__(self):
        self.V, self.edges = X, Y


class _Graph:
    """As a batch of torch_geometric, whose tensors lie in a store of its own."""

    def __init__(self):
        self._store = {"edge_index": Y, "x": X}

    def keys(self):
        return list(self._store)

    def __getattr__(self, name):
        if name == "_store" or name not in self._store:
            raise AttributeError(name)
        return self._store[name]


@pytest.mark.parametrize(
    ("batch", "described", "shown"),
    [
        ((_Slotted(), X), r"_Slotted with V: torch.float32 \(2, 3\), edges: torch.int64", r"batch\[0\].V,"),
        (_Graph(), r"_Graph with edge_index: torch.int64 \(2,\), x: torch.float32", "batch.x,"),
    ],
)
def test_the_tensors_of_an_object_are_described_and_shown(batch, described, shown):
    with pytest.raises(MisconfigurationException, match=f"{described}(.|\n)*inputs_fn=lambda batch: {shown}"):
        find_inputs(batch)
