r"""Output distributions: how a change of the logits changes the predicted distribution.

Each likelihood gives the Fisher matrix of its logits, :math:`\Sigma(z) = L^\top L`, by products with the factor
:math:`L`. Another distribution is another class with the members of :class:`Likelihood`.

Public: all of ``__all__``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fisher_reg.divergence import categorical_divergence
from fisher_reg.sampling import normal, uniform

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood"]


class Likelihood(Protocol):
    r"""The interface of an output distribution with logits ``(B, K)``.

    Attributes:
        min_outputs: Smallest ``K`` for which the distribution is not constant.
        shift_invariant: Whether the distribution stays the same when one number is added to all logits.

    With a class attribute ``leaves_out = True`` a logit of minus infinity is a class, or a label, with a probability of
    zero; without it such a logit is an error.
    """

    min_outputs: ClassVar[int]
    shift_invariant: ClassVar[bool]

    def whiten(self, logits: Tensor, tangent: Tensor) -> Tensor:
        r"""Apply :math:`L`, a factor of :math:`\Sigma = L^\top L`, to ``tangent`` ``(B, K)``."""

    def unwhiten(self, logits: Tensor, cotangent: Tensor) -> Tensor:
        r"""Apply :math:`L^\top` to ``cotangent`` ``(B, K)``."""

    def contrast(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the logit direction ``(B, K)`` that is expected to dominate, and its weight ``(B,)``.

        The direction :math:`c` carries no gradient and its weight :math:`\omega` does;
        :math:`\omega\,c c^\top \preceq \Sigma` for each example.
        """

    def divergence(self, logits: Tensor, moved: Tensor) -> Tensor:
        r"""Return :math:`\mathrm{KL}(p_z \,\|\, p_{z'})` ``(B,)`` in nats, with gradient to both."""

    def candidates(self, logits: Tensor, count: int) -> Tensor:
        """At most ``count`` logit directions ``(B, count, K)`` whose span is expected to contain the dominant one.

        The first is that of :meth:`contrast`.
        """

    def labels(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        r"""Draw labels :math:`y` under the model, as ``(B, K)`` :math:`w` with :math:`L^\top w = \nabla_z \log p(y)`.

        :math:`\mathrm{E}[w w^\top]` is the identity on the range of :math:`L`. The same random numbers serve all
        examples, so that none depends on the others in the batch.
        """

    def largest_curvature(self, rows: Tensor | None = None) -> Tensor:
        r"""Largest :math:`\lambda_\max(W^\top \Sigma(z) W)` over all logits, a scalar in double precision.

        ``rows`` is :math:`W` ``(K, D)``, the identity where it is None. The bound is reached for some logits.
        """

    def curvature_at(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        r"""Return :math:`\lambda_\max(W^\top \Sigma(z) W)` for each of ``(B, K)`` logits, ``(B,)``."""


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""One label out of ``K``: :math:`p = \mathrm{softmax}(z)`, :math:`\Sigma = \mathrm{diag}(p) - p p^\top`.

    With :math:`s = \sqrt p` the factor is :math:`L = (I - s s^\top)\,\mathrm{diag}(s)`. The root is taken as
    :math:`\exp(\tfrac12 \log p)`, so that value and gradient stay finite when the softmax saturates. Since
    :math:`L 1 = 0`, the entry of the most probable class is subtracted from a tangent, and the entries of
    :math:`L^\top u` are made to add up to zero. Otherwise the rounding error of that class would be larger than the
    small numbers of a saturated softmax.
    """

    min_outputs: ClassVar[int] = 2
    shift_invariant: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = True

    def whiten(self, logits: Tensor, tangent: Tensor) -> Tensor:
        """Apply ``L`` to a logit tangent, ``(B, K)`` to ``(B, K)``; other shapes ``(..., K)`` are broadcast."""
        root = _root_probabilities(logits)
        from_likeliest = tangent - tangent.take_along_dim(logits.argmax(-1, keepdim=True), -1)
        return _remove_component(root * from_likeliest, root)

    def unwhiten(self, logits: Tensor, cotangent: Tensor) -> Tensor:
        """Apply the transpose of ``L``, ``(B, K)`` to ``(B, K)``."""
        root, likeliest = _root_probabilities(logits), logits.argmax(1, keepdim=True)
        others = (root * _remove_component(cotangent, root)).scatter(1, likeliest, 0.0)
        return others.scatter(1, likeliest, -others.sum(1, keepdim=True))

    def contrast(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        r"""Contrast the two most probable classes: :math:`c = e_1 - e_2` with weight :math:`p_1 p_2`.

        :math:`v^\top \Sigma v = \sum_{j<k} p_j p_k (v_j - v_k)^2`, and this is the term of the largest weight.

        Returns:
            Direction ``(B, K)`` and weight ``(B,)``, zero where all classes but one are left out.
        """
        first, second = logits.topk(2, dim=1).indices.unbind(1)
        direction = torch.zeros_like(logits)
        direction.scatter_(1, first[:, None], 1.0).scatter_(1, second[:, None], -1.0)
        log_p = logits.log_softmax(1)
        pair = torch.stack([first, second], 1)
        return direction, log_p.gather(1, pair).sum(1).exp()

    def divergence(self, logits: Tensor, moved: Tensor) -> Tensor:
        r"""Return :math:`\sum_k p_k \log(p_k / p'_k)`, ``(B,)``, accurate even if it is far smaller than its terms."""
        return categorical_divergence(logits, moved)

    def candidates(self, logits: Tensor, count: int) -> Tensor:
        """Contrast of the two most probable classes, then indicators of the first, the third and further classes."""
        ranked = logits.topk(min(count + 1, logits.shape[1]), dim=1).indices
        indicators = torch.nn.functional.one_hot(ranked, logits.shape[1]).to(logits)
        contrast = indicators[:, :1] - indicators[:, 1:2]
        return torch.cat([contrast, indicators[:, :1], indicators[:, 2:]], 1)[:, :count]

    def labels(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        r"""Draw one label per example: :math:`w = e_y / \sqrt{p_y}`, ``(B, K)``."""
        probabilities = logits.double().softmax(1)
        quantile = uniform(probabilities[0, :1], generator)
        # the inverse distribution function; rounding may leave the last sum below one
        label = (probabilities.cumsum(1) <= quantile).sum(1, keepdim=True)
        label = torch.minimum(label, _last_possible(probabilities))
        return torch.zeros_like(logits).scatter_(1, label, probabilities.gather(1, label).rsqrt().to(logits))

    def largest_curvature(self, rows: Tensor | None = None) -> Tensor:
        r"""Return :math:`\tfrac14 \max_{jk} \|w_j - w_k\|^2`, 1/2 for the identity.

        :math:`v^\top W^\top \Sigma W v` is the variance of :math:`w_k^\top v` over the labels. By Popoviciu's
        inequality it is at most a quarter of the squared range. Two labels with probabilities 1/2 attain it.
        """
        if rows is None:
            return torch.tensor(0.5, dtype=torch.float64)
        return largest_distance(rows.double()).square() / 4

    def curvature_at(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        r"""Return the largest eigenvalue of :math:`(L W)^\top L W`.

        Without rows it is never below the true value, at most 1e-12 of it above, and has first derivatives only.
        """
        if rows is not None:
            return _whitened_curvature(self, logits, rows)
        logits = logits.double()
        value, direction = _largest_variance(logits.detach().softmax(1))
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return value
        variance = self.whiten(logits, direction).square().sum(1)
        return value + (variance - variance.detach())


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    r"""``K`` independent yes/no labels: :math:`p = \mathrm{sigmoid}(z)`, :math:`\Sigma = \mathrm{diag}(p(1-p))`."""

    min_outputs: ClassVar[int] = 1
    shift_invariant: ClassVar[bool] = False
    leaves_out: ClassVar[bool] = True

    def whiten(self, logits: Tensor, tangent: Tensor) -> Tensor:
        """Apply ``L``, which is diagonal, to a logit tangent ``(B, K)``; other shapes ``(..., K)`` are broadcast."""
        return _root_bernoulli_variance(logits) * tangent

    def unwhiten(self, logits: Tensor, cotangent: Tensor) -> Tensor:
        """Apply the transpose of ``L``, which is ``L``, to a cotangent ``(B, K)``."""
        return self.whiten(logits, cotangent)

    def contrast(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indicator of the least certain label, with weight ``p (1 - p)``."""
        variance = _root_bernoulli_variance(logits).square()
        uncertain = logits.abs().argmin(1, keepdim=True)
        return torch.zeros_like(logits).scatter_(1, uncertain, 1.0), variance.gather(1, uncertain).squeeze(1)

    def divergence(self, logits: Tensor, moved: Tensor) -> Tensor:
        """Add the divergences of the ``K`` labels, ``(B,)``, each that of two classes with logits ``z`` and 0."""
        before, after = (torch.stack([z, torch.zeros_like(z)], -1).flatten(0, 1) for z in (logits, moved))
        return categorical_divergence(before, after).view_as(logits).sum(1)

    def candidates(self, logits: Tensor, count: int) -> Tensor:
        """Indicators of the ``count`` least certain labels."""
        ranked = (-logits.abs()).topk(min(count, logits.shape[1]), dim=1).indices
        return torch.nn.functional.one_hot(ranked, logits.shape[1]).to(logits)

    def labels(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        r"""Draw every label: :math:`w = (y - p) / \sqrt{p(1-p)} = \pm e^{\mp z/2}`, ``(B, K)``."""
        is_one = uniform(logits[0], generator) < logits.sigmoid()
        return torch.where(is_one, (-0.5 * logits).exp(), -(0.5 * logits).exp())

    def largest_curvature(self, rows: Tensor | None = None) -> Tensor:
        """Return a quarter of the squared norm of ``W``, reached at ``p = 1/2``."""
        return 0.25 * _squared_norm(rows)

    def curvature_at(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        r"""Return the largest eigenvalue of :math:`(L W)^\top L W`, without rows the largest variance."""
        if rows is None:
            return _root_bernoulli_variance(logits.double()).square().amax(1)
        return _whitened_curvature(self, logits, rows)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""Regression with mean :math:`z` and fixed variance: :math:`\Sigma = I / \sigma^2`.

    Args:
        variance: :math:`\sigma^2`, in squared output units.
    """

    variance: float = 1.0
    min_outputs: ClassVar[int] = 1
    shift_invariant: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ValueError(f"Gaussian needs a positive variance; got {self.variance}.")

    def whiten(self, logits: Tensor, tangent: Tensor) -> Tensor:
        """Divide a tangent ``(B, K)`` by the standard deviation."""
        return tangent / math.sqrt(self.variance)

    def unwhiten(self, logits: Tensor, cotangent: Tensor) -> Tensor:
        """Divide a cotangent ``(B, K)`` by the standard deviation."""
        return cotangent / math.sqrt(self.variance)

    def contrast(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the direction of the mean of all outputs, with weight ``1 / variance``: all outputs are equal."""
        direction = torch.full_like(logits, logits.shape[1] ** -0.5)
        return direction, logits.new_full(logits.shape[:1], 1 / self.variance)

    def divergence(self, logits: Tensor, moved: Tensor) -> Tensor:
        """Return half of the squared distance of the means over the variance, ``(B,)``."""
        return (moved - logits).square().sum(1) / (2 * self.variance)

    def candidates(self, logits: Tensor, count: int) -> Tensor:
        """Mean of all outputs, then single outputs: all outputs are equal."""
        num_outputs = logits.shape[1]
        mean = torch.full_like(logits[:1], 1 / num_outputs)
        single = torch.eye(min(count, num_outputs) - 1, num_outputs, dtype=logits.dtype, device=logits.device)
        return torch.cat([mean, single]).expand(len(logits), -1, -1)

    def labels(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the outputs: standard normal ``(B, K)``."""
        return normal(logits[0], generator).expand_as(logits)

    def largest_curvature(self, rows: Tensor | None = None) -> Tensor:
        """Return the squared norm of ``W`` over the variance, at all logits."""
        return _squared_norm(rows) / self.variance

    def curvature_at(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the same for each example."""
        return self.largest_curvature(rows).expand(len(logits))


def largest_distance(rows: Tensor) -> Tensor:
    """Return the largest Euclidean distance between two rows of ``(K, D)``, differentiable, zero for equal ones.

    The pair is found with matrix products, block by block, and its distance is computed from the difference. Another
    pair may be farther apart only by round-off, ``4 D`` units in the last place of a double.
    """
    with torch.no_grad():
        offsets = rows.detach().double() - rows[0].detach()
        scale = float(offsets.abs().amax())
        first, second = _farthest_pair(offsets / scale) if 0 < scale < math.inf else (0, 0)
    difference = rows[first] - rows[second] if math.isfinite(scale) else rows  # infinite rows have no farthest pair
    distance: Tensor = torch.linalg.vector_norm(difference)
    return distance


_MAX_NUMBERS = 2**17  # doubles per block: 1 MiB, so that a few blocks fit into the caches
_MAX_ROWS = 256  # in a block; more would count most pairs twice


def _farthest_pair(rows: Tensor) -> tuple[int, int]:
    """Return the indices of the two rows that are farthest apart.

    One row is zero, so no row is longer than the largest distance, which is therefore free of cancellation.
    """
    squares = rows.square().sum(1)
    largest, pair = 0.0, (0, 0)
    size = max(1, min(_MAX_ROWS, _MAX_NUMBERS // len(rows)))
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        distances = squares[start : start + size, None] + squares[start:] - 2 * block @ rows[start:].mT
        place = distances.argmax()
        # read together, so that the host waits for the device once; a double represents the index exactly
        found, number = torch.stack([distances.take(place), place.double()]).cpu().tolist()
        if found > largest:
            row, column = divmod(int(number), distances.shape[1])
            largest, pair = found, (start + row, start + column)
    return pair


def _last_possible(probabilities: Tensor) -> Tensor:
    """Return the last class with a probability above zero, ``(B, 1)``."""
    classes = torch.arange(probabilities.shape[1], device=probabilities.device)
    return torch.where(probabilities > 0, classes, 0).amax(1, keepdim=True)


def _root_probabilities(logits: Tensor) -> Tensor:
    return (0.5 * logits.log_softmax(-1)).exp()


def _root_bernoulli_variance(logits: Tensor) -> Tensor:
    log_sigmoid = torch.nn.functional.logsigmoid
    return (0.5 * (log_sigmoid(logits) + log_sigmoid(-logits))).exp()


def _squared_norm(rows: Tensor | None) -> Tensor:
    if rows is None:
        return torch.ones((), dtype=torch.float64)
    norm: Tensor = torch.linalg.matrix_norm(rows.double(), 2)
    return norm.square()


def _whitened_curvature(likelihood: Categorical | Bernoulli, logits: Tensor, rows: Tensor) -> Tensor:
    """Return the squared spectral norms of ``L W`` ``(K, D)``, from Gram matrices on the shorter side."""
    columns = rows.double().mT[None]
    largest = []
    for chunk in logits.double().split(max(1, _MAX_NUMBERS // columns.numel())):
        factor = likelihood.whiten(chunk[:, None], columns)
        short = factor if factor.shape[1] <= factor.shape[2] else factor.mT
        largest.append(torch.linalg.eigvalsh(short @ short.mT)[:, -1])
    return torch.cat(largest).clamp_min(0)


_BISECTIONS = 54  # of an interval whose ends differ by a factor of two at most
_SLACK = 1e-13  # larger than the rounding error of a sum of probabilities


def _largest_variance(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the largest eigenvalue of :math:`\mathrm{diag}(p) - p p^\top` and its unit eigenvector.

    For the largest probability :math:`p_1` and :math:`q = \sum_{k>1} p_k` it is the root of the secular equation

    .. math:: \lambda - p_1 q = (p_1 - \lambda) \sum_{k>1} \frac{p_k^2}{\lambda - p_k}

    between :math:`\max(p_2, p_1 q)` and :math:`\min(p_1, 2 p_1 q)`, which are those of interlacing, of the first
    diagonal entry and of Gershgorin's discs. No term cancels, however close to one :math:`p_1` is.

    Args:
        probabilities: ``(B, K)`` in double precision.

    Returns:
        Eigenvalues ``(B,)``, the upper ends of bisections, and vectors ``(B, K)``, zero where the eigenvalue is.
    """
    first, likeliest = probabilities.max(1, keepdim=True)
    others = probabilities.scatter(1, likeliest, 0.0)
    spread = first * others.sum(1, keepdim=True)
    low, high = torch.maximum(others.amax(1, keepdim=True), spread), torch.minimum(first, 2 * spread)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_below = (first - middle) * (others * (others / (middle - others))).sum(1, keepdim=True) > middle - spread
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    numbers = torch.finfo(high.dtype)
    gaps = torch.maximum(high - others, (numbers.eps * high).clamp_min(numbers.tiny))
    rest = others / gaps
    vector = rest.scatter(1, likeliest, -rest.sum(1, keepdim=True))  # its entries add up to zero
    return high.squeeze(1) * (1 + _SLACK), torch.nn.functional.normalize(vector, dim=1)


def _remove_component(vector: Tensor, unit: Tensor) -> Tensor:
    return vector - unit * (unit * vector).sum(-1, keepdim=True)
