"""A case on the simulated device beside the same case on the CPU."""

from __future__ import annotations

import traceback

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.accelerator.device import DEVICE, AcceleratorTensor
from tests.accelerator.places import Place

CPU = torch.device("cpu")
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # full precision, as on the CPU


def failures(cases, rough=()):
    """Run cases in both places.

    Args:
        cases: From a name to a function of a :class:`Place` that returns numbers, or tensors of the place.
        rough: Names of the cases that agree to a hundredth only.

    Returns:
        From the name of each case to what went wrong; None if nothing did.
    """
    return {name: _failure(case, 1e-2 if name in rough else 1e-5) for name, case in cases.items()}


def _failure(case, rtol):
    try:
        wanted, found = (_result(case, Place(device)) for device in (CPU, DEVICE))
        _refuse_wrong_places(found)
        found = tree_map_only(AcceleratorTensor, lambda tensor: tensor.cpu(), found)
        _assert_close(found, wanted, rtol)
    except Exception:
        return traceback.format_exc()
    return None


def _result(case, place):
    torch.manual_seed(0)
    result = case(place)
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach(), result)


def _assert_close(found, wanted, rtol):
    found, wanted = tree_leaves(found), tree_leaves(wanted)
    texts = [[leaf for leaf in leaves if isinstance(leaf, str)] for leaves in (found, wanted)]
    assert texts[0] == texts[1], f"The device says {texts[0]}, the CPU {texts[1]}."
    numbers = [[leaf for leaf in leaves if not isinstance(leaf, str)] for leaves in (found, wanted)]
    # the same kernels compute both, but for some, as those of batch norm: only the order of sums differs
    torch.testing.assert_close(*numbers, rtol=rtol, atol=1e-2 * rtol, equal_nan=True)


def _refuse_wrong_places(found):
    strays = [tensor for tensor in tree_leaves(found) if isinstance(tensor, torch.Tensor) and tensor.device != DEVICE]
    if strays:
        raise AssertionError(f"{len(strays)} results are on {strays[0].device} and not on the device of the inputs.")
