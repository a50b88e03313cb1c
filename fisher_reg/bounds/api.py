"""Upper bounds of the Fisher spectral norm from the weights of the network, over all inputs and at given ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, fx, nn

from fisher_reg.bounds.operator_norms.matrix import linear_norm
from fisher_reg.bounds.operator_norms.measures import CertifiedNorms
from fisher_reg.bounds.operator_norms.schatten import SchattenNorms
from fisher_reg.bounds.propagate import Composition, compose
from fisher_reg.bounds.report import BoundTerm, UpperBound
from fisher_reg.bounds.sensitivity import log
from fisher_reg.bounds.tighten.balance import balanced_scales
from fisher_reg.bounds.tightening import Tightening
from fisher_reg.bounds.tracing import Trace, trace
from fisher_reg.errors import NoBoundError
from fisher_reg.evaluation import Noise, check_input_std, check_inputs, deployed_module, differentiable
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.outputs import check_logits


def lipschitz_bound(model: nn.Module, inputs: Tensor, *, tightening: Tightening = Tightening()) -> UpperBound:
    r"""Bound the Lipschitz constant of the centred logits :math:`P z`, :math:`P = I - \mathbf 1 \mathbf 1^\top / K`.

    The softmax ignores a common shift of the logits, so nothing is lost by centring. Layers are composed over the
    traced graph: compose is a product, add a sum, concatenate a root of squares.

    Args:
        model: The network; its evaluation behaviour is bounded, and it is left as it was found.
        inputs: ``(B, *S)``; only the shape of one example matters.
        tightening: Which certified improvements are used.

    Returns:
        A certified bound, Euclidean to Euclidean, in logits per input unit.

    Raises:
        NoBoundError: For a part without a rule; the message shows how to register one.
        ValueError: For weights that are not finite.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))
        >>> round(lipschitz_bound(model, torch.zeros(1, 2)).value, 6)  # centred rows (2, 0) and (-2, 0)
        2.828427
    """

    def head(rows: Tensor | None, logits: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64) if rows is None else log(linear_norm(rows - rows.mean(0)))

    return _bound(model, inputs[:1], Categorical(), tightening, head, power=1)


def fisher_bound(
    model: nn.Module,
    inputs: Tensor,
    *,
    likelihood: Likelihood = Categorical(),
    input_std: Tensor | None = None,
    tightening: Tightening = Tightening(),
) -> UpperBound:
    r"""Bound the largest eigenvalue of the input-space Fisher matrix over all inputs, from the weights alone.

    For logits :math:`z = W h(x) + b`

    .. math:: \|F(x)\|_2 \le \max_p \lambda_\max(W^\top \Sigma(p) W)\, \mathrm{Lip}(h)^2
              = \tfrac14 \max_{jk} \|w_j - w_k\|^2\, \mathrm{Lip}(h)^2 ,

    since :math:`v^\top W^\top \Sigma W v` is the variance of :math:`w_k^\top v` over labels :math:`k`, which
    Popoviciu's inequality bounds by a quarter of the squared range. A network that does not end in a linear layer has
    :math:`\tfrac12 \mathrm{Lip}(z)^2`.

    Args:
        model: As in :func:`lipschitz_bound`.
        inputs: ``(B, *S)``; only the shape of one example matters.
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        tightening: Which certified improvements are used.

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

    def head(rows: Tensor | None, logits: Tensor) -> Tensor:
        return log(likelihood.largest_curvature(rows))

    return _bound(model, inputs[:1], likelihood, tightening, head, input_std=input_std)


def local_fisher_bound(
    model: nn.Module,
    inputs: Tensor,
    *,
    likelihood: Likelihood = Categorical(),
    input_std: Tensor | None = None,
    tightening: Tightening = Tightening(),
) -> UpperBound:
    r"""Bound the largest eigenvalue of the input-space Fisher matrix at the given inputs.

    As :func:`fisher_bound`, with what is known there: the probabilities in :math:`\Sigma(p)`, the scales of layer
    norms, the weights of attention, the slopes of activations, and which pixels win the max poolings. It bounds F at
    these inputs, not in a neighbourhood of them.

    Args:
        model: As in :func:`lipschitz_bound`.
        inputs: ``(B, *S)``.
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        tightening: Which certified improvements are used.

    Returns:
        A certified bound with values ``(B,)``, in nats per squared input unit, for one forward pass and the norms of
        :func:`fisher_bound`.

    Raises:
        NoBoundError: As in :func:`lipschitz_bound`.
        ValueError: As in :func:`lipschitz_bound`.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> local_fisher_bound(model, torch.tensor([[0.0, 0.0], [5.0, 0.0]])).value  # p (1 - p) |w0 - w1|^2
        tensor([1.0000e+00, 1.8158e-04], dtype=torch.float64)
    """

    def head(rows: Tensor | None, logits: Tensor) -> Tensor:
        return log(likelihood.curvature_at(logits.double(), rows))

    return _bound(model, inputs, likelihood, tightening, head, input_std=input_std, is_local=True)


def log_fisher_bound(
    model: nn.Module, inputs: Tensor, likelihood: Likelihood, input_std: Tensor | None, tightening: Tightening
) -> Tensor:
    """Return the natural logarithm of :func:`fisher_bound`, differentiable in the weights: a scalar."""
    traced = traced_model(model, inputs[:1], likelihood)
    with torch.inference_mode(False), torch.enable_grad():
        composition = compose(traced, CertifiedNorms(tightening.dense), tightening=tightening, differentiable=True)
        log_value = 2 * composition.log_norm + log(likelihood.largest_curvature(composition.head))
    return log_value if input_std is None else log_value - 2 * input_std.min().log()


def certified_radius(
    model: nn.Module, inputs: Tensor, *, input_std: Tensor | None = None, tightening: Tightening = Tightening()
) -> Tensor:
    r"""Return the Euclidean distance within which no perturbation changes the predicted class, per example.

    .. math:: r(x) = \min_{k \ne y} \frac{z_y - z_k}{\mathrm{Lip}(z_y - z_k)}, \qquad
              \mathrm{Lip}(z_y - z_k) \le \|w_y - w_k\|\, \mathrm{Lip}(h)

    for logits :math:`z = W h + b` and :math:`y` the predicted class; :math:`\sqrt 2\, \mathrm{Lip}(z)` where the
    network does not end in a linear layer. It holds against every attack, and is far below
    the distance that attacks need.

    Args:
        model: As in :func:`lipschitz_bound`.
        inputs: ``(B, *S)``.
        input_std: If the model is fed ``(pixels - mean) / std``, pass that ``std`` for a radius in pixels.
        tightening: Which certified improvements are used.

    Returns:
        ``(B,)`` in input units, double precision; infinite where no perturbation can change anything.

    Raises:
        NoBoundError: As in :func:`lipschitz_bound`.
        ValueError: As in :func:`lipschitz_bound`.

    Reference: Tsuzuku, Sato, Sugiyama (2018), "Lipschitz-margin training", arXiv 1802.04034.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> certified_radius(model, torch.tensor([[3.0]]))  # the boundary is at 0
        tensor([3.], dtype=torch.float64)
    """
    if input_std is not None:
        check_input_std(input_std)
    traced = traced_model(model, inputs, Categorical())
    with torch.inference_mode(False), torch.no_grad():
        radii = [_radii(item, traced.result.double()) for item in _compositions(traced, Categorical(), tightening)]
    best = torch.stack(radii).amax(0)
    return best if input_std is None else best * input_std.min().double()


def _radii(composition: Composition, logits: Tensor) -> Tensor:
    rows, predicted = composition.head, logits.argmax(1)
    constants = torch.full_like(logits, math.sqrt(2))
    if rows is not None:
        constants = torch.cdist(rows[predicted], rows, compute_mode="donot_use_mm_for_euclid_dist")
    margins = logits.gather(1, predicted[:, None]) - logits
    radii = torch.where(margins > 0, margins / (constants * composition.log_norm.exp()), 0.0)
    return radii.scatter(1, predicted[:, None], math.inf).amin(1)


Head = Callable[[Tensor | None, Tensor], Tensor]


def _bound(
    model: nn.Module,
    inputs: Tensor,
    likelihood: Likelihood,
    tightening: Tightening,
    head: Head,
    *,
    power: int = 2,
    input_std: Tensor | None = None,
    is_local: bool = False,
) -> UpperBound:
    if input_std is not None:
        check_input_std(input_std)
    traced = traced_model(model, inputs, likelihood)
    with torch.inference_mode(False), torch.enable_grad():
        composition, log_value = _tightest(traced, likelihood, tightening, head, power, is_local)
        terms = _shares(composition, log_value, head(composition.head, traced.result), power)
    shift = 0.0 if input_std is None else power * math.log10(float(input_std.min()))
    log10_value = log_value.detach() / math.log(10) - shift
    level, domain = (
        ("local", "the given inputs") if is_local else ("global", "; ".join(composition.domains) or "all inputs")
    )
    return UpperBound(level, log10_value if is_local else float(log10_value), True, terms, domain)


def _tightest(
    traced: Trace, likelihood: Likelihood, tightening: Tightening, head: Head, power: int, is_local: bool
) -> tuple[Composition, Tensor]:
    """Return the best of the compositions and its log value."""
    compositions = _compositions(traced, likelihood, tightening, is_local)
    values = [power * item.log_norm + head(item.head, traced.result) for item in compositions]
    best = min(range(len(values)), key=lambda index: float(values[index].detach().mean()))
    return compositions[best], values[best]


def _compositions(
    traced: Trace, likelihood: Likelihood, tightening: Tightening, is_local: bool = False
) -> list[Composition]:
    """Return the composition in the coordinates as they are, and the one in balanced coordinates if wanted."""
    scales: list[Mapping[fx.Node, Tensor] | None] = [None]
    if tightening.balancing_steps:
        scales.append(balanced_coordinates(traced, tightening, likelihood))
    norms = CertifiedNorms(tightening.dense)
    return [compose(traced, norms, tightening=tightening, is_local=is_local, output_scales=item) for item in scales]


def balanced_coordinates(trace: Trace, tightening: Tightening, likelihood: Likelihood) -> dict[fx.Node, Tensor]:
    """Return the coordinates ``(C,)`` of linear layers in which the bound is small, by a descent of Schatten norms."""
    norms = SchattenNorms()

    def log_bound(scales: Mapping[fx.Node, Tensor]) -> Tensor:
        composition = compose(trace, norms, tightening=tightening, differentiable=True, output_scales=scales)
        return 2 * composition.log_norm + log(likelihood.largest_curvature(composition.head))

    return balanced_scales(trace, tightening.balancing_steps, log_bound)


def traced_model(model: nn.Module, inputs: Tensor, likelihood: Likelihood) -> Trace:
    """Trace the evaluation behaviour of ``model``, in float64, after checking what was given."""
    check_inputs(inputs)
    if not isinstance(model, nn.Module):
        raise ValueError(f"A bound needs the weights of an nn.Module; got {type(model).__name__}.")
    with differentiable(inputs) as safe_inputs:
        module = deployed_module(model, torch.float64)
        with torch.no_grad(), Noise(inputs.device).replayed():
            return trace(module, safe_inputs.double(), partial(check_logits, likelihood=likelihood))


def _few(model: nn.Module, inputs: Tensor, likelihood: Likelihood) -> Trace:
    """Trace the model at as few of the inputs as it takes, for a bound that depends on their shape only."""
    if len(inputs) <= 2:
        return traced_model(model, inputs, likelihood)
    try:
        return traced_model(model, inputs[:2], likelihood)
    except (NoBoundError, ValueError):  # it may need all of them
        return traced_model(model, inputs, likelihood)


def _shares(composition: Composition, log_value: Tensor, log_head: Tensor, power: int) -> tuple[BoundTerm, ...]:
    leaves = [term.log_norm for term in composition.terms]
    slopes = torch.autograd.grad(log_value.mean(), leaves, allow_unused=True, materialize_grads=True) if leaves else ()
    terms = []
    for term, slope in zip(composition.terms, slopes, strict=True):
        log_norm = term.log_norm.detach()
        decades = float((slope * log_norm).nan_to_num(0.0, 0.0, 0.0).sum()) / math.log(10)
        terms.append(BoundTerm(term.name, term.layer, float(log_norm.exp().median()), decades))
    if composition.head is not None:
        decades = float(log_head.mean()) / math.log(10)
        norm = float((log_head / power).exp().median())
        terms.append(BoundTerm(composition.head_name, "Linear, with the softmax", norm, decades))
    return tuple(terms)
