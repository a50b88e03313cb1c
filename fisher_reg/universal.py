r"""The mean Fisher matrix of a data set: its largest eigenvalue and the universal direction.

The search works in the input space :math:`\mathbb{R}^d`, whose dimension does not depend on the number of inputs: a
product with the mean matrix is one pass through the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_reg.arguments import LIKELIHOOD, SOLVER
from fisher_reg.estimate import evaluation_operator
from fisher_reg.evaluation import InputStd, LogitsFunction, check_input_std
from fisher_reg.left_out import present
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.operator import InputFisher
from fisher_reg.sampling import fixed_generator, normal, signs
from fisher_reg.solvers import EigenResult, Lanczos, PowerIteration, Solver, unit
from fisher_reg.solvers.interval import RandomStart
from fisher_reg.solvers.linalg import check_finite

Batches = Iterable[Tensor | Sequence[Tensor]]


def universal_spectral_norm(
    model: LogitsFunction,
    batches: Batches,
    *,
    solver: Solver = Lanczos(num_steps=20, rtol=1e-2),
    likelihood: Likelihood = Categorical(),
    input_std: InputStd | None = None,
    generator: torch.Generator | None = None,
) -> EigenResult:
    r"""Estimate :math:`\lambda_\max(\operatorname{mean}_x F(x))` over a data set, and its universal direction.

    ``eigenvalue / 2 * eps**2`` is, to second order, the largest mean KL divergence that *one* perturbation of length
    ``eps``, the same for all inputs, can cause. In the mean of :func:`fisher_reg.fisher_spectral_norm` each input has
    its own direction instead. Since :math:`\lambda_\max` is convex,

    .. math:: \lambda_\max(\operatorname{mean}_x F(x)) \le \operatorname{mean}_x \lambda_\max(F(x)) .

    It is computed by a symmetric block Lanczos iteration with full reorthogonalisation. Each step is one pass through
    all batches: one forward of each batch, and a forward-mode and a backward pass for each of ``num_starts`` vectors,
    at least three. The start vectors need two more passes: they are VJPs with random signs on all outputs, whose
    components along the eigenvectors are proportional to the roots of the eigenvalues. One more pass gives
    ``left_singular_vector``. If the largest eigenvalues nearly coincide, the iteration may stop at the second one.

    Memory: ``2 num_starts`` vectors of ``d`` numbers per step, one number per input, the ``N K`` numbers of
    ``left_singular_vector``, and the memory of one batch.

    Args:
        model: As in :func:`fisher_reg.fisher_spectral_norm`, like all arguments that are not explained here.
        batches: Inputs ``(B, *S)``, or sequences whose first item they are; iterable several times, each time with the
            same inputs in the same order (a list, or a loader without shuffling and augmentation), on the model's
            device.
        solver: :class:`Lanczos` or :class:`PowerIteration`, which has a single start vector.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        generator: Generator of the start vectors.

    Returns:
        Fields with a leading axis of length 1; ``eigenvector`` :math:`v` is ``(1, *S)``, and ``left_singular_vector``
        ``(1, N K)``. ``eigenvalue`` is :math:`\theta = v^\top F v` in nats per squared input unit, never above the true
        value beyond round-off; ``residual`` is :math:`\|F v - \theta v\|`, within which an eigenvalue lies.
        ``converged`` means that the residual is small after at least one step from dense random start vectors; an upper
        end of ``interval`` needs the trace, the mean of :func:`fisher_reg.fisher_trace`.

    Raises:
        TypeError: For another solver.
        ValueError: As in :func:`fisher_reg.fisher_spectral_norm`; if ``batches`` can be iterated only once or is empty;
            or if a later pass gives other logits than the first.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> universal_spectral_norm(lambda x: x @ weight.T, [torch.zeros(3, 2), torch.zeros(1, 2)]).eigenvalue
        tensor([1.0000])
    """
    SOLVER.check(solver, "universal_spectral_norm")
    LIKELIHOOD.check(likelihood, "universal_spectral_norm")
    if not isinstance(solver, Lanczos | PowerIteration):
        raise TypeError(
            "universal_spectral_norm takes solver=Lanczos(...) or solver=PowerIteration(...), since a data set has N K "
            f"outputs; got {solver!r}."
        )
    check_input_std(input_std)
    if iter(batches) is batches:
        raise ValueError("batches can be iterated only once, and each step goes through all of them. Pass a list.")
    with torch.inference_mode(False), torch.no_grad():
        mean = _MeanFisher(model, batches, likelihood, input_std)
        starts = mean.starts(max(_NUM_STARTS, solver.num_starts) if isinstance(solver, Lanczos) else 1, generator)
        found = _search(mean, starts, solver)
        left = mean.image(found.vector, found.value)
    return EigenResult(
        eigenvalue=found.value[None].to(mean.dtype),
        eigenvector=found.vector.to(mean.dtype).view(1, *mean.input_shape),
        left_singular_vector=left[None],
        residual=found.residual[None].to(mean.dtype),
        converged=torch.tensor([found.converged], device=left.device),
        ritz_values=found.ritz_values[None].to(mean.dtype),
        couplings=torch.full_like(found.ritz_values, torch.inf)[None].to(mean.dtype),
        num_steps=torch.tensor([found.num_steps], device=left.device),
        num_matvecs=len(starts) + 2 * found.num_products + 1,
        solver=solver,
        residual_is_exact=True,
        rounding=(4 * torch.finfo(mean.dtype).eps * found.value.sqrt())[None].to(mean.dtype),
        random_start=RandomStart.none(1),
        search_space=left.new_zeros(1, 0, 0),
    )


@dataclass(frozen=True)
class _Found:
    """The top pair of a search: ``vector`` ``(d,)`` is zero for a zero matrix; ``ritz_values`` are descending."""

    value: Tensor
    vector: Tensor
    residual: Tensor
    converged: bool
    ritz_values: Tensor
    num_steps: int
    num_products: int


def _search(mean: _MeanFisher, starts: Tensor, solver: Lanczos | PowerIteration) -> _Found:
    """Rayleigh-Ritz on a space that grows by the residuals of the top pairs (Lanczos), or on the last product only."""
    remembers = isinstance(solver, Lanczos)
    max_steps = solver.num_steps if isinstance(solver, Lanczos) else solver.max_iterations
    basis, products, num_products = starts[:0], starts[:0], 0
    new = mean.orthonormalised(starts, basis)
    for step in range(max_steps + 1):
        basis, products = torch.cat([basis, new]), torch.cat([products, mean.product(new)])
        num_products += len(new)
        values, vectors = torch.linalg.eigh(0.5 * (basis @ products.mT + products @ basis.mT))  # V F V'
        best = vectors[:, -len(starts) :].flip(1).mT
        y, images = best @ basis, best @ products
        theta = (y * images).sum(1, keepdim=True).clamp_min(0)  # theta = y' F y
        rest = images - theta * y  # residual vector F y - theta y
        residual = rest.norm(dim=1)
        converged = bool(residual[0] <= solver.rtol * theta[0])
        # a residual that is only rounding error gives no new direction
        rest = rest[residual > 100 * torch.finfo(mean.dtype).eps * theta[0]]
        new = mean.orthonormalised(rest, basis) if remembers else mean.rounded(images)
        # a start vector that is nearly an eigenvector need not be the top one
        if (converged and step > 0) or len(rest) == 0 or len(new) == 0:
            break
        if not remembers:
            basis, products = basis[:0], products[:0]
    vector = torch.where(theta[0] > 0, unit(y[0]), 0.0)
    ritz_values = values.flip(0).clamp_min(0)
    return _Found(theta[0, 0], vector, residual[0], converged, ritz_values, step, num_products)


_CHANGED = (
    "The batches are not the same each time: a later pass gave other logits than the first. Use a loader without "
    "shuffling and augmentation."
)

_NUM_STARTS = 3  # a single start vector stopped at the second of two close eigenvalues in one of ten trials
_TILT = 0.03  # dense random part of the start vectors: small relative to the rest, large relative to rounding
_AGREES = 0.05  # |A v|^2 and v' F v, relative


class _MeanFisher:
    r"""The mean :math:`F = \frac1N \sum_x A(x)^\top A(x)` of a data set, ``(d, d)``, by passes through it.

    Vectors ``(d,)`` and sums are in double precision; ``dtype`` is that of the network.
    """

    dtype: torch.dtype
    input_shape: torch.Size

    def __init__(
        self, model: LogitsFunction, batches: Batches, likelihood: Likelihood, input_std: InputStd | None
    ) -> None:
        self._model, self._batches = model, batches
        self._likelihood, self._input_std = likelihood, input_std
        self._marks: list[Tensor] = []
        self._num_inputs = self._num_outputs = 0

    def starts(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Compute VJPs with ``count`` sets of random signs on all outputs, in the first pass.

        Returns:
            Unit vectors ``(count, d)``, each with a small dense random part.

        Raises:
            ValueError: If there are no batches.
        """
        total: Tensor | None = None

        def pull(fisher: InputFisher) -> None:
            nonlocal generator, total
            logits = fisher.logits.detach()
            generator = generator or fixed_generator()
            pulled = torch.stack([_total(fisher.adjoint(signs(logits, generator))) for _ in range(count)])
            total = pulled if total is None else total + pulled
            self.dtype, self.input_shape = fisher.inputs.dtype, fisher.inputs.shape[1:]
            self._marks.append(_mark(logits))
            self._num_inputs += len(logits)
            self._num_outputs += logits.numel()

        self._pass(pull)
        if total is None:
            raise ValueError("batches is empty, so that there is no mean.")
        return unit(total) + _TILT * unit(normal(total, generator))

    def orthonormalised(self, vectors: Tensor, basis: Tensor) -> Tensor:
        """Return the unit components of ``vectors`` ``(n, d)`` outside ``basis``, without rounding errors."""
        count = len(basis)
        for vector in vectors:
            rest = unit(vector)
            for _ in range(2):  # twice is enough
                rest = rest - (basis @ rest) @ basis
            if bool(rest.norm() > 100 * torch.finfo(self.dtype).eps):
                basis = torch.cat([basis, self.rounded(rest[None])])
        return basis[count:]

    def rounded(self, vectors: Tensor) -> Tensor:
        """Return unit vectors rounded to the precision of the network."""
        return unit(vectors).to(self.dtype).double()

    def product(self, vectors: Tensor) -> Tensor:
        r"""Return :math:`F v` for the rows of ``vectors`` ``(n, d)``: one pass.

        Raises:
            ValueError: If :math:`v^\top F v` is not :math:`\|A v\|^2`.
        """
        totals, squares = torch.zeros_like(vectors), vectors.new_zeros(len(vectors))
        tangents = vectors.to(self.dtype)

        def multiply(fisher: InputFisher) -> None:
            for tangent, total, square in zip(tangents, totals, squares, strict=True):
                image = fisher.apply(tangent.expand(len(fisher.inputs), -1))
                total.add_(_total(fisher.adjoint(image)))
                square.add_(image.double().square().sum())

        self._pass(multiply)
        if bool(((squares - (vectors * totals).sum(1)).abs() > _AGREES * squares).any()):
            raise ValueError(
                "Forward-mode and backward passes disagree. This happens if the forward is random, or if a part of the "
                "model runs under torch.no_grad(), which forward-mode passes ignore; use detach() there."
            )
        return totals / self._num_inputs

    def image(self, vector: Tensor, value: Tensor) -> Tensor:
        r"""Return the unit vector :math:`u = A v / \sqrt{N \theta}` ``(N K,)``, zero if the value is: one pass."""
        tangent, end = vector.to(self.dtype), 0
        length = math.sqrt(self._num_inputs * float(value)) or 1.0
        image = tangent.new_empty(self._num_outputs)

        def push(fisher: InputFisher) -> None:
            nonlocal end
            part = fisher.apply(tangent.expand(len(fisher.inputs), -1)).flatten()
            image[end : end + len(part)] = part / length
            end += len(part)

        self._pass(push)
        return image

    def _pass(self, use: Callable[[InputFisher], None]) -> None:
        """Call ``use`` with the operator of each batch, after comparing its logits with those of the first pass."""
        marks, count = tuple(self._marks), 0
        for count, batch in enumerate(self._batches, 1):
            inputs = batch if isinstance(batch, Tensor) else batch[0]
            with evaluation_operator(self._model, inputs, self._likelihood, self._input_std) as fisher:
                if marks:
                    _check_unchanged(_mark(fisher.logits.detach()), marks[count - 1] if count <= len(marks) else None)
                use(fisher)
        if count < len(marks):
            raise ValueError(_CHANGED)


def _total(rows: Tensor) -> Tensor:
    check_finite(rows)
    return rows.sum(0, dtype=torch.float64)


def _mark(logits: Tensor) -> Tensor:
    """Return one number per input ``(B,)``, a random projection of its logits, for comparison with later passes."""
    direction = normal(logits[0].double(), fixed_generator())
    return present(logits).double() @ direction


def _check_unchanged(now: Tensor, first: Tensor | None) -> None:
    size = 0.0 if first is None else float(first.abs().max())
    if first is None or now.shape != first.shape or not torch.allclose(now, first, rtol=1e-3, atol=1e-3 * size):
        raise ValueError(_CHANGED)
