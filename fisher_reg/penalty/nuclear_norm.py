"""The nuclear norm of the change of the logits of a batch after one adversarial step, as a penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisher_reg.errors import NonFiniteLogitsError
from fisher_reg.evaluation import InputStd, check_input_std
from fisher_reg.left_out import change
from fisher_reg.likelihood import Categorical
from fisher_reg.operator import InputFisher
from fisher_reg.penalty.labels import checked_labels
from fisher_reg.penalty.point import PointPenalty, TrainingPoint
from fisher_reg.printing import short_repr
from fisher_reg.sampling import signs, uniform


@dataclass(frozen=True)
class NuclearNormPenalty(PointPenalty):
    r"""Nuclear norm of the change of the logits of a batch under one adversarial step.

    .. math:: \frac{1}{B} \, \|Z(\tilde X) - Z(X)\|_{\mathrm{nuc}}

    with a row of :math:`Z` for each example, in logits. The inputs :math:`\tilde X` start at
    :math:`X + \text{noise} \cdot \{-1, 1\}` and take one step of ``epsilon`` along the sign of the gradient of an
    objective: the cross-entropy plus, in a random share of the calls, ``attack_weight`` times the nuclear norm. They
    stay within ``epsilon`` of :math:`X` and within ``bounds``, and are treated as constants; the gradient is that of
    both :math:`Z(\tilde X)` and :math:`Z(X)`.

    It is nuclear norm adversarial training (NuAT) of Sriramanan et al., "Towards Efficient and Effective Adversarial
    Training" (NeurIPS 2021, github.com/val-iisc/NuAT). The defaults are its settings for CIFAR-10, with the weight of
    4.5, at each step and for the whole batch (``every_n_steps=1, batch_fraction=1.0`` of the regularizer). In the
    original the weight and that of the attack increase from zero over 90 of 100 epochs (``warmup_steps``), every second
    attack is without the nuclear norm, the attack uses the network in evaluation mode, and the attacked batch has its
    own batch statistics. Here all forwards use the function of the training step, with the statistics of its batch.

    For a given size of the changes the value decreases with the batch size as :math:`1 / \sqrt B`; the default weight
    is for batches of 64.

    Cost: a forward and a backward pass to the inputs without parameter gradient, one forward, and its backward; a
    singular value decomposition of ``(B, K)`` in each. No second derivative.

    Args:
        epsilon: Length of the step and radius in the linf norm, in the input unit (in pixels with ``input_std``).
        noise: Size of the random signs, in the same unit.
        attack_weight: Factor of the nuclear norm in the objective of the step.
        attack_share: Probability that the nuclear norm is part of the objective, from 0 to 1.
        bounds: Smallest and largest value of an input; None for no limits, as for normalised inputs.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> penalty = NuclearNormPenalty(epsilon=0.1, noise=0.05, attack_weight=0)
        >>> value = penalty(model, torch.full((1, 2), 0.5), labels=torch.tensor([1]))  # from 0.05 on, or from -0.05
        >>> 0.05 * 2**0.5 <= value.item() + 1e-6 and value.item() - 1e-6 <= 0.1 * 2**0.5
        True
    """

    epsilon: float = 8 / 255
    noise: float = 4 / 255
    attack_weight: float = 4.5
    attack_share: float = 0.5
    bounds: tuple[float, float] | None = (0.0, 1.0)
    input_std: InputStd | None = None

    __repr__ = short_repr

    differentiates_twice: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_input_std(self.input_std)
        if not 0 < self.epsilon < math.inf:
            raise ValueError(
                f"NuclearNormPenalty needs a finite epsilon > 0, in the input unit, such as 8/255 for pixels in "
                f"[0, 1]; got {self.epsilon}."
            )
        if not (0 <= self.noise < math.inf and 0 <= self.attack_weight < math.inf):
            raise ValueError(
                f"NuclearNormPenalty needs a finite noise >= 0 and a finite attack_weight >= 0; got {self.noise} and "
                f"{self.attack_weight}."
            )
        if not 0 <= self.attack_share <= 1:
            raise ValueError(f"NuclearNormPenalty needs 0 <= attack_share <= 1; got {self.attack_share}.")
        if self.bounds is not None and not (len(self.bounds) == 2 and self.bounds[0] < self.bounds[1]):
            raise ValueError(
                f"NuclearNormPenalty needs bounds to be two numbers, the smaller first, such as (0.0, 1.0), or None; "
                f"got {self.bounds}."
            )

    @property
    def default_weight(self) -> float:
        """The largest weight of the published training of a ResNet-18 on CIFAR-10, in batches of 64."""
        return 4.5

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty at a point; ``generator`` draws the signs, and whether the objective has the norm."""
        fisher = point.fisher(Categorical(), self.input_std)
        self._check_bounds(fisher.inputs.detach())
        index = checked_labels(labels, fisher.logits.detach(), self)
        moved = fisher.function(self._attacked(fisher, index, generator))
        return _change_norm(point.outputs, moved) / len(moved)

    def _attacked(self, fisher: InputFisher, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the inputs after the step ``(B, *S)``."""
        inputs, fixed = fisher.inputs.detach(), fisher.logits.detach()
        start = self._bounded(inputs + self.noise * fisher.in_input_units(signs(inputs, generator))).requires_grad_()
        logits = fisher.function(start)
        # sums instead of means: the sign of the gradient is the same
        objective = torch.nn.functional.cross_entropy(logits, index, reduction="sum")
        # drawn on the CPU, since its value controls the branch
        if bool(uniform(torch.empty(1, dtype=fixed.dtype), generator) < self.attack_share):
            objective = objective + self.attack_weight * _change_norm(fixed, logits)
        (slope,) = torch.autograd.grad(objective, start)
        radius = self.epsilon * fisher.in_input_units(torch.ones_like(inputs))
        step = start.detach() + radius * slope.sign() - inputs
        return self._bounded(inputs + step.clamp(-radius, radius))

    def _bounded(self, inputs: Tensor) -> Tensor:
        return inputs if self.bounds is None else inputs.clamp(*self.bounds)

    def _check_bounds(self, inputs: Tensor) -> None:
        if self.bounds is None:
            return
        low, high = self.bounds
        smallest, largest = torch.stack(inputs.aminmax()).cpu().tolist()
        if min(smallest - low, high - largest) < -_ROUND_OFF * (high - low):
            raise ValueError(
                f"NuclearNormPenalty keeps attacked inputs within bounds=({low:g}, {high:g}); these are from "
                f"{smallest:g} to {largest:g}. Pass the bounds of your inputs, or bounds=None for normalised inputs."
            )


_ROUND_OFF = 1e-4  # tolerance for resized images, which may slightly leave their range


def _change_norm(logits: Tensor, moved: Tensor) -> Tensor:
    difference = change(logits, moved)
    is_finite = torch.isfinite(difference.detach()).all(1)
    if not bool(is_finite.all()):
        raise NonFiniteLogitsError(
            f"{int((~is_finite).sum())} of {len(moved)} examples have logits that are NaN or infinite after the "
            "adversarial step of NuclearNormPenalty. Lower its epsilon, or the learning rate."
        )
    return nuclear_norm(difference)


def nuclear_norm(matrix: Tensor) -> Tensor:
    r"""Return the sum of the singular values, with the gradient :math:`U V^\top`.

    This is the subgradient of least norm: singular vectors of zero singular values are left out, since they are
    arbitrary. Unlike a derivative of the decomposition, it is also defined for repeated singular values.

    Args:
        matrix: ``(B, K)``, finite.

    Returns:
        Scalar.

    Example:
        >>> nuclear_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        tensor(7.)
    """
    left, values, right = torch.linalg.svd(matrix.detach(), full_matrices=False)
    is_zero = values <= torch.finfo(values.dtype).eps * max(matrix.shape) * values[0]
    polar = (left * ~is_zero) @ right
    norm: Tensor = (matrix * polar).sum()
    return norm
