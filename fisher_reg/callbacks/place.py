"""How the penalty of a training step is computed: from the forward of the step, or from a separate forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from fisher_reg.callbacks.batch import LogitsFn, PenaltyFn, logits_model
from fisher_reg.callbacks.step import Due, Observation
from fisher_reg.callbacks.tap import standing_obstacle
from fisher_reg.errors import ForwardError, LogitsShapeError
from fisher_reg.evaluation import (
    EvaluatedModel,
    Noise,
    Recording,
    SideInputs,
    UnrecordedError,
    WithSideInputs,
    called,
    deployed_with_gradient,
    differentiable,
    has_training_batch_norm,
    select,
)
from fisher_reg.penalty import PointPenalty, TrainingPoint
from fisher_reg.penalty.point import kernels


@dataclass
class Place:
    """Computes the penalty of one regularizer.

    Args:
        penalty: The penalty.
        batch_fraction: Share of the batch that is penalised.
        use_running_statistics: Whether the deployed function is penalised.
        logits_fn: As in :class:`fisher_reg.FisherMonitor`.
    """

    penalty: PenaltyFn
    batch_fraction: float
    use_running_statistics: bool
    logits_fn: LogitsFn | None
    _logged: bool = field(default=False, init=False)
    _takes_parts: bool = field(default=True, init=False)
    _tolerated: dict[torch.dtype, bool] = field(default_factory=dict, init=False)

    def reset(self) -> None:
        """Reset the state of an earlier fit."""
        self._logged = False
        self._takes_parts = True
        self._tolerated.clear()

    @property
    def differentiates_twice(self) -> bool:
        """Whether second derivatives of the network are needed."""
        return isinstance(self.penalty, PointPenalty) and self.penalty.differentiates_twice

    def can_reuse_forward(self, module: pl.LightningModule, side_inputs: SideInputs) -> bool:
        """Whether the penalty can reuse the forward of the step."""
        if not isinstance(self.penalty, PointPenalty) or self.use_running_statistics:
            return False
        if self.penalty.differentiates_twice and (self.batch_fraction < 1 or has_training_batch_norm(module)):
            return False
        obstacle = standing_obstacle(module) if side_inputs is None else "the model takes side inputs"
        if obstacle is not None:
            self.log_once(obstacle)
        return obstacle is None

    def half_precision(self, module: pl.LightningModule, inputs: Tensor) -> torch.dtype | None:
        """Return the half precision of the step if the penalty tolerates it; None for float32.

        This is determined once per fit, from the first inputs.
        """
        dtype = _autocast_dtype(module.trainer, inputs.device)
        if dtype is None or not isinstance(self.penalty, PointPenalty):
            return None
        if dtype not in self._tolerated:
            self._tolerated[dtype] = self.penalty.tolerates(inputs, dtype)
        return dtype if self._tolerated[dtype] else None

    def value(self, module: pl.LightningModule, due: Due, seen: Observation, options: dict[str, Any]) -> Tensor:
        """Return the penalty; of the whole batch if the model does not take a part of it.

        Args:
            module: The module that is trained.
            due: The inputs and the model.
            seen: The observed forwards of the step.
            options: Arguments of the penalty.

        Returns:
            A scalar with its gradient.

        Raises:
            ForwardError: If the model does not take the whole batch either.
            LogitsShapeError: If the model does not return one row per example of the whole batch either.
        """
        try:
            return self.taken(module, due, seen, options)
        except (ForwardError, LogitsShapeError) as error:  # a model may also ignore the batch size
            if self.batch_fraction == 1 or not self._takes_parts:
                raise
            self._takes_parts = False
            value = self.taken(module, due, seen, options)
            rank_zero_info(f"FisherRegularizer penalises whole batches: the model does not take a part of one. {error}")
            return value

    def taken(self, module: pl.LightningModule, due: Due, seen: Observation, options: dict[str, Any]) -> Tensor:
        """Return the penalty, from the forward of the step if possible."""
        if self.use_running_statistics:
            with differentiable(due.inputs) as inputs:
                model = deployed_with_gradient(logits_model(module, self.logits_fn), inputs)
            return self.by_itself(model, due, options)
        recording = seen.recording if seen.recording.is_clear else None
        try:
            if self.reuses(module, due, seen):
                return self.at_the_step(due, seen, options)
            if recording is not None:
                return self.by_itself(_trained(due, Noise(due.inputs.device), recording), due, options)
        except UnrecordedError:
            self.log_once("batch norms of the training step were not observed")
        with differentiable(due.inputs) as inputs:
            model = _trained(due, Noise(due.inputs.device), None)
            model.recording = called(WithSideInputs(model.record, due.side_inputs, len(inputs)), inputs)
        return self.by_itself(model, due, options)

    def reuses(self, module: pl.LightningModule, due: Due, seen: Observation) -> bool:
        """Whether the observed forward can be used for the penalty; logs the reason once if not."""
        flow = seen.flow
        if flow is None or flow.source is not due.source or flow.logits_fn is not self.logits_fn:
            return False
        if self.differentiates_twice > flow.differentiates_twice or not self.can_reuse_forward(module, due.side_inputs):
            return False
        obstacle = flow.obstacle
        if obstacle is None and flow.autocast_dtype not in (None, due.half_precision):
            obstacle = _ROUNDED
        if obstacle is None and not seen.recording.is_clear:
            obstacle = "batch norms ran more than once in the training step"
        if obstacle is None and self.differentiates_twice and seen.recording.calls:
            obstacle = "second derivatives would go through the batch statistics of the training step"
        if obstacle is not None:
            self.log_once(obstacle)
        return obstacle is None

    def at_the_step(self, due: Due, seen: Observation, options: dict[str, Any]) -> Tensor:
        """Return the penalty with the logits of the forward of the step."""
        assert isinstance(self.penalty, PointPenalty)
        flow = seen.flow
        assert flow is not None
        logits = flow.outputs[0].to(torch.promote_types(flow.outputs[0].dtype, torch.float32))
        leaf = None if self.differentiates_twice else seen.cut.leaf(logits)
        # the step may have left autocast: both logits must be computed in the same precision
        model = EvaluatedModel(
            due.model, Noise(due.inputs.device, flow.state), False, seen.recording, flow.autocast_dtype
        )
        with differentiable(flow.source), kernels(self.penalty.differentiates_twice):
            chosen = self.chosen(due, options)
            if chosen is None:
                return self.penalty.at(TrainingPoint(model, flow.inputs, logits, leaf), **options)
            assert leaf is not None  # a penalty with second derivatives reuses no part
            # compute the direction from a forward of the part: a backward pass through the whole batch costs more
            inputs = flow.inputs.detach()[chosen].requires_grad_()
            own = called(model, inputs)
            of_the_step = (leaf[chosen], True) if self.agree(model, own, leaf.detach()[chosen]) else ()
            point = TrainingPoint(model, inputs, own, *of_the_step)
            return self.penalty.at(point, **_of_the_chosen(options, chosen))

    def agree(self, model: EvaluatedModel, own: Tensor, of_the_step: Tensor) -> bool:
        """Return whether a part of the batch has the same logits as in the step.

        The logits differ if the model is random (other dropout masks), or if its examples depend on each other. The
        penalty would treat the difference as an effect of the perturbation and divide it by the squared step length.

        Args:
            model: The function of the step.
            own: Its logits of the part alone.
            of_the_step: The logits of the same examples in the step, without a graph.

        Returns:
            Whether the logits of the step may be used.
        """
        if model.draws or own.shape != of_the_step.shape:
            return False
        tolerance = _ROUND_OFF if model.half_precision is None else _HALF_ROUND_OFF
        size = of_the_step.nan_to_num(neginf=0.0).abs().max().item()
        does = torch.allclose(own.detach().to(of_the_step), of_the_step, rtol=tolerance, atol=tolerance * size)
        if not does:
            self.log_once("the logits of a part of the batch differ from those in the step")
        return does

    def by_itself(self, model: nn.Module, due: Due, options: dict[str, Any]) -> Tensor:
        """Return the penalty from a separate forward of the chosen examples."""
        inputs, side_inputs = due.inputs, due.side_inputs
        chosen = self.chosen(due, options)
        if chosen is not None:
            side_inputs = select(side_inputs, chosen, len(inputs))
            inputs, options = inputs[chosen], _of_the_chosen(options, chosen)
        if side_inputs is not None:
            options = options | {"side_inputs": side_inputs}
        penalty: Tensor = self.penalty(model, inputs, **options)
        return penalty

    def chosen(self, due: Due, options: dict[str, Any]) -> Tensor | None:
        """Draw the indices of the examples that are penalised; None for all."""
        if self.batch_fraction == 1 or not self._takes_parts:
            return None
        count = max(1, round(self.batch_fraction * len(due.inputs)))
        return torch.randperm(len(due.inputs), generator=options["generator"])[:count].to(due.inputs.device)

    def log_once(self, obstacle: str) -> None:
        """Log once per fit why the forward of the step is not reused."""
        if not self._logged:
            self._logged = True
            rank_zero_info(f"FisherRegularizer runs a forward of its own: {obstacle}.")


def _trained(due: Due, noise: Noise, recording: Recording | None) -> EvaluatedModel:
    """Return the function that is being trained, in the precision of the penalty."""
    return EvaluatedModel(due.model, noise, False, recording, due.half_precision)


def _of_the_chosen(options: dict[str, Any], chosen: Tensor) -> dict[str, Any]:
    return options | ({"labels": options["labels"][chosen]} if "labels" in options else {})


def _autocast_dtype(trainer: pl.Trainer, device: torch.device) -> torch.dtype | None:
    """Return the half precision of the trainer's autocast; None without one."""
    with trainer.precision_plugin.train_step_context():
        if not torch.is_autocast_enabled(device.type):
            return None
        dtype = torch.get_autocast_dtype(device.type)
    return dtype if torch.finfo(dtype).bits < 32 else None


# relative to the largest logit: other kernels for another batch size (TF32 in convolutions), and bfloat16
_ROUND_OFF = 1e-2
_HALF_ROUND_OFF = 5e-2

_ROUNDED = "the training step is under autocast, whose rounding errors would exceed the penalty"
