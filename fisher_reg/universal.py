r"""The Fisher matrix of a whole data set: one direction that moves all predictions at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisher_reg.estimate import evaluation_operator
from fisher_reg.evaluation import LogitsFunction
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.operator import InputFisher
from fisher_reg.solvers import EigenResult, Lanczos, Solver

Batches = Iterable[Tensor | Sequence[Tensor]]


def universal_spectral_norm(
    model: LogitsFunction,
    batches: Batches,
    *,
    solver: Solver = Lanczos(num_steps=20, rtol=1e-2),
    likelihood: Likelihood = Categorical(),
    input_std: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> EigenResult:
    r"""Estimate :math:`\lambda_\max(\operatorname{mean}_x F(x))` over a data set, and its universal direction.

    ``eigenvalue / 2 * eps**2`` is, to second order, the largest mean KL divergence that *one* perturbation of length
    ``eps``, the same for all inputs, can cause. It is not the mean of :func:`fisher_reg.fisher_spectral_norm`, where
    each input has its own worst direction: since :math:`\lambda_\max` is convex,

    .. math:: \lambda_\max(\operatorname{mean}_x F(x)) \le \operatorname{mean}_x \lambda_\max(F(x)) .

    Each application of the mean operator goes through all batches, at a forward and a pass each; only the logits are
    kept in between.

    Args:
        model: As in :func:`fisher_reg.fisher_spectral_norm`, like all arguments that are not named here.
        batches: Inputs ``(B, *S)``, or sequences that begin with them; iterable several times, each time with the same
            inputs in the same order (a list, or a loader that neither shuffles nor augments), on the model's device.
        solver: :class:`Lanczos` or :class:`PowerIteration`. (:class:`Exact` would need ``N K`` passes.)
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        generator: Source of the random part of the start vectors.

    Returns:
        Fields with a leading axis of length 1; ``eigenvector`` is ``(1, *S)``, and ``left_singular_vector``
        ``(1, N K)``.

    Raises:
        ValueError: As in :func:`fisher_reg.fisher_spectral_norm`; if ``batches`` can be iterated only once or is empty;
            or if a later pass gives other logits than the first.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> universal_spectral_norm(lambda x: x @ weight.T, [torch.zeros(3, 2), torch.zeros(1, 2)]).eigenvalue
        tensor([1.0000])
    """
    if iter(batches) is batches:
        raise ValueError("batches can be iterated only once, and each step goes through all of them. Pass a list.")
    mean = _MeanFisher(model, batches, likelihood, input_std)
    result = solver.solve(mean, generator)
    return replace(result, eigenvector=result.eigenvector.view(1, *mean.input_shape))


_CHANGED = (
    "The batches are not the same each time: another pass gave other logits than the first. Use a loader that neither "
    "shuffles nor augments."
)


class _MeanFisher:
    """``mean_x F(x) = Aᵀ A`` with the stacked ``A(x) / sqrt(N)``, ``(1, N K, d)``."""

    def __init__(
        self, model: LogitsFunction, batches: Batches, likelihood: Likelihood, input_std: Tensor | None
    ) -> None:
        self._model, self._batches = model, batches
        self._likelihood, self._input_std = likelihood, input_std
        self._logits: list[Tensor] = []
        self._logits = self._over(lambda fisher, _: fisher.logits.detach())
        if not self._logits:
            raise ValueError("batches is empty; there is nothing to take the mean of.")
        self._root = math.sqrt(sum(len(logits) for logits in self._logits))

    def starts(self, count: int) -> Tensor:
        """Raise one output for all inputs at once, the outputs that matter most first."""
        logits = torch.cat(self._logits)
        units = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        raised = [self._likelihood.whiten(logits, unit.expand_as(logits)).flatten() for unit in units]
        raised.sort(key=lambda vector: -float(vector.norm()))
        return torch.stack(raised[:count])[None]

    def labels(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a label for each input."""
        return self._likelihood.labels(torch.cat(self._logits), generator).view(1, -1)

    def apply(self, tangent: Tensor, *, exact: bool = False, slope: Tensor | None = None) -> Tensor:
        """``(1, d)`` to ``(1, N K)``."""
        images = self._over(lambda fisher, _: fisher.apply(tangent.expand(len(fisher.inputs), -1)))
        stacked: Tensor = torch.cat(images).view(1, -1) / self._root
        return stacked

    def slope_along(self, cotangent: Tensor, row: Tensor) -> Tensor:
        """Return one: no difference quotient is taken."""
        return row.new_ones(1)

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """``(1, N K)`` to ``(1, d)``."""
        parts = cotangent.split([logits.numel() for logits in self._logits], dim=1)
        pulled = self._over(lambda fisher, index: fisher.adjoint(parts[index].view_as(fisher.logits)).sum(0))
        total: Tensor = torch.stack(pulled).sum(0)[None] / self._root
        return total

    def restrict(self, keep: Tensor) -> None:
        """There is one operator, which has no parts."""

    def _over(self, use: Callable[[InputFisher, int], Tensor]) -> list[Tensor]:
        results = []
        for index, batch in enumerate(self._batches):
            inputs = batch if isinstance(batch, Tensor) else batch[0]
            with evaluation_operator(self._model, inputs, self._likelihood, self._input_std) as fisher:
                self._check_unchanged(fisher, index)
                self.input_shape = inputs.shape[1:]
                results.append(use(fisher, index))
        if len(results) < len(self._logits):
            raise ValueError(_CHANGED)
        return results

    def _check_unchanged(self, fisher: InputFisher, index: int) -> None:
        if not self._logits:
            return
        now = fisher.logits.detach()
        first = self._logits[index] if index < len(self._logits) else now[:0]
        if now.shape != first.shape or not torch.allclose(now, first, rtol=1e-3, atol=1e-3):
            raise ValueError(_CHANGED)
