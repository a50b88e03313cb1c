"""The divergence after one step, as a penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisher_reg.arguments import LIKELIHOOD
from fisher_reg.evaluation import InputStd, check_input_std, check_inputs, standard_deviation
from fisher_reg.geometry import EUCLIDEAN, GEOMETRY, L2, Geometry, LInf
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.penalty.point import PointPenalty, TrainingPoint
from fisher_reg.printing import short_repr
from fisher_reg.single_step import towards_runner_up


@dataclass(frozen=True)
class KLPenalty(PointPenalty):
    r"""Mean curvature of the KL divergence over one step of finite length, towards the runner-up class.

    .. math:: 2\,\mathrm{KL}(p_x \,\|\, p_{x + \epsilon v}) / \epsilon^2

    The direction :math:`v`, of norm 1, is the one along which the difference of the two most probable logits decreases
    fastest: the steepest perturbation for :math:`-J^\top (e_1 - e_2)` in the geometry. It is treated as a constant; the
    gradient is that of the divergence with respect to both predictions. As :math:`\epsilon \to 0` the value tends to
    :math:`v^\top F v \le \max_{\|v\| \le 1} v^\top F v` with an error of :math:`O(\epsilon)`; for :class:`L2` the
    maximum is :math:`\lambda_\max`. A step of finite length also detects a confident prediction that changes within the
    step, which the Fisher matrix at ``x`` does not.

    ``weight`` times this penalty is :math:`\beta` times the divergence in nats, with
    :math:`\beta = 2\,\text{weight} / \epsilon^2`, the factor of TRADES (arXiv 1901.08573). :meth:`weight` converts;
    the default weight is that of :math:`\beta = 0.8` for :class:`L2` and of 6 for :class:`LInf`.

    Cost: one backward pass to the inputs without parameter gradient, one forward, and its backward. There is no second
    derivative, so that every kernel works (also fused attention). The forward of the training step can be reused even
    with batch norm in training mode: that its examples depend on each other changes only the direction.

    In half precision (training under autocast) the step must be larger than the rounding errors of the inputs; see
    :meth:`tolerates`.

    Args:
        step: Length :math:`\epsilon` in the geometry, in the input unit (in pixels with ``input_std``).
        likelihood: The output distribution.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        geometry: The norm of the step: :class:`L2`, or :class:`LInf`, for which the direction is a sign vector.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> round(KLPenalty(step=0.1)(model, torch.zeros(1, 2)).item(), 2)  # p (1 - p) |w0 - w1|^2 = 4 / 4
        1.0
    """

    step: float = 0.5
    likelihood: Likelihood = Categorical()
    input_std: InputStd | None = None
    geometry: Geometry = L2()

    __repr__ = short_repr

    differentiates_twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_input_std(self.input_std)
        LIKELIHOOD.check(self.likelihood, self)
        GEOMETRY.check(self.geometry, self)
        if not 0 < self.step < math.inf:
            raise ValueError(f"KLPenalty needs a finite step > 0, in the input unit; got {self.step}.")

    def at(
        self, point: TrainingPoint, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty at a point; ``generator`` is not used."""
        fisher = point.fisher(self.likelihood, self.input_std)
        direction = self.geometry.steepest(fisher.slope(towards_runner_up(fisher), is_last=point.is_used_once))
        moved = fisher.logits_at(self.step * direction)
        # zero where there is no gradient: the two forwards may have different rounding errors
        moved = torch.where(direction.any(1, keepdim=True), moved, point.outputs)
        return 2 / self.step**2 * self.likelihood.divergence(point.outputs, moved).mean()

    @classmethod
    def from_batch(
        cls,
        inputs: Tensor,
        labels: Tensor,
        *,
        share: float = 0.04,
        geometry: Geometry = EUCLIDEAN,
        likelihood: Likelihood = Categorical(),
        input_std: InputStd | None = None,
    ) -> KLPenalty:
        r"""Choose the step from a batch, as a share of the distance between the classes.

        A distance of 0.5 is small between photographs of 32 x 32 pixels and large between digits of 8 x 8. Therefore
        the Euclidean length of the step is ``share`` times the median, over the batch, of the distance to the nearest
        input with another label; a batch of 64 determines it within 10 %. For :class:`LInf` it is the Euclidean length
        of a step with entries of equal size. :attr:`default_weight` changes with the step, so that the factor of the
        divergence in the loss stays the same. No pass through a network.

        Args:
            inputs: ``(B, *S)``, floating point, as passed to the network; needs memory for ``(B, B)`` distances.
            labels: Class indices ``(B,)``, of at least two classes.
            share: Share of the distance; 0.04 gives 0.5 on CIFAR-10, 0.3 on MNIST and 0.09 on 8 x 8 digits.
            geometry: As in the class.
            likelihood: As in the class.
            input_std: As in the class; distances are then in pixel units.

        Returns:
            The penalty.

        Raises:
            ValueError: For labels of only one class or of the wrong shape, or for inputs that are equal in all classes.

        Example:
            >>> inputs, labels = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0, 1])
            >>> KLPenalty.from_batch(inputs, labels).step  # 0.04 * 5
            0.2
        """
        distance = _distance_between_classes(inputs, labels, input_std)
        entry = share * distance / math.sqrt(inputs[0].numel())
        return cls(entry / geometry.typical_entry(inputs[0].numel()), likelihood, input_std, geometry)

    def weight(self, factor: float) -> float:
        r"""Return the weight at which ``factor`` times the divergence, in nats, is added to the loss.

        Args:
            factor: :math:`\beta`; 6 in TRADES.

        Returns:
            :math:`\beta \epsilon^2 / 2`.
        """
        return factor * self.step**2 / 2

    @property
    def default_weight(self) -> float:
        """The weight of a factor of 6 for :class:`LInf`, and of 0.8 otherwise: 0.1 for a step of 0.5."""
        return self.weight(6.0 if isinstance(self.geometry, LInf) else 0.8)

    def tolerates(self, inputs: Tensor, dtype: torch.dtype) -> bool:
        r"""Whether the step is larger than the rounding errors of the inputs.

        Its entries must be at least half of :math:`\varepsilon \cdot \mathrm{rms}(x)`. In bfloat16 the gradient then
        had a cosine above 0.95 with that in float32 (VGG, ResNet and ViT trained on CIFAR-10); for smaller steps the
        cosine decreases fast.

        Args:
            inputs: ``(B, *S)``.
            dtype: Precision of the network.

        Returns:
            Whether the step is long enough.
        """
        std = standard_deviation(self.input_std, inputs)
        entry = self.step * self.geometry.typical_entry(inputs[0].numel()) / (1.0 if std is None else float(std.max()))
        size = float(inputs.detach().float().square().mean().sqrt())
        return entry >= 0.5 * torch.finfo(dtype).eps * size


def _distance_between_classes(inputs: Tensor, labels: Tensor, input_std: InputStd | None) -> float:
    """Return the median distance from an input to the nearest one with another label."""
    check_inputs(inputs)
    labels = torch.as_tensor(labels)
    if labels.shape != inputs.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"KLPenalty.from_batch needs class indices of the {len(inputs)} inputs, ({len(inputs)},); got "
            f"{labels.dtype} {tuple(labels.shape)}."
        )
    std = standard_deviation(input_std, inputs)
    flat = (inputs.detach() if std is None else inputs.detach() * std.to(inputs)).cpu().double().flatten(1)
    known = labels.cpu()
    others = known[:, None] != known
    distances = torch.cdist(flat, flat).where(others, torch.inf).amin(1)
    found = distances[distances.isfinite()]
    distance = float(found.median()) if len(found) else 0.0
    if not 0 < distance < math.inf:
        raise ValueError(
            f"KLPenalty.from_batch needs different inputs of two classes at least; got {len(inputs)} inputs of "
            f"{len(labels.unique())} classes. Pass a larger batch, or pass a step to KLPenalty."
        )
    return distance
