"""Verification of a model before its Fisher matrix is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from fisher_reg.arguments import LIKELIHOOD
from fisher_reg.evaluation import (
    EvaluatedModel,
    LogitsFunction,
    Noise,
    SharedCopy,
    SideInputs,
    WithSideInputs,
    check_inputs,
    deployed,
    has_training_batch_norm,
    is_sharded,
    measured,
    refuse_random,
    trained,
)
from fisher_reg.left_out import change, magnitude
from fisher_reg.likelihood import Categorical, Likelihood
from fisher_reg.outputs import check_logits, looks_like_probabilities
from fisher_reg.sampling import fixed_generator, normal

_AGREES = 0.02
"""Largest difference of a derivative from its difference quotient, relative to their size."""
_NUM_FOR_STATISTICS = 8
"""Number of examples in a check of batch norm in training mode."""
_NUM_DIRECTIONS = 4
"""Number of directions of the difference quotients; two forwards each."""


@dataclass(frozen=True)
class Finding:
    """One property of a model.

    Attributes:
        name: Name of the property.
        passed: Whether it holds; None if it could not be verified.
        detail: The observation.
        remedy: What to do if it does not hold.
    """

    name: str
    passed: bool | None
    detail: str
    remedy: str


@dataclass(frozen=True)
class ModelCheck:
    """The verified properties of a model; printed as a small table.

    Attributes:
        findings: The properties, in the order of verification.
    """

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no property failed."""
        return all(finding.passed is not False for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """What failed."""
        return tuple(finding for finding in self.findings if finding.passed is False)

    def __repr__(self) -> str:
        failed = ", ".join(finding.name for finding in self.failures)
        num_passed = sum(finding.passed is True for finding in self.findings)
        found = f"FAILED: {failed}" if failed else "passed"
        return f"ModelCheck({found}; {num_passed} of {len(self.findings)} verified)"

    def __str__(self) -> str:
        words = {True: "ok", False: "FAILED", None: "unknown"}
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.name:{width}}  {words[finding.passed]:7}  {finding.detail}")
            if finding.passed is False:
                lines.append(f"{'':{width}}           {finding.remedy}")
        return "\n".join(lines)


def check_model(
    model: LogitsFunction,
    inputs: Tensor,
    *,
    likelihood: Likelihood = Categorical(),
    side_inputs: SideInputs = None,
    is_training: bool = False,
) -> ModelCheck:
    """Verify that the Fisher matrix of a model is well defined, and give a remedy for each failure.

    - *logits*: the model returns finite floating-point logits ``(B, K)``, in the precision of the inputs
    - *not probabilities*: the rows are not already probabilities
    - *full precision*: there is no half precision or autocast inside that could not be undone
    - *path*: a differentiable path leads from the inputs to the logits
    - *derivative*: derivatives agree with difference quotients along random directions; this detects a part under
      ``no_grad``, ``detach``, a quantised or straight-through part, or a wrong backward of a custom function
    - *independence*: the logits of an example do not depend on the others in the batch
    - *repeatability*: two calls agree, without a fixed random state
    - *part of a batch*: an example alone has the same logits; otherwise every evaluation uses the whole batch

    Args:
        model: As in :func:`fisher_reg.fisher_spectral_norm`; it is not modified.
        inputs: ``(B, *S)``. Only the first two are used if the model takes them; with batch norm in training mode the
            first eight.
        likelihood: The output distribution that the logits parametrise.
        side_inputs: More arguments of the model.
        is_training: Whether to verify the function that is being trained instead of the deployed one.

    Returns:
        The findings. Cost: about thirteen forwards and two backward passes, partly in double precision.

    Raises:
        ValueError: If ``inputs`` is not a non-empty floating-point batch.

    Example:
        >>> check_model(torch.nn.Linear(6, 3), torch.randn(2, 6)).passed
        True
    """
    check_inputs(inputs)
    LIKELIHOOD.check(likelihood, "check_model")
    with measured(inputs) as safe_inputs:
        return ModelCheck(tuple(_Check(model, safe_inputs, likelihood, side_inputs, is_training).run()))


class _Check:
    """The findings for one model and one batch."""

    def __init__(
        self, model: LogitsFunction, inputs: Tensor, likelihood: Likelihood, side_inputs: SideInputs, is_training: bool
    ) -> None:
        make = trained if is_training else deployed
        self.model = model
        self.likelihood = likelihood
        self.is_training = is_training
        whole = WithSideInputs(make(model, inputs), side_inputs, len(inputs))
        self.function, self.inputs = self._first_few(whole, inputs)
        self.logits = torch.empty(0)

    def _first_few(self, whole: WithSideInputs, inputs: Tensor) -> tuple[WithSideInputs, Tensor]:
        # Two values normalised by their own statistics are always close to -1 and 1, so that difference quotients
        # cannot confirm the derivative; networks for large images end with one value per channel.
        takes_statistics = self.is_training and has_training_batch_norm(self.model)
        few = slice(0, _NUM_FOR_STATISTICS if takes_statistics else 2)
        if len(inputs) <= few.stop:
            return whole, inputs
        try:
            part = whole.part(few)
            with torch.no_grad():
                part(inputs[few])
            return part, inputs[few]
        except Exception:  # whatever the user's forward raises for a smaller batch
            return whole, inputs

    def run(self) -> list[Finding]:
        """Verify one property after the other; without valid logits only those that do not need them."""
        first = self._finds_logits()
        if first.passed is False:
            return [first]
        path = self._finds_a_path()
        derivative = self._derivative_agrees() if path.passed else Finding("derivative", None, "no path", "")
        rest = (self._independent, self._repeatable, self._takes_a_part)
        return [first, self._no_probabilities(), self._full_precision(), path, derivative, *(find() for find in rest)]

    def _finds_logits(self) -> Finding:
        remedy = "Pass inputs that the model accepts, and return logits; LogitsOf(model, logits_fn) extracts them."
        try:
            self.point = self.inputs.clone().requires_grad_()
            self.logits = self.function(self.point)
            check_logits(self.logits, len(self.inputs), self.likelihood)
        except Exception as error:  # any error of the user's forward, or of the check of its result
            return Finding("logits", False, f"{type(error).__name__}: {error}", remedy)
        return Finding("logits", True, f"{tuple(self.logits.shape)}, {self.logits.dtype}", remedy)

    def _no_probabilities(self) -> Finding:
        looks = looks_like_probabilities(self.logits.detach(), self.likelihood)
        return Finding(
            "not probabilities",
            not looks,
            "the rows are non-negative and sum to one" if looks else "",
            "Return the logits, before softmax or sigmoid: with probabilities every number is far too small.",
        )

    def _full_precision(self) -> Finding:
        evaluated = self.function.model
        assert isinstance(evaluated, EvaluatedModel)
        return Finding(
            "full precision",
            not evaluated.saw_half_precision,
            "half precision inside" if evaluated.saw_half_precision else "",
            "Pass the nn.Module itself instead of a function around it, so that it can be promoted; or model.float().",
        )

    def _finds_a_path(self) -> Finding:
        has_path = self.logits.requires_grad and self._pull(torch.ones_like(self.logits)) is not None
        return Finding(
            "path",
            has_path,
            "" if has_path else "no differentiable path from the inputs to the logits",
            "Freeze weights with requires_grad_(False) instead of torch.no_grad() in forward; remove detach().",
        )

    def _pull(self, cotangent: Tensor) -> Tensor | None:
        (row,) = torch.autograd.grad(self.logits, self.point, cotangent, retain_graph=True, allow_unused=True)
        return row

    def _derivative_agrees(self) -> Finding:
        error = self._error_of_the_derivative()
        passed = None if error is None else error <= _AGREES
        return Finding(
            "derivative",
            passed,
            ""
            if error is None
            else f"off from the difference quotient by {error:.1%}"
            if isfinite(error)
            else "not finite",
            "Look for a part under no_grad or detach, a quantised or straight-through part, or a custom "
            "autograd.Function whose backward is not its derivative.",
        )

    def _error_of_the_derivative(self) -> float | None:
        """Compare ``<w, J v>`` with a central difference quotient, for a random ``w`` and a few ``v``.

        One number could agree by chance; the root mean square over directions is very unlikely to.
        A forward may round to float32 inside, so that the quotient in double precision is only rounding error.
        Therefore the smaller error of two precisions is returned.

        Returns:
            The relative error; None if there is no quotient.
        """
        errors = []
        for dtype, step in ((torch.float64, 1e-6), (self.inputs.dtype, 1e-3)):
            try:
                errors.append(self._error_in(dtype, step))
            except Exception:  # the forward may raise any error in double precision
                continue
            if errors[-1] <= _AGREES:
                break
        return min(errors, default=None)

    def _error_in(self, dtype: torch.dtype, step: float) -> float:
        generator = fixed_generator()
        w = normal(self.logits.detach(), generator).to(dtype)
        w = w.masked_fill(self.logits.isneginf(), 0.0)  # logits of -inf do not change
        function = self._in_precision(dtype)
        point = self.inputs.to(dtype).requires_grad_()
        (row,) = torch.autograd.grad(function(point), point, w)  # J' w
        by_derivative, by_quotient = [], []
        for _ in range(_NUM_DIRECTIONS):
            v = normal(self.inputs, generator).to(dtype)
            with torch.no_grad():
                ahead, behind = function(point + step * v), function(point - step * v)
            by_derivative.append((row * v).sum())  # <J' w, v>
            by_quotient.append((change(behind, ahead) / (2 * step) * w).sum())  # <w, J v>
        error = torch.stack(by_derivative) - torch.stack(by_quotient)
        size = _NUM_DIRECTIONS**0.5 * row.norm() + torch.stack(by_quotient).norm()
        return float(error.norm() / size.clamp_min(torch.finfo(dtype).tiny))

    def _in_precision(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        if dtype == self.inputs.dtype or is_sharded(self.model):
            return self.function
        source = SharedCopy(self.model, is_deployed=not self.is_training, dtype=dtype)
        noise = Noise(self.inputs.device)
        model = EvaluatedModel(source, noise, is_deployed=not self.is_training)
        return WithSideInputs(model, self.function.side_inputs, self.function.batch_size)

    def _independent(self) -> Finding:
        remedy = (
            "Use a normalisation without batch statistics, or track_running_stats=True, and no operation over axis 0."
        )
        if len(self.inputs) < 2:
            return Finding("independence", None, "needs two examples", remedy)
        others = self.inputs.clone()
        others[1:] = others[1:].flip(1) + 0.5 * normal(others[1:], fixed_generator())
        with torch.no_grad():
            passed = self._close(self.function(others)[:1], self.logits[:1])
        return Finding("independence", passed, "" if passed else "the logits change with the other examples", remedy)

    def _repeatable(self) -> Finding:
        evaluated = self.function.model
        assert isinstance(evaluated, EvaluatedModel)
        with torch.no_grad():
            passed = self._close(self.function(self.inputs), self.logits)
        detail = "" if passed else "two calls differ, although each had the same random state"
        if passed and not self.is_training:
            try:
                refuse_random(evaluated, self.logits, lambda: self.function(self.inputs))
            except ValueError:
                passed, detail = False, "the forward is random, also in evaluation mode"
        return Finding(
            "repeatability",
            passed,
            detail,
            "Draw noise only if self.training, from a generator that the module holds or a global one of torch, Python "
            "or NumPy.",
        )

    def _takes_a_part(self) -> Finding:
        if len(self.inputs) < 2:
            return Finding("part of a batch", None, "needs two examples", "")
        try:
            with torch.no_grad():
                alone = self.function.part(slice(0, 1))(self.inputs[:1])
            passed = self._close(alone, self.logits[:1])
        except Exception:  # the user's forward may raise any error for a batch of another size
            passed = False
        detail = "" if passed else "not alone: every evaluation uses the whole batch"
        return Finding("part of a batch", True if passed else None, detail, "")

    @staticmethod
    def _close(first: Tensor, second: Tensor) -> bool:
        size = float(magnitude(second).max())
        return first.shape == second.shape and torch.allclose(
            first, second.detach(), rtol=1e-3, atol=1e-4 * size + 1e-12
        )
