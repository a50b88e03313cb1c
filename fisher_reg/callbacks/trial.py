"""Test before training whether the model can be measured."""

from __future__ import annotations

from typing import Any

from torch import nn

from fisher_reg.callbacks.probe import Part
from fisher_reg.errors import NonFiniteError
from fisher_reg.estimate import fisher_spectral_norm

_NUM_TRIED = 8


def takes_parts(model: nn.Module, batch: Part, options: dict[str, Any]) -> bool:
    """Measure one example, or the batch if the model takes only whole batches.

    Args:
        model: Returns the logits.
        batch: The first batch.
        options: Options of :func:`fisher_reg.fisher_spectral_norm`.

    Returns:
        Whether the model takes a part of a batch. If no example can be measured, the error of the whole batch is
        raised. Logits that are not finite raise no error, since the settings may still be valid.
    """
    for index in range(min(len(batch), _NUM_TRIED)):  # a single failure may be due to the example, not to the settings
        try:
            _measure(model, batch.part(slice(index, index + 1)), options)
        except Exception:  # the user's forward may raise any error
            continue
        return True
    _measure(model, batch, options)
    return False


def _measure(model: nn.Module, part: Part, options: dict[str, Any]) -> None:
    try:
        fisher_spectral_norm(model, part.inputs, side_inputs=part.side_inputs, **options)
    except NonFiniteError:
        return
