"""Upper bounds of the Fisher spectral norm from the weights of the network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fisher_reg.bounds.graph import BoundTerm, compose
from fisher_reg.forward import check_input_std, check_inputs, evaluation_behaviour
from fisher_reg.likelihood import Categorical, Likelihood, check_logits


@dataclass(frozen=True)
class UpperBound:
    """An upper bound with its evidence.

    Attributes:
        level: ``"global"`` (from the weights alone).
        log10_value: Decimal logarithm of the bound; finite where the value itself would overflow.
        certified: Whether the mathematics excludes that the true value lies above.
        terms: The Lipschitz constants of the layers, in the order of the forward pass.
        domain: The inputs for which the bound holds.
    """

    level: str
    log10_value: float
    certified: bool
    terms: tuple[BoundTerm, ...]
    domain: str = "all inputs"

    @property
    def value(self) -> float:
        """The bound; infinite beyond the range of a double."""
        return 10**self.log10_value if self.log10_value < 308 else math.inf

    def __str__(self) -> str:
        lines = [f"{term.norm:12.4g}  {term.name}  ({term.layer})" for term in self.terms]
        certificate = "certified" if self.certified else "not certified"
        return "\n".join([*lines, f"bound 10^{self.log10_value:.2f}, {certificate}, {self.domain}"])


def lipschitz_bound(model: nn.Module, inputs: Tensor) -> UpperBound:
    r"""Bound the Lipschitz constant of the centred logits :math:`P z`, :math:`P = I - \mathbf 1 \mathbf 1^\top / K`.

    The softmax ignores a common shift of the logits, so nothing is lost by centring. Layers are composed over the
    traced graph: compose is a product, add a sum, concatenate a root of squares.

    Args:
        model: The network; its evaluation behaviour is bounded, and it is left as it was found.
        inputs: ``(B, *S)``; only the shape of one example matters.

    Returns:
        A certified bound, Euclidean to Euclidean, in logits per input unit. Seconds for small networks, minutes for
        large convolutions on large images.

    Raises:
        NoBoundError: For a part without a rule; the message shows how to register one.
        ValueError: For weights that are not finite.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))
        >>> round(lipschitz_bound(model, torch.zeros(1, 2)).value, 6)  # centred rows (2, 0) and (-2, 0)
        2.828427
    """
    return _lipschitz(model, inputs, Categorical())


def fisher_bound(
    model: nn.Module,
    inputs: Tensor,
    *,
    likelihood: Likelihood = Categorical(),
    input_std: Tensor | None = None,
) -> UpperBound:
    r"""Bound the largest eigenvalue of the input-space Fisher matrix over all inputs, from the weights alone.

    .. math:: \|F(x)\|_2 \le \tfrac12\, \mathrm{Lip}(P z)^2 ,

    since :math:`F = (PJ)^\top \Sigma (PJ)` and :math:`\lambda_\max(\Sigma) \le \tfrac12` for a categorical output.
    Other likelihoods have their own largest :math:`\Sigma`, and :math:`P = I`.

    Args:
        model: As in :func:`lipschitz_bound`.
        inputs: ``(B, *S)``; only the shape of one example matters.
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.

    Returns:
        A certified bound in nats per squared input unit.

    Raises:
        NoBoundError: As in :func:`lipschitz_bound`.
        ValueError: As in :func:`lipschitz_bound`.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> round(fisher_bound(model, torch.zeros(1, 2)).value, 6)  # tight here: F(0) has the eigenvalue 1
        1.0
    """
    if input_std is not None:
        check_input_std(input_std)
    lipschitz = _lipschitz(model, inputs, likelihood)
    log10_value = 2 * lipschitz.log10_value + math.log10(likelihood.largest_eigenvalue())
    if input_std is not None:
        log10_value -= 2 * math.log10(float(input_std.min()))
    return replace(lipschitz, log10_value=log10_value)


def _lipschitz(model: nn.Module, inputs: Tensor, likelihood: Likelihood) -> UpperBound:
    check_inputs(inputs)
    if not isinstance(model, nn.Module):
        raise ValueError(f"A bound needs the weights of an nn.Module; got {type(model).__name__}.")
    example = inputs[:1]
    with torch.inference_mode(False), torch.no_grad(), evaluation_behaviour(model):
        composition = compose(model, example.clone(), centre=likelihood.shift_invariant)
    check_logits(composition.logits, len(example), likelihood)
    domain = "; ".join(composition.domains) or "all inputs"
    return UpperBound("global", composition.log_norm / math.log(10), True, composition.terms, domain)
