r"""The input-space Fisher matrix as an operator: :math:`F = A^\top A` per example, never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fisher_reg.forward import LogitsFunction, check_input_std
from fisher_reg.likelihood import Likelihood, check_logits

Jvp = Callable[[Tensor], Tensor]
Linearization = Callable[[LogitsFunction, Tensor, Tensor], Jvp]


def forward_mode(function: LogitsFunction, inputs: Tensor, logits: Tensor) -> Jvp:
    """Jacobian-vector products by dual numbers: about two forwards each, nothing stored.

    A network with an operation that has no forward-mode derivative gets :func:`double_backward` instead, which gives
    the same numbers at about twice the cost.

    Returns:
        The function that applies the Jacobian.
    """

    def push(tangent: Tensor) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs.detach(), tangent)
            pushed = forward_ad.unpack_dual(function(dual)).tangent
        return torch.zeros_like(logits) if pushed is None else pushed

    chosen: Jvp = push

    def jvp(tangent: Tensor) -> Tensor:
        nonlocal chosen
        try:
            return chosen(tangent)
        except NotImplementedError:
            chosen = double_backward(function, inputs, logits)
            return chosen(tangent)

    return jvp


def double_backward(function: LogitsFunction, inputs: Tensor, logits: Tensor) -> Jvp:
    r"""Jacobian-vector products :math:`J v = \partial_w \langle J^\top w, v\rangle` from the graph of ``logits`` alone.

    The function is not called again, so that dropout keeps the one mask that it drew.

    Returns:
        The function that applies the Jacobian.
    """
    cotangent = torch.zeros_like(logits, requires_grad=True)
    (pulled,) = torch.autograd.grad(logits, inputs, cotangent, create_graph=True)

    def jvp(tangent: Tensor) -> Tensor:
        if not pulled.requires_grad:
            return torch.zeros_like(logits)
        (pushed,) = torch.autograd.grad(pulled, cotangent, tangent, retain_graph=True, materialize_grads=True)
        return pushed

    return jvp


def vjp_only(function: LogitsFunction, inputs: Tensor, logits: Tensor) -> Jvp:
    """No Jacobian-vector products, for uses that need only the adjoint; nothing is prepared or stored."""

    def jvp(tangent: Tensor) -> Tensor:
        raise NotImplementedError("This operator was built for backward passes only; give it another linearize.")

    return jvp


class InputFisher:
    r"""Input-space Fisher matrices of a batch, one per example, through their whitened Jacobian.

    With logits :math:`z(x)`, :math:`J = \partial z / \partial x` and the factor :math:`L` of the likelihood,
    :math:`A = L J D` and :math:`F = A^\top A`, where :math:`D = \mathrm{diag}(1/\text{input\_std})` is the identity
    unless given. Vectors are flat: inputs ``(B, d)``, outputs ``(B, K)``. One ``adjoint`` is one backward pass, one
    ``apply`` one forward-mode pass.

    Args:
        function: Per-example function from ``(B, *S)`` to logits ``(B, K)``.
        inputs: ``(B, *S)``, floating point.
        likelihood: What the logits parametrise.
        input_std: Broadcastable to ``(B, *S)``; see :func:`fisher_reg.fisher_spectral_norm`.
        linearize: How ``apply`` differentiates: :func:`forward_mode` or :func:`double_backward`.

    Raises:
        ValueError: If the logits have a wrong shape, are not finite, or do not depend on the inputs.
    """

    def __init__(
        self,
        function: LogitsFunction,
        inputs: Tensor,
        likelihood: Likelihood,
        input_std: Tensor | None = None,
        linearize: Linearization = forward_mode,
    ) -> None:
        if input_std is not None:
            check_input_std(input_std)
        self.function = function
        self.inputs = inputs.detach().requires_grad_()
        self.likelihood = likelihood
        self.linearize = linearize
        self.logits = function(self.inputs)
        check_logits(self.logits, len(inputs), likelihood)
        if not self.logits.requires_grad:
            raise ValueError(
                "The logits carry no gradient with respect to the inputs. The model detaches them or runs under "
                "torch.no_grad(); remove that, or pass a function that does not."
            )
        self._std = None if input_std is None else input_std.to(inputs).expand_as(inputs)
        self._jvp = linearize(function, self.inputs, self.logits)

    @property
    def start(self) -> Tensor:
        r"""``(B, K)``: :math:`L c` with the contrast :math:`c` of the likelihood, which is near the top as a rule."""
        logits = self.logits.detach()
        return self.likelihood.whiten(logits, self.likelihood.contrast(logits)[0])

    def apply(self, tangent: Tensor) -> Tensor:
        """``A v``: ``(B, d)`` to ``(B, K)``."""
        pushed = self._jvp(self._rescale(tangent.view_as(self.inputs)))
        return self.likelihood.whiten(self.logits.detach(), pushed.detach())

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """``Aᵀ u``: ``(B, K)`` to ``(B, d)``."""
        pulled = self.pullback(self.likelihood.unwhiten(self.logits.detach(), cotangent))
        return pulled.detach()

    def pullback(self, cotangent: Tensor, *, create_graph: bool = False) -> Tensor:
        """``D Jᵀ w`` for a cotangent of the logits, ``(B, K)`` to ``(B, d)``, differentiable on request."""
        (pulled,) = torch.autograd.grad(
            self.logits, self.inputs, cotangent, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        return self._rescale(pulled).flatten(1)

    def split(self, max_examples: int) -> Iterator[InputFisher]:
        """Yield the operator in chunks of at most ``max_examples``; each but a single one costs its own forward."""
        if len(self.inputs) <= max_examples:
            yield self
            return
        for start in range(0, len(self.inputs), max_examples):
            chunk = slice(start, start + max_examples)
            std = None if self._std is None else self._std[chunk]
            yield InputFisher(self.function, self.inputs[chunk], self.likelihood, std, self.linearize)

    def _rescale(self, tangent: Tensor) -> Tensor:
        return tangent if self._std is None else tangent / self._std
