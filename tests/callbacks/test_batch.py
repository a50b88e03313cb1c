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
