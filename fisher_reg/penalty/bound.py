"""The certified bound as a penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisher_reg.arguments import LIKELIHOOD, check_tightening
from fisher_reg.bounds import Tightening, log_fisher_bound
from fisher_reg.evaluation import (
    InputStd,
    LogitsFunction,
    check_input_std,
    check_inputs,
    differentiable,
    trained_module,
)
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.penalty.point import Penalty
from fisher_reg.printing import short_repr


@dataclass(frozen=True)
class BoundPenalty(Penalty):
    r"""Logarithm of the certified upper bound :func:`fisher_reg.fisher_bound`, with its gradient.

    It needs no second derivative of the network, and only the shape of the inputs. It reduces the largest sensitivity
    over all inputs, whereas :class:`SpectralPenalty` reduces the sensitivity at the data. The value is certified. Its
    gradient is that of the singular value at the maximising frequency of each layer, a subgradient if several are
    equal. In training mode batch norm is scaled by the statistics of the batch, which stay differentiable, so that to
    shrink a weight before a batch norm does not reduce the penalty.

    Args:
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        tightening: The certified improvements to use; diagonal scalings are not balanced.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> penalty = BoundPenalty()(model, torch.zeros(1, 2))  # log(|w0 - w1|^2 / 4)
        >>> round(penalty.item(), 6)
        0.0
        >>> torch.autograd.grad(penalty, model.weight)[0]
        tensor([[ 1.,  0.],
                [-1.,  0.]])
    """

    likelihood: Likelihood = Categorical()
    input_std: InputStd | None = None
    tightening: Tightening = Tightening()

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_input_std(self.input_std)
        LIKELIHOOD.check(self.likelihood, self)
        check_tightening(self.tightening)

    def __call__(self, model: LogitsFunction, inputs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the penalty, a scalar in double precision.

        Args:
            model: The network, an ``nn.Module``.
            inputs: ``(B, *S)``: only their shape is used, and in training mode their batch norm statistics.
            generator: Not used.

        Returns:
            Natural logarithm of nats per squared input unit.

        Raises:
            ValueError: For a model that is not a module.
        """
        check_inputs(inputs)
        if not isinstance(model, nn.Module):
            raise ValueError(f"BoundPenalty needs the weights of an nn.Module; got {type(model).__name__}.")
        with differentiable(inputs) as safe_inputs:
            module = trained_module(model, safe_inputs)
            return log_fisher_bound(module, safe_inputs, self.likelihood, self.input_std, self.tightening)
