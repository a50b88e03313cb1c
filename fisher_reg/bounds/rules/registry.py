"""The registry of the rules of modules, functions and methods.

The rule of a function gets a call with its arguments by name. An argument that the rule does not name is an error, and
so is a function without a rule. ATen operators, from :func:`torch.export`, are found by the name of their method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from fisher_reg.bounds.rules.call import Call, FunctionRule, layer_of, name_of
from fisher_reg.bounds.rules.layer import Gain, Rule
from fisher_reg.bounds.sensitivity import Sensitivity
from fisher_reg.errors import NoBoundError

RuleT = TypeVar("RuleT", bound=Rule)

_HOW_TO_REGISTER = (
    "Write\n"
    "    @fisher_reg.register_bound_rule(YourModule)\n"
    "    def _(module, layer):\n"
    "        return 1.0  # its Lipschitz constant"
)

_RULES: dict[type[nn.Module], Rule] = {}
FUNCTION_RULES: dict[Any, FunctionRule] = {}
"""From a function, or the name of a method, to its rule."""


def register_bound_rule(*module_types: type[nn.Module]) -> Callable[[RuleT], RuleT]:
    """Register a function as the bound rule of module types.

    A subclass inherits the rule unless it overrides ``forward``.

    The function takes the module and a :class:`Layer` and returns the module's Lipschitz constant (or a
    :class:`Gain`). The module is then one layer and is not traced into. A later registration replaces an earlier one.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        TypeError: For arguments that are not classes of modules, for no argument, and for a rule that is not callable.

    Example:
        >>> class Halve(nn.Module):
        ...     def forward(self, x):
        ...         return x / 2
        >>> @register_bound_rule(Halve)
        ... def _(module, layer):
        ...     return 0.5

        A learnable factor per channel is a diagonal map. Return it as a diagonal scaling: the next layer divides its
        weight by the scaling, so that the product is bounded as a whole. The largest modulus would also be valid, but
        is looser: it bounds every channel by the largest one.

        >>> from fisher_reg.bounds import diagonal_gain, lipschitz_bound
        >>> class ChannelScale(nn.Module):
        ...     def __init__(self, factors):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.tensor(factors))
        ...     def forward(self, x):
        ...         return x * self.weight.view(1, -1, 1, 1)
        >>> @register_bound_rule(ChannelScale)
        ... def _(module, layer):
        ...     return diagonal_gain(module.weight.view(1, -1, 1, 1), layer)
        >>> mix = nn.Conv2d(2, 2, 1)
        >>> _ = mix.weight.data.copy_(torch.tensor([[0.1, 0.0], [0.0, 1.0]]).view(2, 2, 1, 1))
        >>> model = nn.Sequential(ChannelScale([10.0, 1.0]), mix, nn.Flatten())
        >>> round(lipschitz_bound(model, torch.zeros(1, 2, 1, 1)).value, 6)  # |10 * 0.1|, not 10 * |mix|; centred
        1.0
    """
    for module_type in module_types:
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(f"register_bound_rule takes classes of modules; got {module_type!r}. {_HOW_TO_REGISTER}")
    if not module_types:
        raise TypeError(f"register_bound_rule needs the class that the rule is for. {_HOW_TO_REGISTER}")

    def decorate(rule: RuleT) -> RuleT:
        given: Any = rule
        if not callable(given) or (isinstance(given, type) and issubclass(given, nn.Module)):
            raise TypeError(f"A bound rule is a function of a module and its layer; got {given!r}. {_HOW_TO_REGISTER}")
        for module_type in module_types:
            _RULES[module_type] = rule
        return rule

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule of the module's class, or of the nearest base class with the same forward.

    There is no rule if the forward is overridden or replaced on the instance, or if a hook may change the input or the
    output. The hooks of torch's weight and spectral normalisation only set the weight and are allowed.
    """
    kind = type(module)
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    replaced = "forward" in vars(module)
    if replaced or not all(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks):
        return None
    return next((_RULES[base] for base in kind.__mro__ if base in _RULES and _same_forward(kind, base)), None)


def _same_forward(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))


def layer_name(module: nn.Module) -> str:
    """Return the name of the torch layer that the module is, or from which its class is derived."""
    return next(base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.nn."))


def no_rule(what: str, where: str) -> NoBoundError:
    """Return an error that describes the missing rule and how to add it."""
    return NoBoundError(
        f"No bound rule for {what} at '{where}' (or it has hooks, or another forward than its class). If you know its "
        f"Lipschitz constant, put it in a module and register a rule for that. {_HOW_TO_REGISTER}"
    )


def register(
    apply: Callable[[Call], Sensitivity | Gain],
    names: str | None,
    *targets: Any,
    is_layer: bool = False,
    shape_only: str = "",
    first_of_several: bool = False,
) -> None:
    """Register a rule for functions and for the names of methods.

    Args:
        apply: The rule.
        names: The names of the arguments in order, or None.
        *targets: The functions, and the names of the methods.
        is_layer: As in :class:`FunctionRule`.
        shape_only: The names of arguments whose values do not matter; ``*`` for all except the first.
        first_of_several: As in :class:`FunctionRule`.
    """
    known = None if names is None else tuple(names.split())
    rule = FunctionRule(apply, known, is_layer, tuple(shape_only.split()), first_of_several)
    FUNCTION_RULES.update(dict.fromkeys(targets, rule))


register_layer = partial(register, is_layer=True)
"""Register the rule of a layer of one input, which returns its gain."""


def find_function_rule(target: Any) -> FunctionRule | None:
    """Return the rule of a function, the name of a method, or an ATen operator."""
    if isinstance(target, torch._ops.OpOverload):
        return FUNCTION_RULES.get(name_of(target)) if target.namespace == "aten" else None
    if target in FUNCTION_RULES:
        return FUNCTION_RULES[target]
    module = getattr(target, "__module__", "") or ""
    return FUNCTION_RULES.get(name_of(target)) if module.startswith("torchvision.ops") else None


def as_module(build: Callable[..., nn.Module]) -> Callable[[Call], Gain]:
    """Return a rule of a function that reuses the rule of its module; the other arguments are the settings."""

    def module_form(call: Call) -> nn.Module:
        settings = {key: item.value for key, item in call.operands.items() if key not in ("input", "inplace")}
        return build(**{key: item for key, item in settings.items() if not (key == "stride" and item == [])})

    def rule_of_module(call: Call) -> Gain:
        if not isinstance(call.value, torch.Tensor):
            raise NoBoundError(f"{call.name} returns more than the pooled values.")
        module = module_form(call)
        found = find_rule(module)
        if found is None:
            raise NoBoundError(f"{call.name} has no rule for its module form {module}.")
        gain = found(module, layer_of(call))
        return gain if isinstance(gain, Gain) else Gain(gain)

    rule_of_module.module_form = module_form  # type: ignore[attr-defined]
    return rule_of_module
