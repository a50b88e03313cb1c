"""Try whether something can be measured at all, before a training begins."""

from __future__ import annotations

from typing import Any

from torch import nn

from fisher_reg.callbacks.probe import Part
from fisher_reg.errors import NonFiniteError
from fisher_reg.estimate import fisher_spectral_norm

_NUM_TRIED = 8


def takes_parts(model: nn.Module, batch: Part, options: dict[str, Any]) -> bool:
    """Measure one example, or the batch where the model takes nothing less.

    Args:
        model: Gives the logits.
        batch: The first one.
        options: Of :func:`fisher_reg.fisher_spectral_norm`.

    Returns:
        Whether the model takes a part of a batch. Raises what the measurement of the batch raises, if no example can be
        measured either; logits that are not finite say nothing of the settings.
    """
    for index in range(min(len(batch), _NUM_TRIED)):  # one that fails says nothing of the settings
        try:
            _measure(model, batch.part(slice(index, index + 1)), options)
        except Exception:  # whatever the user's forward raises
            continue
        return True
    _measure(model, batch, options)
    return False


def _measure(model: nn.Module, part: Part, options: dict[str, Any]) -> None:
    try:
        fisher_spectral_norm(model, part.inputs, side_inputs=part.side_inputs, **options)
    except NonFiniteError:
        return
