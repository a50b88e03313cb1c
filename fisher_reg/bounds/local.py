"""Upper bounds at given inputs, and in a ball around each input."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fisher_reg.arguments import LIKELIHOOD, check_tightening
from fisher_reg.bounds.compositions import (
    checked_logits,
    checked_module,
    compositions_of,
    shares,
    tightest,
    traced_at_few,
    traced_model,
)
from fisher_reg.bounds.jacobians import (
    MAX_ROWS,
    Expansion,
    Rows,
    eigenvalue_at,
    expansion,
    num_examples,
    rows,
    rows_of,
    tangents_of,
)
from fisher_reg.bounds.operator_norms.measures import CertifiedNorms, KnownNorms
from fisher_reg.bounds.propagate import Composition
from fisher_reg.bounds.region import Region, check_radius
from fisher_reg.bounds.report import BoundTerm, UpperBound
from fisher_reg.bounds.sensitivity import log
from fisher_reg.bounds.tangents import Tangents
from fisher_reg.bounds.tightening import Tightening
from fisher_reg.bounds.tracing import Trace
from fisher_reg.bounds.tracing.compare import eager
from fisher_reg.errors import NoBoundError
from fisher_reg.estimate import fisher_spectral_norm
from fisher_reg.evaluation import InputStd, Noise, check_inputs, deployed, differentiable, standard_deviation
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.solvers import Lanczos

_SOLVER = Lanczos(num_steps=20, is_exact=True, tolerance=0.05, failure_probability=1e-6)
"""The solver of the interval for many classes."""
_NUM_HALVINGS = 7
"""Steps of the search for the largest radius, on a logarithmic axis."""


def local_fisher_bound(
    model: nn.Module,
    inputs: Tensor,
    *,
    radius: float | Tensor | None = None,
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    tightening: Tightening = Tightening(),
) -> UpperBound:
    r"""Bound the largest eigenvalue of the input-space Fisher matrix at the given inputs, or in a ball around each.

    Several certified values are computed, and the result is the smallest for each example; ``evidence`` names it.

    *At the inputs* (no ``radius``): ``"exact"``, from K backward passes in float64, for at most 32 logits; for more
    logits ``"interval"``, the upper end of the interval of an estimate, which fails with ``failure_probability`` 1e-6
    over the random numbers of the solver; and ``"product"``, the product of the norms of the layers at the input.

    *In a ball*: for every :math:`x'` with :math:`\|x' - x\|_2 \le r`, ``"expansion"``, the Jacobian at the input and a
    bound of its change in the ball (:mod:`fisher_reg.bounds.jacobians`; only for a categorical distribution with at
    most 32 classes), ``"product"`` with the norms over the ball, and ``"global"``. For inputs of up to 512 entries the
    product also uses the Jacobians of all values, which is tighter and slower.

    Args:
        model: As in :func:`lipschitz_bound`.
        inputs: ``(B, *S)``.
        radius: r, a positive number or one per example ``(B,)``, in input units, or in pixels with ``input_std``.
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        tightening: The certified improvements to use.

    Returns:
        A certified bound with values ``(B,)``, in nats per squared input unit. Cost: K backward passes, ten forwards
        and the norms of :func:`fisher_bound`; in a ball, memory for K times the values of the network.

    Raises:
        NoBoundError: In a ball, as in :func:`lipschitz_bound`. At the inputs, only for a model whose logits are random
            or depend on the other examples.
        ValueError: As in :func:`lipschitz_bound`, and for a radius that is not positive.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> local_fisher_bound(model, torch.tensor([[0.0, 0.0], [5.0, 0.0]])).value  # p (1 - p) |w0 - w1|^2
        tensor([1.0000e+00, 1.8158e-04], dtype=torch.float64)
        >>> local_fisher_bound(model, torch.tensor([[5.0, 0.0]]), radius=5.0).value  # the ball contains (0, 0)
        tensor([1.], dtype=torch.float64)
    """
    check_inputs(inputs)
    LIKELIHOOD.check(likelihood, "local_fisher_bound")
    check_tightening(tightening)
    std = standard_deviation(input_std, inputs)
    if radius is None:
        return _at_inputs(model, inputs, likelihood, std, tightening)
    check_radius(radius, len(inputs))
    radii = torch.as_tensor(radius, dtype=torch.float64, device=inputs.device).expand(len(inputs))
    parts = [around.candidates(radii[place]) for place, around in _parts(model, inputs, likelihood, std, tightening)]
    names = set.intersection(*(set(found) for found, _ in parts))
    candidates = {name: torch.cat([found[name].detach() for found, _ in parts]) for name in sorted(names)}
    return _smallest("local", candidates, parts[0][1], f"within {_said(radii)} of the given inputs")


def certified_radius(
    model: nn.Module,
    inputs: Tensor,
    *,
    uses_balls: bool = True,
    input_std: InputStd | None = None,
    tightening: Tightening = Tightening(),
) -> Tensor:
    r"""Return the Euclidean distance within which no perturbation changes the predicted class, per example.

    It is the largest r found for which every margin is larger than the largest change of the difference of the logits
    within r: for logits :math:`z = W h + b` and the predicted class :math:`y`

    .. math:: z_y - z_k > r\, \min\big(\|w_y - w_k\|\, \mathrm{Lip}_r(h),\; D_{yk} + P_{yk}(r)\big)
              \quad \text{for all } k ,

    with the Lipschitz constant in the ball, the norm D of the gradient of the difference at x, and its remainder P in
    the ball (:mod:`fisher_reg.bounds.jacobians`). It is at least the radius from the constant over all inputs. It holds
    against every attack on the function that the weights define in exact arithmetic. The network is evaluated in
    float64; if the prediction in its own precision differs, the radius is zero.

    Args:
        model: As in :func:`lipschitz_bound`.
        inputs: ``(B, *S)``.
        uses_balls: Whether constants in balls are used. Otherwise only the constant over all inputs is used, which is
            cheaper: one forward pass per example.
        input_std: If the inputs of the model are ``(pixels - mean) / std``, pass that ``std`` for a radius in pixels.
        tightening: The certified improvements to use.

    Returns:
        ``(B,)`` in input units, double precision; infinite if no perturbation can change the class. Cost: that of
        :func:`local_fisher_bound` in a ball, and 7 propagations through the graph.

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
    check_inputs(inputs)
    check_tightening(tightening)
    std = standard_deviation(input_std, inputs)
    radii, predicted = [], []
    with torch.inference_mode(False), torch.no_grad():
        for _, around in _parts(model, inputs, Categorical(), std, tightening):
            radii.append(around.radius() if uses_balls else around.radius_everywhere(is_required=True))
            predicted.append(around.logits.argmax(1))
    return torch.where(_own_classes(model, inputs) == torch.cat(predicted), torch.cat(radii), 0.0)


def certified_divergence(
    model: nn.Module,
    inputs: Tensor,
    radius: float | Tensor,
    *,
    input_std: InputStd | None = None,
    tightening: Tightening = Tightening(),
) -> Tensor:
    r"""Bound the KL divergence :math:`\mathrm{KL}(p_x \| p_{x'})` for every :math:`x'` within a Euclidean distance r.

    The bound is :math:`\tfrac12 \Lambda r^2` where :math:`\Lambda` bounds :math:`\lambda_\max(J^\top \Sigma(p) J)` for
    the Jacobians in the ball and *all* probabilities p, since J and p belong to different points of the segment. It is
    derived in :mod:`fisher_reg.bounds.jacobians`.

    Args:
        model: As in :func:`lipschitz_bound`.
        inputs: ``(B, *S)``.
        radius: r, a positive number or one per example, in input units, or in pixels with ``input_std``.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        tightening: The certified improvements to use.

    Returns:
        ``(B,)`` in nats, for a categorical distribution.

    Raises:
        NoBoundError: As in :func:`lipschitz_bound`.
        ValueError: As in :func:`local_fisher_bound`.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> certified_divergence(model, torch.tensor([[0.0, 0.0]]), 0.1)  # |w0 - w1|^2 / 4 * 0.1^2 / 2
        tensor([0.0050], dtype=torch.float64)
    """
    check_inputs(inputs)
    check_tightening(tightening)
    std = standard_deviation(input_std, inputs)
    check_radius(radius, len(inputs))
    radii = torch.as_tensor(radius, dtype=torch.float64, device=inputs.device).expand(len(inputs))
    parts = [
        around.largest_curvature(radii[place])
        for place, around in _parts(model, inputs, Categorical(), std, tightening)
    ]
    return 0.5 * radii.square() * torch.cat(parts)  # Lambda r^2 / 2


def _parts(
    model: nn.Module, inputs: Tensor, likelihood: Likelihood, input_std: Tensor | None, tightening: Tightening
) -> Generator[tuple[slice, _Around], None, None]:
    """Yield parts of the examples that are small enough for the Jacobians of all values to fit in memory."""
    norms = KnownNorms(CertifiedNorms(tightening.dense))
    first = traced_at_few(model, inputs, likelihood)
    if len(inputs) <= min(num_examples(first), len(first.result)):
        yield slice(0, len(inputs)), _Around(first, likelihood, input_std, tightening, norms)
        return
    size = min(num_examples(first), len(inputs))
    for start in range(0, len(inputs), size):
        place = slice(start, min(start + size, len(inputs)))
        traced = traced_model(model, inputs[place], likelihood)
        yield place, _Around(traced, likelihood, input_std, tightening, norms)


def _at_inputs(
    model: nn.Module, inputs: Tensor, likelihood: Likelihood, input_std: Tensor | None, tightening: Tightening
) -> UpperBound:
    module = checked_module(model, inputs)
    candidates: dict[str, Tensor] = {}
    terms: tuple[BoundTerm, ...] = ()
    with differentiable(inputs) as safe_inputs, Noise(inputs.device).replayed():
        point = safe_inputs.double()
        with torch.no_grad():
            logits = checked_logits(module, point, likelihood)
        is_finite = bool(logits.isfinite().all())
        if is_finite and logits.shape[1] <= MAX_ROWS:
            found = rows_of(lambda moved: eager(module, moved), point, input_std)
            candidates["exact"] = log(eigenvalue_at(found, likelihood))
        elif is_finite:
            candidates["interval"] = log(_upper_end(module, point, likelihood, input_std))
    try:
        around = _Around(traced_model(model, inputs, likelihood), likelihood, input_std, tightening)
        candidates["product"], terms = around.product(None)
    except NoBoundError:
        if not candidates:
            raise
    bound = _smallest("local", candidates, terms, "the given inputs")
    if "interval" not in bound.evidence:
        return bound
    return replace(bound, failure_probability=_SOLVER.failure_probability)


def _upper_end(module: nn.Module, point: Tensor, likelihood: Likelihood, input_std: Tensor | None) -> Tensor:
    """Return the upper end of the interval of an estimate in float64, ``(B,)``."""
    found = fisher_spectral_norm(module, point, likelihood=likelihood, input_std=input_std, solver=_SOLVER)
    return found.interval().upper


def _own_classes(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the classes that the model predicts in its own precision."""
    with torch.no_grad(), Noise(inputs.device).replayed(), differentiable(inputs) as safe_inputs:
        logits: Tensor = deployed(model, safe_inputs)(safe_inputs)
    return logits.argmax(1)


def _smallest(level: str, candidates: Mapping[str, Tensor], terms: tuple[BoundTerm, ...], domain: str) -> UpperBound:
    """Return the smallest of natural logarithms ``(B,)`` per example, by name."""
    names = list(candidates)
    values = torch.stack(torch.broadcast_tensors(*(candidates[name].detach() for name in names)))
    best = torch.where(values.isnan(), math.inf, values).min(0)
    if bool(best.values.isposinf().any()):
        raise NoBoundError("No finite bound was found: the numbers of this network overflow float64.")
    evidence = tuple(names[index] for index in best.indices.cpu().tolist())
    found = {name: value / math.log(10) for name, value in zip(names, values, strict=True)}
    return UpperBound(level, best.values / math.log(10), True, terms, domain, evidence, candidates=found)


def _said(radii: Tensor) -> str:
    low, high = float(radii.min()), float(radii.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


class _Around:
    """Bounds of a traced network at and around its examples.

    Args:
        traced: The network at the examples.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        tightening: The certified improvements to use.
    """

    def __init__(
        self,
        traced: Trace,
        likelihood: Likelihood,
        input_std: Tensor | None,
        tightening: Tightening,
        norms: KnownNorms | None = None,
    ) -> None:
        self.traced = traced
        self.likelihood = likelihood
        self.input_std = input_std
        self.tightening = tightening
        self.norms = KnownNorms(CertifiedNorms(tightening.dense)) if norms is None else norms
        self.centre = traced.values[traced.input]
        self.logits = traced.result.detach()
        self.pixel = 1.0 if input_std is None else 1 / float(input_std.min())
        self._rows: Rows | None = None

    @cached_property
    def tangents(self) -> Tangents:
        """The Jacobians of the values at the examples, if they fit in memory."""
        return tangents_of(self.traced)

    def compositions(self, radii: Tensor | None, is_local: bool = False) -> list[Composition]:
        """Return the compositions over the balls, at the inputs, or over all inputs."""
        region = None if radii is None else Region.ball(self.centre, radii, self.input_std)
        return compositions_of(
            self.traced,
            self.likelihood,
            self.tightening,
            is_local=is_local,
            region=region,
            norms=self.norms,
            tangents=None if region is None else self.tangents,
        )

    def product(self, radii: Tensor | None) -> tuple[Tensor, tuple[BoundTerm, ...]]:
        """Return the log of the product bound ``(B,)`` at the inputs or over balls, with the shares of the layers."""

        def head(composition: Composition, logits: Tensor) -> Tensor:
            return self._log_curvature(composition, radii)

        with torch.inference_mode(False), torch.enable_grad():
            found = self.compositions(radii, is_local=radii is None)
            composition, value = tightest(found, self.logits, head, 2)
            terms = shares(composition, value, head(composition, self.logits), 2)
        return value.detach() + 2 * math.log(self.pixel), terms

    def _log_curvature(self, composition: Composition, radii: Tensor | None) -> Tensor:
        """Return the log of the factor of head and likelihood, at the inputs or over balls."""
        at_inputs = self.likelihood.curvature_at(self.logits, composition.head)
        if radii is None:
            return log(at_inputs)
        anywhere = self.likelihood.largest_curvature(composition.head)
        if not isinstance(self.likelihood, Categorical):
            return log(anywhere)
        # q = max |w_j - w_k| Lip_r(h) r, with max |w_j - w_k| = 2 sqrt(largest curvature)
        change = 2 * anywhere.sqrt() * composition.log_norm.detach().exp() * radii * self.pixel
        return log(torch.minimum(anywhere, at_inputs * change.exp()))  # variances grow at most by e^q

    def candidates(self, radii: Tensor) -> tuple[dict[str, Tensor], tuple[BoundTerm, ...]]:
        """Return the logs of the bounds over balls by name, and the shares of the layers."""
        value, terms = self.product(radii)
        found = {"product": value.expand(len(radii))}
        expanded = self.expansion(radii)
        if expanded is not None:
            assert self._rows is not None
            found["expansion"] = log(expanded.eigenvalue(eigenvalue_at(self._rows, self.likelihood)))
        try:
            everywhere = self.compositions(None)
        except NoBoundError:
            return found, terms

        def head(composition: Composition, logits: Tensor) -> Tensor:
            return log(self.likelihood.largest_curvature(composition.head))

        _, log_value = tightest(everywhere, self.logits, head, 2)
        found["global"] = (log_value.detach() + 2 * math.log(self.pixel)).expand(len(radii))
        return found, terms

    def expansion(self, radii: Tensor) -> Expansion | None:
        """Return the Jacobian over balls; None for many logits or another likelihood."""
        if self.logits.shape[1] > MAX_ROWS or not isinstance(self.likelihood, Categorical):
            return None
        if not bool(self.logits.isfinite().all()):
            return None
        composition = self.compositions(radii)[0]
        assert composition.deviations is not None
        remainders = composition.deviations.remainders
        if self._rows is None:
            self._rows = rows(self.traced, [item.node for item in remainders], self.input_std)
        return expansion(self._rows, remainders, radii, self.pixel)

    def radius(self) -> Tensor:
        """Return the largest radius found within which no perturbation changes the class, ``(B,)``."""
        lowest = self.radius_everywhere()
        highest = torch.minimum(self.radius_of_gradient(), 1e6 * lowest.clamp_min(1e-300))
        searched = lowest.isfinite() & (lowest > 0) & (highest > lowest)
        if not bool(searched.any()):
            return lowest
        for step in range(_NUM_HALVINGS):
            middle = highest if step == 0 else (lowest * highest).sqrt()  # bisection of log r
            holds = self.holds(torch.where(searched, middle, torch.ones_like(middle))) & searched
            lowest = torch.where(holds, middle, lowest)
            highest = torch.where(searched & ~holds, middle, highest)
        return lowest

    def holds(self, radii: Tensor) -> Tensor:
        """Return whether no perturbation up to the radius can change the class, ``(B,)``."""
        holds = torch.zeros(len(radii), dtype=torch.bool, device=radii.device)
        for composition in self.compositions(radii):
            lipschitz = composition.log_norm.detach().exp() * self.pixel  # Lip_r(h)
            holds |= self._is_below_margin(radii, self._constants(composition.head) * lipschitz.view(-1, 1))
        expanded = self.expansion(radii)
        if expanded is not None:
            # D_yk + P_yk(r)
            slopes = (expanded.at_example + expanded.remainder)[range(len(radii)), self.logits.argmax(1)]
            holds |= self._is_below_margin(radii, slopes)
        return holds

    def _is_below_margin(self, radii: Tensor, slopes: Tensor) -> Tensor:
        margins = self._margins()
        predicted = self.logits.argmax(1, keepdim=True)
        below = radii[:, None] * slopes * (1 + 1e-9) < margins  # r slope_k < z_y - z_k
        return below.scatter(1, predicted, True).all(1)

    def _margins(self) -> Tensor:
        predicted = self.logits.argmax(1, keepdim=True)
        margins: Tensor = self.logits.gather(1, predicted) - self.logits
        return margins

    def _constants(self, head: Tensor | None) -> Tensor:
        """Return ``|w_y - w_k|`` for the predicted class ``y``, ``(B, K)``."""
        predicted = self.logits.argmax(1)
        if head is None:  # |e_y - e_k| = sqrt(2)
            return torch.full_like(self.logits, math.sqrt(2)).scatter(1, predicted[:, None], 0.0)
        return torch.cdist(head[predicted], head, compute_mode="donot_use_mm_for_euclid_dist")

    def radius_everywhere(self, is_required: bool = False) -> Tensor:
        """Return the radius from the constant over all inputs, ``(B,)``, or a small valid one if there is none."""
        best = torch.zeros(len(self.logits), dtype=torch.float64, device=self.logits.device)
        try:
            found = self.compositions(None)
        except NoBoundError:
            if is_required:
                raise
            return self._smallest_trial()
        for composition in found:
            slopes = self._constants(composition.head) * composition.log_norm.detach().exp() * self.pixel
            best = torch.maximum(best, self._radii(slopes))
        return best

    def _smallest_trial(self) -> Tensor:
        """Return a small valid radius, from which the search starts if there is no constant over all inputs."""
        trial = 1e-6 * self.radius_of_gradient().clamp_max(1e6)
        if not bool(trial.isfinite().all()) or not bool((trial > 0).any()):
            return torch.zeros_like(trial)
        trial = trial.clamp_min(1e-300)
        return torch.where(self.holds(trial), trial, 0.0)

    def radius_of_gradient(self) -> Tensor:
        """Return an upper limit of the radius: margin divided by the norm of the gradient at the input, ``(B,)``."""
        composition = self.compositions(torch.full_like(self.logits[:, 0], 1e-12))[0]
        assert composition.deviations is not None
        if self._rows is None and self.logits.shape[1] <= MAX_ROWS and bool(self.logits.isfinite().all()):
            nodes = [item.node for item in composition.deviations.remainders]
            self._rows = rows(self.traced, nodes, self.input_std)
        if self._rows is None:
            return torch.full_like(self.logits[:, 0], math.inf)
        predicted = self._rows.of_input[range(len(self.logits)), self.logits.argmax(1)][:, None]
        return self._radii(torch.linalg.vector_norm(self._rows.of_input - predicted, dim=2))

    def _radii(self, slopes: Tensor) -> Tensor:
        """Return ``min_k (z_y - z_k) / slope_k``, ``(B,)``."""
        margins = self._margins()
        predicted = self.logits.argmax(1, keepdim=True)
        ratios = torch.where(margins > 0, margins / slopes, 0.0)
        return ratios.scatter(1, predicted, math.inf).amin(1)

    def largest_curvature(self, radii: Tensor) -> Tensor:
        """Return the bound Lambda over balls and all probabilities, ``(B,)``."""
        best = torch.full_like(radii, math.inf)
        for composition in self.compositions(radii):
            curvature = Categorical().largest_curvature(composition.head)
            product = curvature * (composition.log_norm.detach().exp() * self.pixel).square()
            best = torch.minimum(best, product.expand_as(best))
        expanded = self.expansion(radii)
        return best if expanded is None else torch.minimum(best, expanded.largest_curvature)
