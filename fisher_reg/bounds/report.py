"""The report of a bound: its value, and the share of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisher_reg.printing import examples, spread


@dataclass(frozen=True)
class BoundTerm:
    """The share of one layer.

    Attributes:
        name: Qualified name of the module.
        layer: Its type, with the layers merged into it.
        norm: Its Lipschitz constant, after absorbing the diagonal scalings of neighbouring layers; for a local bound
            the median over the examples.
        decades: Its share of ``log10_value``: the derivative of ``log10_value`` with respect to log10 of ``norm``,
            times log10 of ``norm``. The rest of ``log10_value`` comes from sums, copies and factors between layers.
    """

    name: str
    layer: str
    norm: float
    decades: float


@dataclass(frozen=True)
class UpperBound:
    """An upper bound with the shares of the layers.

    Attributes:
        level: ``"global"`` (from the weights alone), ``"local"`` (certified at the inputs), or ``"blockwise"``
            (estimated at the inputs).
        log10_value: Decimal logarithm of the bound, a number, or ``(B,)``, one per input; finite where the value itself
            would overflow.
        certified: Whether it is proven that the true value is not larger.
        terms: The shares of the layers, in the order of the forward pass; their mean over the inputs.
        domain: The inputs for which the bound holds.
        evidence: For bounds at inputs, the name of the smallest of several certified values, one per example:
            ``"exact"`` (all rows of the Jacobian), ``"interval"`` (of an estimate), ``"product"`` (of the layers'
            norms), ``"expansion"`` (of the Jacobian around the input), ``"global"``. Empty if there is only the
            product.
        candidates: Decimal logarithms ``(B,)`` of all these values, by name.
        failure_probability: Per example, over the random numbers of the solver; zero except for an ``"interval"``.
    """

    level: str
    log10_value: Any
    certified: bool
    terms: tuple[BoundTerm, ...]
    domain: str = "all inputs"
    evidence: tuple[str, ...] = ()
    failure_probability: float = 0.0
    candidates: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> Any:
        """The bound; infinite beyond the range of a double."""
        if isinstance(self.log10_value, Tensor):
            return 10**self.log10_value
        return 10**self.log10_value if self.log10_value < 308 else math.inf

    def __repr__(self) -> str:
        kind = f"{self.level}, {'certified' if self.certified else 'not certified'}"
        if isinstance(self.log10_value, Tensor):
            value = f"{examples(len(self.log10_value))}: log10_value {spread(self.log10_value)}"
        else:
            value = f"10^{self.log10_value:.4g}"
        return f"UpperBound({kind}, {value}; {len(self.terms)} layers, {self.domain})"

    def __str__(self) -> str:
        total = float(torch.as_tensor(self.log10_value).double().mean())
        shown = [term for term in self.terms if term.norm != 1.0 or term.decades != 0.0]
        width = max([len(term.name) for term in shown] + [len("between")])
        lines = [f"{'layer':{width}}  {'norm':>10}  decades  share"]
        for term in shown:
            share = f"{term.decades / total:6.1%}" if total else ""
            lines.append(f"{term.name:{width}}  {term.norm:10.4g}  {term.decades:7.2f} {share}  {term.layer}")
        rest = total - sum(term.decades for term in self.terms)
        lines.append(
            f"{'between':{width}}  {'':10}  {rest:7.2f} {rest / total if total else 0:6.1%}  sums, copies, factors"
        )
        largest = sorted(shown, key=lambda term: -term.decades)[:3]
        if largest and largest[0].decades > 0:
            lines.append("most to gain: " + ", ".join(term.name for term in largest if term.decades > 0))
        certificate = "certified" if self.certified else "not certified"
        if self.failure_probability:
            certificate += f" except with probability {self.failure_probability:g} per input"
        if self.evidence:
            counts = {name: self.evidence.count(name) for name in dict.fromkeys(self.evidence)}
            certificate += " (" + ", ".join(f"{name}: {count}" for name, count in counts.items()) + ")"
        average = "mean of " if isinstance(self.log10_value, Tensor) else ""
        lines.append(f"{self.level} bound {average}10^{total:.2f}, {certificate}, {self.domain}")
        return "\n".join(lines)
