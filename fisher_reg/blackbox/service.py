"""The wrapper of ``predict``: copies its arguments, checks its results, and counts the queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_reg.evaluation import Noise, SharedCopy, check_inputs

Array = Tensor | np.ndarray[Any, Any]
Predict = Callable[[Any], Any]
Progress = Callable[[int, int], object]


class Service:
    """Calls ``predict`` and counts the queries.

    Each call gets a new contiguous tensor, or a NumPy array in the byte order of the machine, without shared memory;
    its result is copied at once.

    Args:
        predict: From inputs ``(B, *S)`` to probabilities ``(B, K)``.
        inputs: The inputs of the user: for an array ``predict`` gets arrays.
        max_batch_size: Largest number of examples per call; None for no limit.
        progress: Called with the number of queries so far and the total.
        total: Total number of queries.

    Attributes:
        num_asked: Number of queries so far, each for all examples.
    """

    def __init__(
        self, predict: Predict, inputs: Array, max_batch_size: int | None, progress: Progress | None, total: int
    ) -> None:
        device = inputs.device if isinstance(inputs, Tensor) else torch.device("cpu")
        self.num_asked = 0
        self._takes_arrays = isinstance(inputs, np.ndarray)
        self._source, self._noise = SharedCopy(predict, is_deployed=False), Noise(device)
        self._batch_size = max_batch_size or len(inputs)
        self._progress = progress or (lambda done, total: None)
        self._total = total

    def roots(self, question: Tensor) -> Tensor:
        r"""Return :math:`g = 2 \sqrt p` ``(B, K)`` in float64 for a query ``(B, *S)``."""
        p = torch.cat([self._answer(part) for part in question.split(self._batch_size)])
        self.num_asked += 1
        self._progress(self.num_asked, self._total)
        return 2 * _completed(p.clamp_min(0)).sqrt()  # g = 2 sqrt(p)

    def _answer(self, part: Tensor) -> Tensor:
        own = part.clone(memory_format=torch.contiguous_format)  # predict may change it in place
        with torch.no_grad(), self._noise.replayed(), self._source.opened():
            answer = self._source.model(own.numpy() if self._takes_arrays else own)
        answer = _native(answer) if isinstance(answer, np.ndarray) else torch.as_tensor(answer)
        _check_probabilities(answer, len(part))
        return answer.to(part.device, torch.float64, copy=True)  # predict may reuse this memory for its next result


def own_inputs(inputs: Array) -> Tensor:
    """Return a copy of the inputs as a contiguous tensor.

    Raises:
        ValueError: If they are not a non-empty batch of float32 or float64.
    """
    if isinstance(inputs, np.ndarray) and inputs.dtype.newbyteorder("=") not in (np.float32, np.float64):
        raise ValueError(
            f"inputs must be a float32 or float64 array; got {inputs.dtype.name}. Small steps are not possible in "
            "integers and are rounded in float16: use inputs.astype(np.float32), and divide images by 255."
        )
    points = _native(inputs) if isinstance(inputs, np.ndarray) else inputs
    check_inputs(points)
    if points.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Differences of predictions on {points.dtype} inputs are only rounding errors; convert inputs and network "
            "to float32."
        )
    return points.detach().clone(memory_format=torch.contiguous_format)


def _native(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))


def _completed(p: Tensor) -> Tensor:
    """Replace a probability above 1/2 by one minus the others, which are more accurate."""
    top, index = p.max(1, keepdim=True)
    rest = p.scatter(1, index, 0).sum(1, keepdim=True)
    return torch.where(top > 0.5, p.scatter(1, index, (1 - rest).clamp_min(0)), p)


def _check_probabilities(answer: Tensor, batch_size: int) -> None:
    if answer.ndim != 2 or len(answer) != batch_size or answer.shape[1] < 2:
        raise ValueError(
            f"predict must return probabilities (B, K) with B = {batch_size} and K >= 2; it returned "
            f"{tuple(answer.shape)}."
        )
    if answer.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"predict must return float32 or float64, since differences are taken; got {answer.dtype}.")
    if not bool(torch.isfinite(answer).all()):
        raise ValueError("predict returned NaN or infinite values.")
    off = float((answer.sum(1) - 1).abs().max())
    if off > _MAX_OFF or float(answer.min()) < -1e-6:
        raise ValueError(
            f"predict must return probabilities; the sum of a row differs from one by {off:.2g} and the smallest value "
            f"is {float(answer.min()):.2g}. If it returns logits, pass lambda x: predict(x).softmax(1)."
        )


_MAX_OFF = 1e-2  # for probabilities with three digits
