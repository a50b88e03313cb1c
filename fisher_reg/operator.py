r"""The input-space Fisher matrix as an operator: :math:`F = A^\top A` per example, never formed.

Public: :class:`InputFisher`, which :func:`fisher_reg.evaluation_operator` builds for a model, and three ways to
compute its Jacobian-vector products.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fisher_reg.evaluation import InputStd, LogitsFunction, name_of_call, standard_deviation, twice_differentiable
from fisher_reg.left_out import change, magnitude
from fisher_reg.likelihood import Likelihood
from fisher_reg.outputs import check_logits

__all__ = ["InputFisher", "double_backward", "forward_mode", "vjp_only"]

Jvp = Callable[[Tensor], Tensor]
Linearization = Callable[[LogitsFunction, Tensor, Tensor], Jvp]


_FORWARD_MODE = threading.RLock()  # torch has one level of dual numbers for the whole process


def forward_mode(function: LogitsFunction, inputs: Tensor, logits: Tensor) -> Jvp:
    """Jacobian-vector products by dual numbers: each costs three to six forwards on a CPU and stores nothing.

    If an operation of the network has no forward-mode derivative, :func:`double_backward` is used instead, which
    gives the same numbers.

    Returns:
        The function that applies the Jacobian.
    """
    point = inputs.detach().clone()  # make_dual raises an error for expanded inputs, which share memory

    def push(tangent: Tensor) -> Tensor:
        with _FORWARD_MODE, torch.no_grad(), twice_differentiable(), forward_ad.dual_level():
            dual = forward_ad.make_dual(point, tangent)
            pushed = forward_ad.unpack_dual(function(dual)).tangent
        return torch.zeros_like(logits) if pushed is None else pushed

    chosen: Jvp = push

    def jvp(tangent: Tensor) -> Tensor:
        nonlocal chosen
        try:
            return chosen(tangent)
        except NotImplementedError:
            fresh = inputs.detach().requires_grad_()
            with twice_differentiable():
                chosen = double_backward(function, fresh, function(fresh))
            return chosen(tangent)

    return jvp


def double_backward(function: LogitsFunction, inputs: Tensor, logits: Tensor) -> Jvp:
    r"""Jacobian-vector products :math:`J v = \partial_w \langle J^\top w, v\rangle` from the graph of ``logits`` alone.

    The function is not called again, so that the dropout masks stay the same.

    Returns:
        The function that applies the Jacobian.

    Raises:
        ValueError: If no differentiable path leads from the inputs to the logits, or, when the function is applied, if
            the path has no second derivative.
    """
    cotangent = torch.zeros_like(logits, requires_grad=True)
    (pulled,) = torch.autograd.grad(logits, inputs, cotangent, create_graph=True, allow_unused=True)
    if pulled is None:
        raise ValueError(_NO_PATH)

    def jvp(tangent: Tensor) -> Tensor:
        pushed = None
        if pulled.requires_grad:
            (pushed,) = torch.autograd.grad(pulled, cotangent, tangent, retain_graph=True, allow_unused=True)
        if pushed is not None:
            return pushed
        (slope,) = torch.autograd.grad(logits, inputs, torch.ones_like(logits), retain_graph=True)
        if bool(slope.any()):
            raise ValueError(_NO_SECOND_DERIVATIVE)
        return torch.zeros_like(logits)  # the derivative is zero everywhere, as for a sign

    return jvp


def vjp_only(function: LogitsFunction, inputs: Tensor, logits: Tensor) -> Jvp:
    """No Jacobian-vector products: for uses that need only VJPs; nothing is prepared or stored."""

    def jvp(tangent: Tensor) -> Tensor:
        raise NotImplementedError("This operator was built for backward passes only; pass another linearize.")

    return jvp


def difference_quotient(
    function: LogitsFunction, inputs: Tensor, logits: Tensor, tangent: Tensor, slope: Tensor
) -> Tensor:
    r"""Jacobian-vector product by :math:`(z(x + h v) - z(x)) / h`: one forward.

    ``slope`` ``(B,)`` approximates the largest :math:`\|J v\|` over unit vectors. The step moves the logits by
    :math:`\sqrt{\varepsilon}` of their size. There the errors by rounding and by curvature are balanced, each about
    :math:`\sqrt\varepsilon` of the result; a kink inside the step adds more. Solvers measure the error.

    Returns:
        ``(B, K)``.
    """
    numbers = torch.finfo(logits.dtype)
    rise = slope * tangent.flatten(1).norm(dim=1)
    moves = rise > 0
    size = 1 + magnitude(logits)
    # h = sqrt(eps) (1 + max |z|) / (slope |v|)
    step = torch.where(moves, numbers.eps**0.5 * size / rise, 1.0).clamp_max(numbers.max**0.5)
    with torch.no_grad():
        moved = function(inputs.detach() + step.view(-1, *[1] * (inputs.ndim - 1)) * tangent)
    return torch.where(moves[:, None], change(logits.detach(), moved) / step[:, None], 0.0)


class InputFisher:
    r"""Input-space Fisher matrices of a batch, one per example, as products with their whitened Jacobian.

    With logits :math:`z(x)`, :math:`J = \partial z / \partial x` and the factor :math:`L` of the likelihood,
    :math:`A = L J D` and :math:`F = A^\top A`, where :math:`D = \mathrm{diag}(1/\text{input\_std})` is the identity
    unless given. Vectors are flat: inputs ``(B, d)``, outputs ``(B, K)``. One ``adjoint`` is one backward pass, one
    ``apply`` one forward-mode pass or one forward.

    Args:
        function: Per-example function from ``(B, *S)`` to logits ``(B, K)``.
        inputs: ``(B, *S)``, floating point.
        likelihood: The output distribution that the logits parametrise.
        input_std: As in :func:`fisher_reg.fisher_spectral_norm`.
        linearize: How an exact ``apply`` differentiates: :func:`forward_mode`, or :func:`double_backward` where the
            function cannot be called again for the same numbers.
        quotients: Whether an ``apply`` that need not be exact is a :func:`difference_quotient`.
        logits: ``function(inputs)``, if it has been computed already. Its graph must reach ``inputs``; it is used
            instead of a call.

    Raises:
        ValueError: If the logits have the wrong shape, are not finite, or do not depend on the inputs.
    """

    def __init__(
        self,
        function: LogitsFunction,
        inputs: Tensor,
        likelihood: Likelihood,
        input_std: InputStd | None = None,
        linearize: Linearization = forward_mode,
        quotients: bool = False,
        logits: Tensor | None = None,
    ) -> None:
        std = standard_deviation(input_std, inputs)
        self.function = function
        self.inputs = inputs.detach().requires_grad_() if logits is None else inputs
        self.likelihood = likelihood
        self.linearize = linearize
        self.quotients = quotients
        self.logits = function(self.inputs) if logits is None else logits
        check_logits(self.logits, len(inputs), likelihood, name_of_call(function, inputs))
        if not self.logits.requires_grad:
            raise ValueError(_NO_PATH)
        self._std = None if std is None else std.to(inputs)
        self._jvp = linearize(function, self.inputs, self.logits)

    def starts(self, count: int) -> Tensor:
        r"""At most ``count`` vectors ``(B, count, K)``: :math:`L c` for the candidates :math:`c` of the likelihood."""
        logits = self.logits.detach()
        candidates = self.likelihood.candidates(logits, count)
        return torch.stack([self.likelihood.whiten(logits, direction) for direction in candidates.unbind(1)], 1)

    def labels(self, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw labels under the model, as ``(B, K)`` with :math:`A^\top w = D\,\nabla_x \log p(y|x)`."""
        return self.likelihood.labels(self.logits.detach(), generator)

    def apply(self, tangent: Tensor, *, exact: bool = False, slope: Tensor | None = None) -> Tensor:
        r"""``A v``: ``(B, d)`` to ``(B, K)``.

        Args:
            tangent: :math:`v`.
            exact: Whether the result must be exact up to rounding, even if a slope is given.
            slope: ``(B,)``, see :meth:`slope_along`. With it the result may be a :func:`difference_quotient`; the
                caller must measure its error.

        Returns:
            ``(B, K)``; the same arguments give the same numbers.
        """
        direction = self._rescale(tangent.view_as(self.inputs))
        if self.quotients and slope is not None and not exact:
            pushed = difference_quotient(self.function, self.inputs, self.logits, direction, slope)
        else:
            pushed = self._jvp(direction)
        return self.likelihood.whiten(self.logits.detach(), pushed.detach())

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """``Aᵀ u``: ``(B, K)`` to ``(B, d)``."""
        return self.slope(self.likelihood.unwhiten(self.logits.detach(), cotangent))

    def mv(self, vector: Tensor) -> Tensor:
        """``F v = Aᵀ (A v)``: ``(B, d)`` to ``(B, d)``."""
        return self.adjoint(self.apply(vector))

    def slope_along(self, cotangent: Tensor, row: Tensor) -> Tensor:
        r"""Return :math:`\|J^\top w\| / \|w\|` ``(B,)``, :math:`w = L^\top u`: slope of the logits along ``Aᵀ u``.

        Args:
            cotangent: :math:`u`, ``(B, K)``.
            row: :math:`A^\top u`, ``(B, d)``.

        Returns:
            At most the norm of :math:`J D`.
        """
        weights = self.likelihood.unwhiten(self.logits.detach(), cotangent)
        slope: Tensor = row.double().norm(dim=1) / weights.double().norm(dim=1).clamp_min(
            torch.finfo(weights.dtype).tiny
        )
        return slope.to(row.dtype)

    def slope(self, cotangent: Tensor, *, is_last: bool = False) -> Tensor:
        """``D Jᵀ w`` for a cotangent of the logits, ``(B, K)`` to ``(B, d)``, without gradient.

        Args:
            cotangent: ``w``.
            is_last: Whether to free the graph of the logits, which is then not usable any more.

        Returns:
            ``(B, d)``.
        """
        return self._pull(cotangent, retain_graph=not is_last)

    def logits_at(self, displacement: Tensor) -> Tensor:
        """Logits ``(B, K)`` at ``x + D v`` for ``v`` ``(B, d)``: one forward, with its graph to the parameters."""
        return self.function(self.inputs.detach() + self.in_input_units(displacement))

    def in_input_units(self, displacement: Tensor) -> Tensor:
        """Return ``D v`` ``(B, *S)`` for ``v`` ``(B, d)``: a displacement in the unit of the inputs."""
        return self._rescale(displacement.view_as(self.inputs))

    def pullback(self, cotangent: Tensor) -> Tensor:
        """:meth:`slope` with a graph, so that the result can be differentiated."""
        return self._pull(cotangent, create_graph=True)

    def restrict(self, keep: Tensor) -> InputFisher | None:
        """Return the operator of the examples at the indices ``keep`` ``(b,)``: one forward of these examples.

        Returns None if only the whole batch can be used: the function must not be called again
        (:func:`double_backward`), or it gives these examples other logits than in the whole batch.
        """
        return None if self.linearize is double_backward else self._at(keep)

    def split(self, max_examples: int) -> Iterator[InputFisher]:
        """Yield operators of parts of at most ``max_examples``; one forward per part if there are several.

        A function that takes only the whole batch is not split.

        Raises:
            ValueError: If the function takes some parts of the batch but not others.
        """
        for start in range(0, len(self.inputs), max_examples):
            part = self._at(slice(start, start + max_examples)) if len(self.inputs) > max_examples else None
            if part is None and start > 0:
                raise ValueError("The model gives other logits for a part of the batch. Pass smaller batches.")
            yield self if part is None else part
            if part is None:
                return

    def _at(self, index: Tensor | slice) -> InputFisher | None:
        function = self.function.part(index) if hasattr(self.function, "part") else self.function
        try:
            part = InputFisher(function, self.inputs[index], self.likelihood, self._std, self.linearize, self.quotients)
        except Exception:  # the user's forward may raise any error for a batch of another size
            return None
        agrees = torch.allclose(
            part.logits, self.logits[index], rtol=1e-3, atol=1e-3 * float(magnitude(self.logits).max())
        )
        return part if agrees else None

    def _pull(self, cotangent: Tensor, **options: bool) -> Tensor:
        (pulled,) = torch.autograd.grad(self.logits, self.inputs, cotangent, allow_unused=True, **options)
        if pulled is None:
            raise ValueError(_NO_PATH)
        return self._rescale(pulled).flatten(1)

    def _rescale(self, tangent: Tensor) -> Tensor:
        return tangent if self._std is None else tangent / self._std


_NO_PATH = (
    "The logits carry no gradient with respect to the inputs: no differentiable path leads from one to the other, so "
    "that every derivative would be zero. A part of the model runs under torch.no_grad(), detaches, or is quantised. "
    "To freeze weights use requires_grad_(False) on them instead of no_grad() in forward, or call the parts of the "
    "module without it: logits_fn=lambda module, x: ... in a callback, LogitsOf(module, logits_fn) elsewhere. For a "
    "model without derivatives use blackbox_spectral_norm."
)

_NO_SECOND_DERIVATIVE = (
    "The derivative of the logits with respect to the inputs cannot be differentiated again: a custom "
    "autograd.Function on the way computes its backward without a graph, as with @once_differentiable. Write its "
    "backward in differentiable operations, or use what needs first derivatives only: solver=Exact() for estimates, "
    "KLPenalty for training."
)
