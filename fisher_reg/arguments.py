"""Checks of arguments: an error for a class or a name instead of an object, with the line to write.

User-defined objects are accepted if they have the required methods.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Argument:
    """The requirements of an argument.

    Attributes:
        name: Name of the argument.
        examples: Possible expressions, the most common one first.
        methods: The required methods; if empty, the object must be callable.
        is_optional: Whether None is allowed.
    """

    name: str
    examples: tuple[str, ...]
    methods: tuple[str, ...] = ()
    is_optional: bool = False

    def check(self, value: object, owner: object = None) -> None:
        """Raise an error for an invalid value.

        Args:
            value: The argument.
            owner: An object, or the name of a function, to name in the message.

        Raises:
            TypeError: With the argument and the line to write.
        """
        if value is None and self.is_optional:
            return
        needed = self.methods or ("__call__",)
        is_class = isinstance(value, type) and (bool(self.methods) or self.name == "penalty" or _makes_callables(value))
        if is_class or not all(callable(getattr(value, method, None)) for method in needed):
            raise TypeError(f"{self._needs(owner, value)}; got {_given(value)}. Write {self._remedy(value)}.")

    def _needs(self, owner: object, value: object) -> str:
        kind = "an instance" if self.examples[0].endswith("()") else "a function"
        what = f"{kind} such as {self.examples[0]}"
        if self.methods and not isinstance(value, type | str):
            what += f", with {', '.join(self.methods)}"
        if owner is None:
            return f"{self.name} must be {what}"
        name = owner if isinstance(owner, str) else type(owner).__name__
        return f"{name} needs {self.name} to be {what}"

    def _remedy(self, value: object) -> str:
        written = self.examples[0]
        if isinstance(value, type) and all(hasattr(value, method) for method in self.methods):
            written = f"{value.__name__}()"
        elif isinstance(value, str) and value:
            meant = [example for example in self.examples if _alike(value, example)]
            written = meant[0] if meant else written
        if isinstance(value, str | int) and not self.methods:
            written = re.sub(r"\['\w+'\]", lambda _: f"[{value!r}]", written)  # the value is the key or the index
        return f"{self.name}={written}"


def _makes_callables(kind: type) -> bool:
    """Return whether the instances of a class are callable, so that the class itself is probably a mistake."""
    return any("__call__" in vars(base) for base in kind.__mro__)


def _alike(text: str, example: str) -> bool:
    plain, full = (part.lower().replace("_", "").replace("-", "") for part in (text, example))
    return plain in full


def _given(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"the string {value!r}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__}(...)"


SOLVER = Argument("solver", ("Lanczos()", "Exact()", "PowerIteration()", "HutchinsonMax()"), ("solve",), True)
SIGN_SOLVER = Argument("solver", ("SignIteration()",), ("maximize",), True)
EIGENPAIR_SOLVER = Argument("solver", ("Exact()", "Lanczos()"), ("eigenpairs",), True)
TRACE_ESTIMATOR = Argument("estimator", ("Hutchinson()", "Exact()"), ("trace",), True)
BLACK_BOX_ESTIMATOR = Argument("estimator", ("BlackBox()", "BlackBoxMax()"), ("check", "estimate"), True)
PROBE = Argument("probe", ("Rademacher()", "StandardNormal()", "SampledLabels()"), ("draw",))
LIKELIHOOD = Argument(
    "likelihood", ("Categorical()", "Bernoulli()", "Gaussian()", "MarginTempered()"), ("whiten", "unwhiten")
)
SCHEDULE = Argument("schedule", ("ConstantSchedule()", "LinearSchedule()", "CosineSchedule()"), ("factor",))
PENALTY = Argument(
    "penalty",
    (
        "KLPenalty()",
        "SpectralPenalty()",
        "TracePenalty()",
        "LabelContrastPenalty()",
        "GradientNormPenalty()",
        "NuclearNormPenalty()",
        "BoundPenalty()",
    ),
)
REDUCTION = Argument(
    "reduction",
    ("torch.mean", "torch.max", "torch.median", "functools.partial(torch.quantile, q=0.95)", "torch.sum", "torch.min"),
)
METRIC_REDUCTION = Argument("reduction", REDUCTION.examples, is_optional=True)
MODEL = Argument("model", ("network", "lambda x: x @ weight.T"))
INPUTS_FN = Argument("inputs_fn", ("lambda batch: batch['image']",), is_optional=True)
LOGITS_FN = Argument("logits_fn", ("lambda module, x: module(x)['logits']",), is_optional=True)
SIDE_INPUTS_FN = Argument("side_inputs_fn", ("lambda batch: (batch['mask'],)",))
CHOSEN_LOGITS_FN = Argument("logits_fn", LOGITS_FN.examples)
LABELS_FN = Argument("labels_fn", ("lambda batch: batch['label']",), is_optional=True)

_BOUND = Argument("bounds", ("fisher_bound", "local_fisher_bound", "blockwise_fisher_bound"))
_LEVELS = {"global": "fisher_bound", "local": "local_fisher_bound", "blockwise": "blockwise_fisher_bound"}


def check_bounds(bounds: object, owner: object) -> None:
    """Raise an error unless ``bounds`` are functions ``bound(model, inputs, likelihood=..., input_std=...)``.

    Raises:
        TypeError: With the argument and the line to write.
    """
    name = owner if isinstance(owner, str) else type(owner).__name__
    needs = f"{name} needs bounds to be a sequence of functions such as (fisher_bound, local_fisher_bound)"
    if bounds is None:
        raise TypeError(f"{needs}; got None. Write bounds=() for none.")
    if isinstance(bounds, str | Mapping) or not isinstance(bounds, Iterable):
        raise TypeError(f"{needs}; got {_name(bounds)}, not a sequence. Write bounds=({_bound_for(bounds)},).")
    for bound in bounds:
        if isinstance(bound, type) or not callable(bound):
            raise TypeError(f"{needs}; got {_given(bound)} in it. Write bounds=({_bound_for(bound)},).")
        if not _takes_what_a_bound_takes(bound):
            raise TypeError(
                f"{needs}; {_name(bound)} cannot be called as bound(model, inputs, likelihood=..., input_std=...). "
                "Write bounds=(fisher_bound,)."
            )


def _takes_what_a_bound_takes(bound: Any) -> bool:
    try:
        signature = inspect.signature(bound)
    except (TypeError, ValueError):  # a builtin has no signature
        return True
    try:
        signature.bind(None, None, likelihood=None, input_std=None)
    except TypeError:
        return False
    return True


def _bound_for(value: object) -> str:
    if isinstance(value, str):
        known = [example for example in _BOUND.examples if value and _alike(value, example)]
        return _LEVELS.get(value.lower(), known[0] if known else _BOUND.examples[0])
    return _name(value) if callable(value) and not isinstance(value, type) else _BOUND.examples[0]


def _name(value: object) -> str:
    return str(getattr(value, "__name__", None) or _given(value))


def check_tightening(tightening: object) -> None:
    """Raise an error unless the object has the fields of :class:`fisher_reg.Tightening`.

    Raises:
        TypeError: With the argument and the line to write.
    """
    if isinstance(tightening, type) or not all(hasattr(tightening, name) for name in ("folded", "dense", "merged")):
        raise TypeError(
            f"tightening must be an instance such as Tightening(); got {_given(tightening)}. "
            "Write tightening=Tightening()."
        )


def check_memory_budget(memory_budget: object, owner: object) -> None:
    """Raise an error unless the budget is a positive number of bytes or None.

    Raises:
        ValueError: With the argument and the line to write.
    """
    is_number = isinstance(memory_budget, int) and not isinstance(memory_budget, bool)
    if memory_budget is None or (is_number and memory_budget > 0):  # type: ignore[operator]
        return
    name = owner if isinstance(owner, str) else type(owner).__name__
    raise ValueError(
        f"{name} needs memory_budget to be a positive whole number of bytes, or None for the default; got "
        f"{_given(memory_budget)}. Write memory_budget=4 * 2**30 for 4 GiB."
    )
