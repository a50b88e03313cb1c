"""The public function of the black-box estimate."""

from __future__ import annotations

from typing import Any

import torch

from fisher_reg.arguments import BLACK_BOX_ESTIMATOR
from fisher_reg.blackbox.questions import Questions, within
from fisher_reg.blackbox.result import BlackBoxEstimator, BlackBoxResult, warn_of_missing
from fisher_reg.blackbox.service import Array, Predict, Progress, Service, own_inputs
from fisher_reg.blackbox.sketch import BlackBox
from fisher_reg.evaluation import InputStd, standard_deviation
from fisher_reg.sampling import fixed_generator


def blackbox_spectral_norm(
    predict: Predict,
    inputs: Array,
    *,
    estimator: BlackBoxEstimator | None = None,
    input_std: InputStd | None = None,
    bounds: tuple[Any, Any] | None = None,
    max_batch_size: int | None = None,
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
) -> BlackBoxResult:
    r"""Estimate the largest eigenvalue of the input-space Fisher matrix from predictions only, per example.

    Args:
        predict: Maps inputs ``(B, *S)`` to probabilities ``(B, K)``: a network in evaluation mode followed by softmax,
            an ONNX session, a remote service. It gets a NumPy array if ``inputs`` is one, else a tensor without
            gradient. It may change its argument and may return an array or a tensor. It must be deterministic.
        inputs: ``(B, *S)``, float32 or float64; an array may have any strides and byte order. ``predict`` gets copies.
        estimator: :class:`BlackBox` with 200 queries by default, or :class:`BlackBoxMax`.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        bounds: ``(low, high)``, numbers, tensors or arrays that are broadcastable to the inputs, in their unit and
            precision. All queries stay in this range. Without bounds, queries leave the range of the inputs by a few
            small steps. If no prediction changes, up to three more tries are made, with steps a thousand times longer
            each time.
        max_batch_size: Largest number of examples per call of ``predict``. Each query then takes
            ``ceil(B / max_batch_size)`` calls.
        progress: Called as ``progress(done, total)`` after each query, with numbers of queries per example.
        generator: Generator of the directions; by default a fixed one.

    Returns:
        Fields with leading axis ``B``, on the device of the inputs. An eigenvalue is NaN if the predictions do not
        determine it, with a reason and a ``UserWarning``. The eigenvalue and the self-check are statistical; the number
        of queries and the bounds are exact.

    Raises:
        ValueError: Before any query, if ``inputs`` is not a non-empty batch of float32 or float64 within ``bounds``, or
            an option is invalid; or if the result of ``predict`` is not probabilities ``(B, K)``: float32 or float64,
            finite, not negative, each row with sum one.

    Example:
        >>> import numpy as np
        >>> def predict(x: np.ndarray) -> np.ndarray:  # p (1 - p) |w0 - w1|^2 = 1 at x = 0
        ...     first = 1 / (1 + np.exp(-2 * x[:, :1]))
        ...     return np.concatenate([first, 1 - first], 1)
        >>> result = blackbox_spectral_norm(predict, np.zeros((1, 50)))
        >>> bool((result.eigenvalue - 1).abs() < 3 * result.standard_error)
        True
    """
    BLACK_BOX_ESTIMATOR.check(estimator, "blackbox_spectral_norm")
    points = own_inputs(inputs)
    std = standard_deviation(1.0 if input_std is None else input_std, points)
    assert std is not None
    questions = within(Questions(points, std.to(points).expand(points.shape[1:])[None]), bounds)
    if max_batch_size is not None and not (isinstance(max_batch_size, int) and max_batch_size >= 1):
        raise ValueError(f"max_batch_size must be a whole number, at least 1; got {max_batch_size}.")
    chosen = estimator or BlackBox()
    chosen.check(questions)
    service = Service(predict, inputs, max_batch_size, progress, chosen.num_questions)
    result = chosen.estimate(service, questions, generator or fixed_generator())
    warn_of_missing(result.reason)
    return result
