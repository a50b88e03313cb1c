r"""CLEVER of Weng et al. (arXiv 1801.10578): a margin over a local Lipschitz constant from extreme value theory.

With :math:`c` the predicted class and :math:`g_j = z_c - z_j`, the norms of :math:`\nabla g_j` at random points of a
ball around the image have maxima whose law is, in the limit of large samples, a reverse Weibull. Its upper end is the
estimate :math:`L_j` of the Lipschitz constant in the ball, and the score is
:math:`\min_j \min(g_j(x) / L_j, \text{radius})`: an estimate, not a bound, of the distance to another class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.special import xlogy
from scipy.stats import kstwo
from torch import Tensor, nn

from fisher_reg import deployed
from fisher_reg.sampling import fixed_generator, normal, uniform
from recipes.competitors.measures import class_gradients

Array = np.ndarray[Any, Any]
Objective = Callable[[Array, Array], Array]

_MAX_POINTS = 512
"""Points of the ball held at once."""
_MAX_NUMBERS = 2**18
"""Maxima whose laws are fitted at once."""
_CALLS_PER_PARAMETER = 200
"""Evaluations in a minimisation, as many as ``scipy.optimize.fmin`` allows."""
_TOLERANCE = 1e-4
"""Of parameters and likelihood at convergence, as in ``scipy.optimize.fmin``."""
_OUTSIDE = 100 * math.log(np.finfo(float).max)
"""Added to the negative log-likelihood, as scipy does, for each observation that the law excludes."""


class EndpointFit(Protocol):
    """An estimator of the upper end of a law from maxima."""

    def endpoint(self, maxima: Array) -> Array:
        """Return the ends ``(M,)`` of the laws of ``M`` samples ``(M, n)``."""


@dataclass(frozen=True)
class ToolboxFit:
    """The fit of the adversarial-robustness-toolbox: one start, at shape 1 and the moments of the sample.

    Equal to ``-weibull_min.fit(-maxima, 1.0, optimizer=fmin)[1]``, all samples at once. Since scipy starts from moments
    that place part of the sample outside the law, this often ends below the largest maximum, and at times far above.
    """

    def endpoint(self, maxima: Array) -> Array:
        """Return the ends ``(M,)`` of the laws of ``M`` samples ``(M, n)``."""
        return _where_spread(maxima, lambda spread: -_fit(-spread, _moments(-spread, 1.0))[:, 1])


@dataclass(frozen=True)
class PublishedFit:
    """The fit of the authors' release: several starts on the rescaled sample, of which the best fit counts.

    The sample is brought to [0, 1], the likelihood less ``scale_weight`` times the squared scale is climbed from each
    shape, and the result with the largest p-value of the Kolmogorov-Smirnov test is taken; if none reaches 0.001, the
    largest maximum. Hundreds of maxima from one pool are full of ties and end there.
    """

    shapes: tuple[float, ...] = (0.1, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0)
    scale_weight: float = 0.01

    def endpoint(self, maxima: Array) -> Array:
        """Return the ends ``(M,)`` of the laws of ``M`` samples ``(M, n)``."""
        return _where_spread(maxima, self._best)

    def _best(self, maxima: Array) -> Array:
        top, width = maxima.max(1), np.ptp(maxima, axis=1)
        sample = np.sort((top[:, None] - maxima) / width[:, None], axis=1)
        starts = np.concatenate([_inside(sample, shape) for shape in self.shapes])
        fits = _fit(np.tile(sample, (len(self.shapes), 1)), starts, self.scale_weight)
        fits = fits.reshape(len(self.shapes), len(sample), 3)
        fitness = np.nan_to_num([_p_value(sample, fit) for fit in fits])
        best = fits[fitness.argmax(0), np.arange(len(sample))]
        return top - width * np.where(fitness.max(0) < 0.001, 0.0, best[:, 1])


@dataclass(frozen=True)
class Clever:
    """The score of a network at images; the defaults are those of the paper, with the toolbox's pool.

    Attributes:
        radius: Of the ball, and the largest score, in pixel units.
        num_batches: Maxima in a fit.
        batch_size: Norms in a maximum.
        pool_factor: The norms are drawn, with replacement, from those at ``pool_factor * batch_size`` points. The paper
            computes ``num_batches * batch_size`` instead.
        norm: 2 or infinity, of the ball and the score; the gradients are measured in the dual one.
        fit: Of the law of the maxima.

    Raises:
        ValueError: If a size is not positive, there are fewer than three batches for the three parameters of the law,
            or the norm is another.
    """

    radius: float = 5.0
    num_batches: int = 500
    batch_size: int = 1024
    pool_factor: int = 10
    norm: float = 2.0
    fit: EndpointFit = PublishedFit()

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(f"radius must be positive and finite, in pixel units; got {self.radius}.")
        for name, least in (("num_batches", 3), ("batch_size", 1), ("pool_factor", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        if self.norm not in {2, math.inf}:
            raise ValueError(f"norm must be 2 or math.inf; got {self.norm}.")

    def __call__(self, network: nn.Module, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Score each image.

        For each, ``pool_factor * batch_size`` points take a forward and ``K`` backward passes each, and ``K - 1`` laws
        are fitted, on the CPU.

        Args:
            network: From pixels in [0, 1] to logits ``(B, K)``; run in evaluation mode and left as it was.
            images: ``(B, C, H, W)``, in [0, 1].
            generator: Of the points and batches, drawn image after image; by default a fixed one.

        Returns:
            ``(B,)``, between 0 and ``radius``, in pixel units of ``norm``, without gradient.

        Raises:
            ValueError: As in :func:`fisher_reg.fisher_spectral_norm`.
        """
        generator = generator or fixed_generator()
        with torch.no_grad():
            logits = deployed(network, images)(images)
        maxima = [self._maxima(network, *pair, generator) for pair in zip(images, logits.argmax(1), strict=True)]
        return self.scores(logits, torch.stack(maxima))

    def points(self, image: Tensor, num_points: int, generator: torch.Generator) -> Tensor:
        """Draw points ``(num_points, C, H, W)`` uniformly in the ball around ``(C, H, W)``, and clip them to [0, 1]."""
        flat = image.new_empty(num_points, image.numel())
        if self.norm == 2:
            offsets = nn.functional.normalize(normal(flat, generator))
            offsets = offsets * uniform(flat[:, :1], generator) ** (1 / image.numel())
        else:
            offsets = 2 * uniform(flat, generator) - 1
        return (image + self.radius * offsets.view(-1, *image.shape)).clamp(0, 1)

    def batches(self, generator: torch.Generator) -> Tensor:
        """Draw the places ``(num_batches, batch_size)`` in the pool, with replacement."""
        sizes = (self.num_batches, self.batch_size)
        return torch.randint(self.pool_factor * self.batch_size, sizes, device=generator.device, generator=generator)

    def gap_slopes(self, network: nn.Module, points: Tensor, predicted: Tensor) -> Tensor:
        r"""Return the dual norms ``(N, K)`` of :math:`\nabla (z_c - z_j)` at the points, zero for :math:`j = c`."""
        dual = 2 if self.norm == 2 else 1
        parts = [
            torch.linalg.vector_norm(gradients[:, predicted, None] - gradients, dual, dim=2)
            for _, gradients in class_gradients(network, points)
        ]
        return torch.cat(parts)

    def scores(self, logits: Tensor, maxima: Tensor) -> Tensor:
        """Return the scores ``(B,)`` for logits ``(B, K)`` at the images and the maxima ``(B, K, num_batches)``."""
        ends = self.fit.endpoint(maxima.flatten(0, 1).cpu().numpy())
        lipschitz = torch.from_numpy(ends).to(logits).view_as(logits)
        predicted = logits.argmax(1, keepdim=True)
        gaps = logits.gather(1, predicted) - logits
        distances = torch.where(lipschitz == 0, torch.inf, gaps / lipschitz).where(gaps > 0, 0.0)
        return distances.scatter(1, predicted, torch.inf).amin(1).clamp(max=self.radius)

    def _maxima(self, network: nn.Module, image: Tensor, predicted: Tensor, generator: torch.Generator) -> Tensor:
        num_points = self.pool_factor * self.batch_size
        sizes = [min(_MAX_POINTS, num_points - start) for start in range(0, num_points, _MAX_POINTS)]
        pool = [self.gap_slopes(network, self.points(image, size, generator), predicted) for size in sizes]
        return batch_maxima(torch.cat(pool), self.batches(generator).to(image.device))


def batch_maxima(pool: Tensor, batches: Tensor) -> Tensor:
    """Return the maxima ``(K, num_batches)`` of the norms ``(N, K)`` at the places ``(num_batches, batch_size)``."""
    return torch.stack([pool[batch].amax(0) for batch in batches], 1)


def _where_spread(maxima: Array, fit: Callable[[Array], Array]) -> Array:
    """Fit the samples that have a spread beyond round-off; equal maxima are their own end."""
    ends = maxima.max(1).astype(float)
    spread = np.ptp(maxima, axis=1) > 16 * np.finfo(maxima.dtype).eps * ends
    rows, step = spread.nonzero()[0], max(1, _MAX_NUMBERS // maxima.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        ends[part] = fit(maxima[part])
    return ends


def _moments(sample: Array, shape: float) -> Array:
    """Return the starts ``(M, 3)`` of today's ``weibull_min.fit`` for shape 1: location and scale by moments."""
    scale = np.sqrt(sample.var(1).astype(float))
    return np.stack([np.full(len(sample), shape), sample.mean(1) - scale, scale], 1)


def _inside(sample: Array, shape: float) -> Array:
    """Return the starts ``(M, 3)`` that scipy used when CLEVER was published, whose laws contain the sample."""
    starts, least = _moments(sample, shape), sample.min(1)
    beyond = starts[:, 1] >= least
    starts[beyond, 1] = (least - 0.1 * np.ptp(sample, axis=1))[beyond]
    starts[beyond, 2] = 1.0
    return starts


def _p_value(sample: Array, fit: Array) -> Array:
    """Return the p-values ``(M,)`` of the Kolmogorov-Smirnov test of sorted samples ``(M, n)``."""
    n = sample.shape[1]
    shape, location, scale = fit.T[..., None]
    with np.errstate(over="ignore"):
        cdf = -np.expm1(-(((sample - location).clip(0) / scale) ** shape))
    steps = np.arange(n + 1) / n
    distance = np.maximum(steps[1:] - cdf, cdf - steps[:-1]).max(1)
    return np.asarray(kstwo.sf(distance, n))


def _fit(sample: Array, start: Array, scale_weight: float = 0.0) -> Array:
    """Return shapes, locations and scales ``(M, 3)`` of the Weibull laws that fit ``(M, n)`` best, from ``start``."""
    sample = sample.astype(float)

    def objective(parameters: Array, rows: Array) -> Array:
        shape, location, scale = parameters.T[..., None]
        with np.errstate(all="ignore"):
            y = (sample[rows] - location) / scale
            terms = np.log(shape) + xlogy(shape - 1, y) - y**shape
            allowed = (y >= 0) & np.isfinite(terms)
            loss = -np.where(allowed, terms, 0.0).sum(1) + _OUTSIDE * (~allowed).sum(1)
            loss = loss + sample.shape[1] * np.log(scale[:, 0]) + scale_weight * scale[:, 0] ** 2
        return np.where((shape > 0) & (scale > 0), loss[:, None], np.inf)[:, 0]

    return nelder_mead(objective, start)


def nelder_mead(objective: Objective, start: Array) -> Array:
    """Minimise ``M`` functions of ``d`` parameters at once, each on the path of ``scipy.optimize.fmin``.

    Args:
        objective: ``objective(parameters, rows)`` returns the values ``(m,)`` of the functions ``rows`` ``(m,)`` at
            ``(m, d)``.
        start: ``(M, d)``.

    Returns:
        The best corners ``(M, d)`` after at most ``200 d`` evaluations each.
    """
    count, num_parameters = start.shape
    max_calls = _CALLS_PER_PARAMETER * num_parameters
    corners = np.repeat(start[:, None], num_parameters + 1, 1)
    for place in range(num_parameters):
        moved = start[:, place]
        corners[:, place + 1, place] = np.where(moved != 0, 1.05 * moved, 0.00025)
    everyone = np.arange(count)
    values = np.stack([objective(corner, everyone) for corner in corners.swapaxes(0, 1)], 1)
    calls = np.full(count, num_parameters + 1)
    rows = everyone
    while len(rows):
        order = values[rows].argsort(1, kind="stable")
        corners[rows] = np.take_along_axis(corners[rows], order[..., None], 1)
        values[rows] = np.take_along_axis(values[rows], order, 1)
        with np.errstate(invalid="ignore"):  # inf - inf
            small = np.abs(corners[rows, 1:] - corners[rows, :1]).max((1, 2)) <= _TOLERANCE
            flat = np.abs(values[rows, 1:] - values[rows, :1]).max(1) <= _TOLERANCE
        rows = rows[~(small & flat) & (calls[rows] < _CALLS_PER_PARAMETER * corners.shape[2])]
        shrinking = _replace_worst(objective, corners, values, calls, rows)
        for place in range(1, num_parameters + 1):
            shrinking = shrinking[calls[shrinking] < max_calls]
            best = corners[shrinking, 0]
            corners[shrinking, place] = best + 0.5 * (corners[shrinking, place] - best)
            values[shrinking, place] = objective(corners[shrinking, place], shrinking)
            calls[shrinking] += 1
    return corners[:, 0]


def _replace_worst(objective: Objective, corners: Array, values: Array, calls: Array, rows: Array) -> Array:
    """Reflect, expand or contract the sorted simplices ``rows`` in place; return the rows that have to shrink."""
    centre, worst = corners[rows, :-1].sum(1) / (corners.shape[1] - 1), corners[rows, -1]
    reflected = 2 * centre - worst
    value = objective(reflected, rows)
    expands, is_fair, is_better = value < values[rows, 0], value < values[rows, -2], value < values[rows, -1]
    calls[rows] += 1
    again = (expands | ~is_fair) & (calls[rows] < _CALLS_PER_PARAMETER * corners.shape[2])
    weight = np.where(expands, 2.0, np.where(is_better, 0.5, -0.5))[:, None]
    other, other_value = (1 + weight) * centre - weight * worst, np.full(len(rows), np.inf)
    other_value[again] = objective(other[again], rows[again])
    calls[rows] += again
    bar = np.where(is_better, value, values[rows, -1])
    takes_other = again & ((other_value < bar) | (~expands & is_better & (other_value == bar)))
    takes_reflected = (expands & again & ~takes_other) | (is_fair & ~expands)
    for chosen, point, height in ((takes_other, other, other_value), (takes_reflected, reflected, value)):
        corners[rows[chosen], -1] = point[chosen]
        values[rows[chosen], -1] = height[chosen]
    return rows[again & ~takes_other & ~takes_reflected]
