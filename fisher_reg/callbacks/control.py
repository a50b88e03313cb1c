"""Adapt the weight of a penalty until the eigenvalue reaches a target."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from fisher_reg.callbacks.schedules import ConstantSchedule, Schedule
from fisher_reg.errors import NonFiniteError
from fisher_reg.estimate import fisher_spectral_norm
from fisher_reg.evaluation import SideInputs, select
from fisher_reg.penalty import Penalty


@dataclass
class LambdaControl:
    r"""A weight that is adapted until a mean eigenvalue tracks a target.

    Integral control: each measurement changes the logarithm of the weight by ``gain`` times
    :math:`\log(\lambda / \text{target})`, within a factor of ``max_factor`` of the initial weight.

    Args:
        target: Mean largest eigenvalue, in nats per squared input unit.
        weight: The initial weight.
        gain: Share of the error, in logarithms, by which one measurement changes the weight.
        max_factor: Largest total factor by which the weight may grow or shrink.
    """

    target: float
    weight: float
    gain: float = 0.15
    max_factor: float = 1e3

    def __post_init__(self) -> None:
        if not 0 < self.target < math.inf:
            raise ValueError(f"target_lambda must be positive and finite; got {self.target}.")
        self.begin = self.weight
        self.reset()

    def reset(self) -> None:
        """Reset the weight and the measurements of an earlier training."""
        self.weight = self.begin
        self._measured_at = -1
        self._warned = False

    @property
    def is_at_limit(self) -> bool:
        """Whether the weight has reached its smallest or largest value."""
        return abs(math.log(self.weight / self.begin)) > 0.999 * math.log(self.max_factor)

    def update(self, measured: float) -> None:
        """Change the weight after a finite measurement; zero counts as far below the target."""
        if math.isfinite(measured):
            error = math.log(max(measured, self.target / self.max_factor) / self.target)
            log_factor = math.log(self.weight / self.begin) + self.gain * error
            limit = math.log(self.max_factor)
            self.weight = self.begin * math.exp(min(max(log_factor, -limit), limit))

    def measure(
        self,
        module: pl.LightningModule,
        model: nn.Module,
        inputs: Tensor,
        side_inputs: SideInputs,
        penalty: Penalty,
        step: int,
    ) -> None:
        """Measure the mean over all processes once per optimiser step, log it, and change the weight.

        Inputs without finite logits are left out of the mean; all processes make the same collective calls.
        """
        if step == self._measured_at:
            return
        self._measured_at = step
        own = {name: getattr(penalty, name) for name in ("likelihood", "input_std") if hasattr(penalty, name)}
        sums = torch.zeros(2, device=inputs.device)
        with suppress(NonFiniteError):
            own["side_inputs"] = select(side_inputs, slice(_NUM_PROBES), len(inputs))
            values = fisher_spectral_norm(model, inputs[:_NUM_PROBES], **own).eigenvalue.float()
            sums = torch.stack([values.sum(), values.new_tensor(float(len(values)))])
        total, count = module.trainer.strategy.reduce(sums, reduce_op="sum").cpu().tolist()
        measured = total / count if count else math.nan
        self.update(measured)
        module.log("fisher/lambda_control", measured, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        if self.is_at_limit and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"target_lambda={self.target:g} is out of reach: the weight has changed from {self.begin:g} to its "
                f"limit {self.weight:g}. Start with another weight, or choose another target."
            )


_NUM_PROBES = 64


def check_control(weight: float, warmup_steps: int, schedule: Schedule) -> None:
    """Raise an error for settings that a control does not allow.

    Raises:
        ValueError: For a warm-up or a schedule, and for a weight of 0.
    """
    if warmup_steps or not isinstance(schedule, ConstantSchedule):
        raise ValueError(
            f"target_lambda adapts the weight itself; got warmup_steps={warmup_steps} and schedule={schedule} with it. "
            "Use one of them."
        )
    if weight == 0:
        raise ValueError("target_lambda multiplies the weight, which must therefore start above 0.")
