r"""Bounds from the Jacobian at the example: exact there, and with a remainder in a ball around it.

Let the trace be a graph of layers :math:`l` with Jacobians :math:`J_l(x)`, and :math:`b_l` a row of the Jacobian of the
logits with respect to the output of layer l, at the example x. The change of a product of Jacobians is a telescoping
sum: in each term one factor is replaced by its change, the factors after it are those at :math:`x`, and the factors
before it are those at :math:`x'`:

.. math:: J(x') - J(x) = \sum_l \frac{\partial z}{\partial h_l}(x)\, (J_l(x') - J_l(x))\,
          \frac{\partial h_{l-1}}{\partial x}(x') .

Affine layers do not change. For an activation the change is a diagonal matrix of entries at most :math:`\rho_i`, the
change of its slope over the interval that its input can reach (:mod:`fisher_reg.bounds.deviations`), and the factor
before it is at most the Lipschitz constant :math:`L_l` over the ball. So for the row :math:`c = e_j - e_k` of two
labels

.. math:: \|c^\top (J(x') - J(x))\| \le P_{jk} := \sum_l \|(b_{lj} - b_{lk}) \odot \rho_l\|\, L_l .

This needs K backward passes at x and the norms of the weights. With :math:`D_{jk} = \|c^\top J(x)\|`:

- The Lipschitz constant of a difference of logits in the ball is at most :math:`D_{jk} + P_{jk}`, so that the class y
  cannot change while :math:`r (D_{yk} + P_{yk})` is below the margin to every k
  (:func:`~fisher_reg.certified_radius`).
- The largest change of a difference of logits is :math:`q = r \max_{jk} (D_{jk} + P_{jk})`, and no probability grows
  by more than :math:`e^q`. The variance over labels of a function f is at most :math:`e^q` times that at x, since
  :math:`\mathrm{Var}_{p'}(f) \le E_{p'} (f - E_p f)^2`, and is :math:`\tfrac12 \sum_{jk} p_j p_k (f_j - f_k)^2`, at
  most a quarter of the squared range. A standard deviation is a seminorm, so that

.. math:: \sqrt{\lambda(x')} \le \sqrt{\min(e^q \lambda(x), \tfrac14 \max D^2)}
          + \sqrt{\min(e^{2q}\, \tfrac12 \textstyle\sum p_j p_k P_{jk}^2, \tfrac14 \max P^2)} .

- The KL divergence along the segment from x to x' has the derivative :math:`(p_t - p_0)^\top \dot z_t = \int_0^t
  \dot z_s^\top \Sigma(p_s) \dot z_t\, ds`, at most :math:`\Lambda t \|x' - x\|^2` where :math:`\Lambda = \tfrac14
  \max_{jk} (D_{jk} + P_{jk})^2` bounds :math:`v^\top J^\top \Sigma(p) J v` for all points and all p. So
  :math:`\mathrm{KL}(p_x \| p_{x'}) \le \tfrac12 \Lambda r^2`.

References: Zhang, Zhang, Hsieh (2019), "RecurJac", arXiv 1810.11783, and Shi et al. (2022), "Efficiently computing
local Lipschitz constants of neural networks via bound propagation", arXiv 2210.07394, also bound the Jacobian over a
region, by recursion; the telescoping sum here needs only the norms of the intermediate Jacobians.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad

from fisher_reg.bounds.deviations import Remainder
from fisher_reg.bounds.tangents import Tangents
from fisher_reg.bounds.tracing import Trace
from fisher_reg.bounds.tracing.functional import Run
from fisher_reg.evaluation import twice_differentiable
from fisher_reg.likelihood import Likelihood

MAX_ROWS = 32
"""The largest number of logits for which the Jacobian at the example is formed, one backward pass each."""


@dataclass(frozen=True)
class Rows:
    """The Jacobian of the logits at the examples, with respect to the input and to the outputs of layers.

    Attributes:
        logits: ``(B, K)``.
        of_input: ``(B, K, d)``, with respect to pixels if an ``input_std`` is given.
        of_layers: ``(B, K, n)`` for each of the layers; ``(1, K, B n)`` if the output has no axis of examples.
    """

    logits: Tensor
    of_input: Tensor
    of_layers: dict[fx.Node, Tensor]


def rows(trace: Trace, layers: Sequence[fx.Node], input_std: Tensor | None = None) -> Rows:
    """Return the rows of the Jacobian at the examples: one forward and K backward passes in float64."""
    run = Run(trace.module)
    with torch.enable_grad():
        point = trace.values[trace.input].detach().clone().requires_grad_()
        logits = run(point)
        targets = [point, *(run.values[node] for node in layers)]
        found: list[list[Tensor]] = [[] for _ in targets]
        for number in range(logits.shape[1]):
            gradients = torch.autograd.grad(
                logits[:, number].sum(), targets, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for kept, gradient in zip(found, gradients, strict=True):
                kept.append(gradient)
    size = len(point)
    of_input = _in_pixels(torch.stack([gradient.flatten(1) for gradient in found[0]], 1), point, input_std)
    apart = {
        node: torch.stack([gradient.reshape(size if node in trace.batched else 1, -1) for gradient in kept], 1)
        for node, kept in zip(layers, found[1:], strict=True)
    }
    return Rows(logits.detach(), of_input, apart)


def rows_of(function: Callable[[Tensor], Tensor], inputs: Tensor, input_std: Tensor | None = None) -> Rows:
    """Return the rows of the Jacobian of a function at the examples, with respect to its input only."""
    with torch.enable_grad():
        point = inputs.detach().clone().requires_grad_()
        logits = function(point)
        outputs = logits.sum(0) if logits.requires_grad else ()  # the logits may be constant
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        gradients = [torch.autograd.grad(output, point, **options)[0] for output in outputs]
        gradients = gradients or [torch.zeros_like(point)] * logits.shape[1]
    of_input = torch.stack([gradient.flatten(1) for gradient in gradients], 1)
    return Rows(logits.detach(), _in_pixels(of_input, inputs, input_std), {})


def tangents_of(trace: Trace) -> Tangents:
    """Return the Jacobians of the values at the examples, ``(B, d, *S)``: d forward-mode passes.

    The result is empty if the Jacobians would need too much memory, or if the graph has no forward mode: because of a
    layer without a forward derivative, or of a view that is not possible in the memory layout of the tangents.
    """
    point = trace.values[trace.input]
    nodes, size = _values(trace), point[0].numel()
    if size > _MAX_INPUTS or size * sum(trace.values[node].numel() for node in nodes) > 2 * _MAX_NUMBERS:
        return Tangents({})
    found: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
    run = Run(trace.module)
    basis = torch.eye(size, dtype=point.dtype, device=point.device).view(size, *point.shape[1:])
    together = max(1, _MAX_BATCH // len(point)) if trace.takes_other_sizes else 1
    try:
        with torch.no_grad(), twice_differentiable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own scripts at the first dual number
            for directions in basis.split(together):
                count = len(directions)
                points = point.repeat(count, *[1] * (point.ndim - 1))
                with forward_ad.dual_level():
                    run(forward_ad.make_dual(points, directions.repeat_interleave(len(point), 0)))
                    for node, kept in found.items():
                        primal, tangent = forward_ad.unpack_dual(run.values[node])
                        moved = torch.zeros_like(primal) if tangent is None else tangent.clone()
                        kept.append(moved.view(count, *trace.values[node].shape))
    except RuntimeError:
        return Tangents({})
    return Tangents({node: torch.cat(kept).transpose(0, 1) for node, kept in found.items()})


_MAX_INPUTS = 512
"""Largest number of entries of an input for which the Jacobians of all values are formed."""
_MAX_BATCH = 128
"""Largest product of the numbers of examples and directions in one pass."""


def num_examples(trace: Trace) -> int:
    """Return the number of examples for which the Jacobians of all values fit in memory.

    It is unlimited (2**31) if the Jacobians of a single example do not fit, since they are then not formed.
    """
    size = trace.values[trace.input][0].numel()
    if size > _MAX_INPUTS:
        return 2**31
    per_example = size * sum(trace.values[node].numel() for node in _values(trace)) // len(trace.result)
    return 2**31 if per_example > _MAX_NUMBERS else _MAX_NUMBERS // max(per_example, 1)


_MAX_NUMBERS = 2**27
"""Largest number of entries of Jacobians in memory (1 GiB)."""


def _values(trace: Trace) -> list[fx.Node]:
    """Return the nodes whose value is a tensor per example."""
    nodes = [node for node in trace.graph.nodes if node in trace.batched and _is_real(trace.values[node])]
    return [node for node in nodes if node.op not in ("output", "get_attr")]


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _in_pixels(of_input: Tensor, inputs: Tensor, input_std: Tensor | None) -> Tensor:
    if input_std is None:
        return of_input
    return of_input / input_std.to(of_input).expand(inputs.shape[1:]).flatten()


def eigenvalue_at(found: Rows, likelihood: Likelihood) -> Tensor:
    """Return the largest eigenvalue of F at the examples ``(B,)``, from the rows of A, rounded up."""
    size, num_outputs, num_inputs = found.of_input.shape
    repeated = found.logits.repeat_interleave(num_inputs, 0)
    columns = found.of_input.transpose(1, 2).reshape(-1, num_outputs)
    whitened = likelihood.whiten(repeated, columns).view(size, num_inputs, num_outputs)
    # whitened = A^T, (B, d, K); A A^T or A^T A
    gram = whitened.mT @ whitened if num_outputs <= num_inputs else whitened @ whitened.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    largest: Tensor = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0) + _ROUNDING * trace
    return largest * (1 + _ROUNDING)


_ROUNDING = 1e-10
"""Assumed relative error of a Jacobian in float64, much larger than that of any network tested."""


@dataclass(frozen=True)
class Expansion:
    r"""The Jacobian in a ball: that at the example, and a bound of its change.

    Attributes:
        logits: ``(B, K)`` at the example.
        at_example: :math:`D_{jk}`, ``(B, K, K)``.
        remainder: :math:`P_{jk}`, ``(B, K, K)``.
        radius: r, ``(B,)``.
    """

    logits: Tensor
    at_example: Tensor
    remainder: Tensor
    radius: Tensor

    @property
    def change(self) -> Tensor:
        r"""The largest change of a difference of two logits, :math:`q = r \max_{jk} (D_{jk} + P_{jk})`, ``(B,)``."""
        return self.radius * (self.at_example + self.remainder).flatten(1).amax(1)

    def eigenvalue(self, at_example: Tensor) -> Tensor:
        r"""Return the bound of :math:`\lambda` in the ball ``(B,)`` from that at the example."""
        pairs = self.logits.softmax(1)
        weights = 0.5 * pairs[:, :, None] * pairs[:, None, :]  # p_j p_k / 2
        growth = self.change.exp()  # e^q
        # min(e^q lambda(x), max D^2 / 4)
        first = torch.minimum(growth * at_example, self.at_example.square().flatten(1).amax(1) / 4)
        # min(e^{2q} sum_jk p_j p_k P_jk^2 / 2, max P^2 / 4)
        averaged = growth.square() * (weights * self.remainder.square()).flatten(1).sum(1)
        second = torch.minimum(averaged, self.remainder.square().flatten(1).amax(1) / 4)
        return torch.nan_to_num(first.sqrt() + second.sqrt(), nan=math.inf).square()

    @property
    def largest_curvature(self) -> Tensor:
        r"""The bound :math:`\Lambda = \tfrac14 \max_{jk} (D_{jk} + P_{jk})^2` for all probabilities ``(B,)``."""
        return (self.at_example + self.remainder).square().flatten(1).amax(1) / 4


def expansion(found: Rows, remainders: Sequence[Remainder], radius: Tensor, pixel: float = 1.0) -> Expansion:
    """Return the Jacobian in a ball.

    Args:
        found: The rows at the examples, for the layers of all remainders.
        remainders: The remainders over the ball of the layers that are not affine.
        radius: ``(B,)``, in the unit of the rows of the input.
        pixel: Factor from a Lipschitz constant with respect to the network's input to one with respect to pixels.
    """
    at_example = _distances(found.of_input)  # D_jk
    total = torch.zeros_like(at_example)
    for remainder in remainders:
        layer = found.of_layers[remainder.node]
        weights = remainder.weights.reshape(len(layer), 1, -1) if remainder.weights.ndim else remainder.weights
        lengths = (remainder.log_norm.exp() * pixel).reshape(-1, 1, 1)  # L_l
        scaled = _distances(layer * weights)  # ||(b_lj - b_lk) * rho_l||
        total = total + torch.where(scaled > 0, scaled * lengths, 0.0)
    return Expansion(found.logits, at_example, total * (1 + _ROUNDING), radius)


def _distances(vectors: Tensor) -> Tensor:
    """Return the distances between the rows of ``(B, K, n)``, without the cancellation in a Gram matrix."""
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
