"""Upper bounds over all inputs, or over a domain, from the weights of the network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fisher_reg.arguments import LIKELIHOOD, check_tightening
from fisher_reg.bounds.compositions import Head, compositions_of, shares, tightest, traced_at_few, traced_model
from fisher_reg.bounds.operator_norms.matrix import linear_norm
from fisher_reg.bounds.operator_norms.measures import CertifiedNorms
from fisher_reg.bounds.propagate import Composition, compose
from fisher_reg.bounds.region import Domain, region_of
from fisher_reg.bounds.report import UpperBound
from fisher_reg.bounds.sensitivity import log
from fisher_reg.bounds.tightening import Tightening
from fisher_reg.evaluation import InputStd, check_inputs, standard_deviation
from fisher_reg.likelihood import Categorical, Likelihood


def lipschitz_bound(
    model: nn.Module, inputs: Tensor, *, domain: Domain | None = None, tightening: Tightening = Tightening()
) -> UpperBound:
    r"""Bound the Lipschitz constant of the centred logits :math:`P z`, :math:`P = I - \mathbf 1 \mathbf 1^\top / K`.

    The softmax is invariant under a common shift of the logits, so that centring changes no probability. The constants
    of the layers are combined over the traced graph: a composition is a product, an addition a sum, a concatenation a
    root of a sum of squares.

    Args:
        model: The network. It is bounded in evaluation mode, in exact arithmetic, and not modified.
        inputs: ``(B, *S)``; only the shape of one example matters: the bound holds for inputs of this size.
        domain: The inputs for which the bound holds: ``(low, high)``, :class:`Box` or :class:`L2Ball`; all by
            default. Gates and products of two values have a constant only on a domain.
        tightening: The certified improvements to use.

    Returns:
        A certified bound for Euclidean norms, in logits per input unit. Cost: about ten forward passes of two examples
        and the norms of the weights.

    Raises:
        NoBoundError: For a part without a rule; the message shows how to register one.
        ValueError: For weights that are not finite, or inputs outside the domain.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))
        >>> round(lipschitz_bound(model, torch.zeros(1, 2)).value, 6)  # centred rows (2, 0) and (-2, 0)
        2.828427
    """

    def head(composition: Composition, logits: Tensor) -> Tensor:
        rows = composition.head  # ||P W||
        return torch.zeros((), dtype=torch.float64) if rows is None else log(linear_norm(rows - rows.mean(0)))

    return _global(model, inputs, Categorical(), tightening, head, domain, power=1)


def fisher_bound(
    model: nn.Module,
    inputs: Tensor,
    *,
    domain: Domain | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    tightening: Tightening = Tightening(),
) -> UpperBound:
    r"""Bound the largest eigenvalue of the input-space Fisher matrix over all inputs, from the weights alone.

    For logits :math:`z = W h(x) + b`

    .. math:: \|F(x)\|_2 \le \max_p \lambda_\max(W^\top \Sigma(p) W)\, \mathrm{Lip}(h)^2
              = \tfrac14 \max_{jk} \|w_j - w_k\|^2\, \mathrm{Lip}(h)^2 ,

    since :math:`v^\top W^\top \Sigma W v` is the variance of :math:`w_k^\top v` over labels :math:`k`, which
    Popoviciu's inequality bounds by a quarter of the squared range. If the network does not end in a linear layer, the
    bound is :math:`\tfrac12 \mathrm{Lip}(z)^2`.

    Args:
        model: As in :func:`lipschitz_bound`.
        inputs: ``(B, *S)``; only the shape of one example matters.
        domain: As in :func:`lipschitz_bound`, in the units of ``inputs``.
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        tightening: The certified improvements to use.

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

    def head(composition: Composition, logits: Tensor) -> Tensor:
        return log(likelihood.largest_curvature(composition.head))

    return _global(model, inputs, likelihood, tightening, head, domain, input_std=input_std)


def log_fisher_bound(
    model: nn.Module, inputs: Tensor, likelihood: Likelihood, input_std: InputStd | None, tightening: Tightening
) -> Tensor:
    """Return the natural logarithm of :func:`fisher_bound`, differentiable in the weights: a scalar."""
    check_inputs(inputs)
    LIKELIHOOD.check(likelihood)
    check_tightening(tightening)
    std = standard_deviation(input_std, inputs)
    traced = traced_at_few(model, inputs, likelihood)
    with torch.inference_mode(False), torch.enable_grad():
        composition = compose(traced, CertifiedNorms(tightening.dense), tightening=tightening, differentiable=True)
        # log(Lip(h)^2 max_p lambda_max(W^T Sigma(p) W))
        log_value = 2 * composition.log_norm + log(likelihood.largest_curvature(composition.head))
    return log_value if std is None else log_value - 2 * std.min().log()


def _global(
    model: nn.Module,
    inputs: Tensor,
    likelihood: Likelihood,
    tightening: Tightening,
    head: Head,
    domain: Domain | None,
    *,
    power: int = 2,
    input_std: InputStd | None = None,
) -> UpperBound:
    check_inputs(inputs)
    LIKELIHOOD.check(likelihood)
    check_tightening(tightening)
    std = standard_deviation(input_std, inputs)
    region = None
    if domain is None:
        traced = traced_at_few(model, inputs, likelihood)
    else:
        region = region_of(domain, inputs)
        traced = traced_model(model, region.centre.expand(min(len(inputs), 2), *inputs.shape[1:]), likelihood)
    with torch.inference_mode(False), torch.enable_grad():
        composition, log_value = tightest(
            compositions_of(traced, likelihood, tightening, region=region), traced.result, head, power
        )
        terms = shares(composition, log_value, head(composition, traced.result), power)
    shift = 0.0 if std is None else power * math.log10(float(std.min()))
    log10_value = float(log_value.detach().max()) / math.log(10) - shift
    limits = composition.domains if region is None else (region.name, *composition.domains)
    return UpperBound("global", log10_value, True, terms, "; ".join(limits) or "all inputs")
