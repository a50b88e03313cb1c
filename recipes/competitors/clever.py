r"""CLEVER of Weng et al. (arXiv 1801.10578): a margin over a local Lipschitz constant from extreme value theory.

Let :math:`c` be the predicted class and :math:`g_j = z_c - z_j`. The maxima of the norms of :math:`\nabla g_j` at
random points of a ball around the image have, for large samples, a reverse Weibull distribution. Its upper end point is
the estimate :math:`L_j` of the Lipschitz constant in the ball, and the score is
:math:`\min_j \min(g_j(x) / L_j, \text{radius})`: an estimate, not a bound, of the distance to another class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisher_reg import deployed
from fisher_reg.sampling import fixed_generator, normal, uniform
from recipes.competitors.measures import class_gradients
from recipes.statistics.endpoints import upper_ends

_MAX_POINTS = 512
"""Largest number of points of the ball in one batch."""


@dataclass(frozen=True)
class Clever:
    """The score of a network at images; the defaults are those of the paper, with the pool of the toolbox.

    Attributes:
        radius: Radius of the ball, and the largest score, in pixel units.
        num_batches: Number of maxima in a fit.
        batch_size: Number of norms in a maximum.
        pool_factor: The norms are drawn, with replacement, from those at ``pool_factor * batch_size`` points. The paper
            uses ``num_batches * batch_size`` points instead.
        norm: 2 or infinity, the norm of the ball and the score; gradients are measured in the dual norm.

    Raises:
        ValueError: If a size is not positive, if there are fewer than three batches for the three parameters of the
            distribution, or for another norm.
    """

    radius: float = 5.0
    num_batches: int = 500
    batch_size: int = 1024
    pool_factor: int = 10
    norm: float = 2.0

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

        Each image takes a forward and ``K`` backward passes at ``pool_factor * batch_size`` points, and ``K - 1`` fits
        on the CPU.

        Args:
            network: From pixels in [0, 1] to logits ``(B, K)``; run in evaluation mode and not modified.
            images: ``(B, C, H, W)``, in [0, 1].
            generator: Generator of the points and batches, used image after image; by default a fixed one.

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
        """Draw indices ``(num_batches, batch_size)`` into the pool, with replacement."""
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
        ends = upper_ends(maxima.flatten(0, 1).cpu().numpy())
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
    """Return the maxima ``(K, num_batches)`` of the norms ``(N, K)`` at the indices ``(num_batches, batch_size)``."""
    return torch.stack([pool[batch].amax(0) for batch in batches], 1)
