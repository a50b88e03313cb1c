"""One rule per layer type: how much longer a perturbation can get in passing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fisher_reg.bounds.operator_norms.conv import Geometry
from fisher_reg.errors import NoBoundError

Number = float | Tensor


@dataclass(frozen=True)
class Tokens:
    r"""All vectors along the last axis lie in :math:`\{\gamma \odot y + \beta : \|y\| \le r\}`."""

    gamma: Tensor
    beta: Tensor
    radius: float


@dataclass(frozen=True)
class Ball:
    """All vectors ``v`` along the last axis have ``|v - c| <= radius`` for one ``c``, and ``|v| <= norm``.

    Where the vectors are parts of such, ``columns``, of the shape of the value, says which entries of ``c`` they meet.
    """

    radius: Tensor
    norm: Tensor
    columns: Tensor | None = None

    @property
    def of_tokens(self) -> Ball:
        """The same where the vectors along the axis before the last share their centre, else with the centre 0."""
        shared = self.columns is None or bool((self.columns == self.columns[..., :1, :]).all())
        return self if shared else Ball(self.norm, self.norm)


class Norms(Protocol):
    """How the norms of linear layers are computed."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the norm of a matrix ``(m, n)``, a scalar."""

    def convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the norm of a convolution, a scalar."""

    def transposed_convolution(self, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the norm of the adjoint of a convolution, a scalar."""


@dataclass(frozen=True)
class Gain:
    """What a layer does to perturbations, and what it makes sure of for the next layer.

    Attributes:
        norm: Lipschitz constant of the layer, Euclidean to Euclidean, with respect to all its inputs together; at the
            local level it may be that at each example, ``(B,)``.
        reach: The range of the output, where the layer bounds it.
        domain: For which inputs the constant holds, where it is not all of them.
        of_one_input: The constant is with respect to the one value that is passed in several places.
    """

    norm: Number
    reach: Tokens | Ball | None = None
    domain: str | None = None
    of_one_input: bool = False


@dataclass(frozen=True)
class ScaledGain(Gain):
    r"""A gain between scaled coordinates: from ``layer.scale * input`` to ``scale * output``.

    Attributes:
        scale: Positive, broadcastable to the output; None for 1.
    """

    scale: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """What a rule may know besides the module.

    Attributes:
        inputs: The tensors of the call by parameter name. At the global level only their shapes matter.
        output: What the module returned.
        reach: The range of the first input, where the layer before bounds it.
        sources: Where each input comes from: the name of the value in the graph, None if it does not depend on the
            network's input.
        is_local: Whether the constant is wanted at the given inputs, one per example, and not over all of them.
        scale: Coordinates of the first input, positive and broadcastable to it, None for 1: a diagonal map before this
            layer was not bounded by itself but is left to this layer.
        output_scale: Coordinates ``(C,)`` that are wanted of a linear layer's output channels, None for 1.
        norms: What computes the norms of weights.
    """

    inputs: Mapping[str, Tensor]
    output: Any
    norms: Norms
    reach: Tokens | Ball | None = None
    sources: Mapping[str, str | None] = field(default_factory=dict)
    is_local: bool = False
    scale: Tensor | None = None
    output_scale: Tensor | None = None

    @property
    def input(self) -> Tensor:
        """The first input."""
        return next(iter(self.inputs.values()))

    def scale_along(self, axis: int) -> Tensor:
        """Return coordinates that vary along one axis of the input only, ``(C,)``: the smallest over the others.

        A smaller scale is a smaller vector, so that what reaches the scaled input bounds it still.
        """
        size = self.input.shape[axis]
        if self.scale is None:
            return torch.ones(size, dtype=torch.float64, device=self.input.device)
        others = [other for other in range(self.input.ndim) if other != axis % self.input.ndim]
        return self.scale.expand(self.input.shape).amin(others) if others else self.scale.expand(self.input.shape)


Rule = Callable[[Any, Layer], "Number | Gain"]
RuleT = TypeVar("RuleT", bound=Rule)

_RULES: dict[type[nn.Module], Rule] = {}


def register_bound_rule(*module_types: type[nn.Module]) -> Callable[[RuleT], RuleT]:
    """Register a function as the bound rule of module types.

    A subclass inherits the rule as long as it does not override ``forward``.

    The function takes the module and a :class:`Layer` and returns the module's Lipschitz constant (or a
    :class:`Gain`). The module then counts as one layer and is not traced into. A later registration replaces an
    earlier one.

    Returns:
        A decorator that returns the function unchanged.

    Example:
        >>> class Halve(nn.Module):
        ...     def forward(self, x):
        ...         return x / 2
        >>> @register_bound_rule(Halve)
        ... def _(module, layer):
        ...     return 0.5
    """

    def decorate(rule: RuleT) -> RuleT:
        for module_type in module_types:
            _RULES[module_type] = rule
        return rule

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule of the module's class, or of the nearest base class, if it computes what that class computes.

    A forward that is overridden or replaced on the instance, or a hook that may change the input or the output, makes
    it another function. The hooks of torch's own weight and spectral normalisation only set the weight.
    """
    kind = type(module)
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    replaced = "forward" in vars(module)
    if replaced or not all(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks):
        return None
    return next((_RULES[base] for base in kind.__mro__ if base in _RULES and _same_forward(kind, base)), None)


def _same_forward(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))


def no_rule(what: str, where: str) -> NoBoundError:
    """Describe the missing rule and how to add it."""
    return NoBoundError(
        f"No bound rule for {what} at '{where}' (or it has hooks, or another forward than its class). If it has a "
        "Lipschitz constant that you know, put it in a module and register that:\n"
        "    @fisher_reg.register_bound_rule(YourModule)\n"
        "    def _(module, layer):\n"
        "        return 1.0  # its Lipschitz constant"
    )
