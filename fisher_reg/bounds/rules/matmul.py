r"""The bound rules of products of two matrices, of which one or both depend on the input.

:math:`d(A B) = dA\, B + A\, dB`, so that :math:`\|d(A B)\|_F \le \|B\|_2 \|dA\|_F + \|A\|_2 \|dB\|_F` with the largest
norm in the batch. Over a region the moduli of the entries of A are at most :math:`|A| + W` with the widths W, and the
norm increases with the moduli of the entries. Rows of norm at most l give :math:`\|A\|_2 \le \sqrt m\, l`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_reg.bounds.operator_norms.ranges import Interval, largest_entry, largest_length
from fisher_reg.bounds.rules.call import Call, Operand
from fisher_reg.bounds.rules.extents import largest_modulus, range_of, width_of, worst
from fisher_reg.bounds.rules.layer import Deviation, Gain
from fisher_reg.bounds.rules.linear import product_with
from fisher_reg.bounds.rules.registry import register
from fisher_reg.bounds.sensitivity import Sensitivity, log, log_sum, shifted
from fisher_reg.errors import NoBoundError

_ROUNDING = 1 + 1e-10


def _matmul(call: Call) -> Sensitivity | Gain:
    left, right = call.operands.values()
    if left.is_constant or right.is_constant:
        return product_with(call, left, right)
    return product(call, left, right, call.value)


def _shifted(call: Call) -> Sensitivity:
    """Bound ``beta * input + alpha * mat1 @ mat2``."""
    added, (left, right) = call.operands["input"], _factors(call)
    matrix = torch.matmul(left.value, right.value)
    terms = []
    if not added.is_constant:
        copies = call.value.numel() / added.value.numel()
        assert isinstance(added.sensitivity, Sensitivity)
        factor = abs(call.argument("beta", 1)) * copies**0.5
        terms.append(shifted(added.sensitivity.plain(), log(factor)))
    if not (left.is_constant and right.is_constant):
        multiplied = (
            product(call, left, right, matrix)
            if not (left.is_constant or right.is_constant)
            else _with_constant(call, left, right)
        )
        terms.append(shifted(multiplied, log(abs(call.argument("alpha", 1)))))
    return Sensitivity(log_sum(terms))


def _factors(call: Call) -> tuple[Operand, Operand]:
    names = [name for name in ("mat1", "batch1", "mat2", "batch2") if name in call.operands]
    return call.operands[names[0]], call.operands[names[1]]


def _with_constant(call: Call, left: Operand, right: Operand) -> Sensitivity:
    without = replace(call, operands={"input": left, "other": right}, value=torch.matmul(left.value, right.value))
    return product_with(without, left, right).after(without.sensitivity)


def product(call: Call, left: Operand, right: Operand, value: Tensor) -> Sensitivity:
    """Bound a product of matrices along the last two axes, both of which depend on the input."""
    if min(left.value.ndim, right.value.ndim) < 2:
        raise NoBoundError(f"{call.name} multiplies a vector; add a second axis to it.")
    if left.value.ndim != right.value.ndim or left.value.ndim < 3:  # the first axes are not those of one example
        left, right = replace(left, is_apart=False), replace(right, is_apart=False)
    sides = (left, _norms(right, call), value.shape[-1]), (right, _norms(left, call), value.shape[-2])
    terms = []
    for operand, norms, longer in sides:
        if not bool(norms.isfinite().all()):
            raise NoBoundError(
                f"{call.name} multiplies two values that depend on the input: it has a constant only at given inputs, "
                "over a domain, or if a normalisation directly before it bounds them."
            )
        shorter = operand.value.shape[-1 if operand is left else -2]
        copies = value.numel() * shorter / (longer * operand.value.numel())  # more than one if it is broadcast
        assert isinstance(operand.sensitivity, Sensitivity)
        terms.append(shifted(operand.sensitivity.plain(), log(norms) + 0.5 * math.log(copies)))
    return Sensitivity(log_sum(terms))


def _norms(operand: Operand, call: Call) -> Tensor:
    """Return the largest spectral norm of the matrices of each example ``(B,)``, or of all ``()``."""
    value = operand.value.double()
    if call.at_example:
        return worst(spectral_norms(value), operand, call)
    rows, columns = value.shape[-2:]
    of_range = math.sqrt(rows) * largest_length(range_of(operand), columns)
    largest = torch.as_tensor(of_range, dtype=torch.float64, device=value.device)
    if operand.around is None:
        return largest
    modulus = largest_modulus(operand, call)
    norms = torch.full_like(value[..., 0, 0], torch.inf)
    if bool(modulus.isfinite().all()):
        norms = torch.minimum(
            spectral_norms(modulus), spectral_norms(value) + spectral_norms(operand.around.width.contiguous())
        )
    return torch.minimum(worst(norms, operand, call), largest)


def spectral_norms(matrices: Tensor) -> Tensor:
    """Return the spectral norms of ``(..., m, n)``, rounded up; the matrices are scaled to avoid overflow."""
    size = matrices.abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    scaled = matrices / size
    if not bool(scaled.isfinite().all()):
        return torch.full_like(size[..., 0, 0], torch.inf)
    gram = scaled @ scaled.mT if scaled.shape[-2] <= scaled.shape[-1] else scaled.mT @ scaled
    largest: Tensor = torch.linalg.eigvalsh(gram)[..., -1]
    return largest.clamp_min(0).sqrt() * size[..., 0, 0] * _ROUNDING


def _width(call: Call) -> Tensor | None:
    left, right = call.operands.values()
    return product_width(left, right)


def product_width(left: Operand, right: Operand) -> Tensor | None:
    """Return the widths of ``A @ B``: ``|A| w_B + w_A |B| + w_A w_B``."""
    widths = width_of(left), width_of(right)
    if widths[0] is None or widths[1] is None:
        return None
    first, second = left.value.double().abs(), right.value.double().abs()
    moved: Tensor = first @ widths[1] + widths[0] @ (second + widths[1])
    return moved


def _shifted_width(call: Call) -> Tensor | None:
    added, (left, right) = width_of(call.operands["input"]), _factors(call)
    moved = product_width(left, right)
    if added is None or moved is None:
        return None
    total: Tensor = abs(call.argument("beta", 1)) * added + abs(call.argument("alpha", 1)) * moved
    return total


def _is_affine(call: Call) -> bool:
    if call.function == "einsum":
        factors: Iterable[Operand] = _operands(call)[1:]
    else:
        factors = _factors(call) if call.function in ("addmm", "baddbmm") else call.operands.values()
    return sum(not item.is_constant for item in factors) <= 1


@dataclass(frozen=True)
class _Pattern:
    """An einsum of two operands as a product of stacks of matrices: the labels of its axes."""

    left: str
    right: str
    output: str
    stack: str
    summed: str
    rows: str
    columns: str


def _pattern(equation: str, left: Tensor, right: Tensor, name: str) -> _Pattern:
    refusal = NoBoundError(f"{name}: the pattern {equation!r} is not a product of matrices and has no bound rule.")
    text = equation.replace(" ", "")
    if "->" not in text or text.split("->")[0].count(",") != 1:
        raise refusal
    inputs, output = text.split("->")
    first, second = inputs.split(",")
    if "..." in text:  # the axes of the ellipsis get unused letters
        spare = [letter for letter in "αβγδεζηθ" if letter not in text]
        counts = [item.ndim - len(labels.replace("...", "")) for item, labels in ((left, first), (right, second))]
        counts = [count if "..." in labels else 0 for count, labels in zip(counts, (first, second), strict=True)]
        fill = ["".join(spare[max(counts) - count : max(counts)]) for count in counts]
        first, second = first.replace("...", fill[0]), second.replace("...", fill[1])
        output = output.replace("...", "".join(spare[: max(counts)]))
    sizes = [dict(zip(labels, item.shape, strict=False)) for labels, item in ((first, left), (second, right))]
    shared = set(first) & set(second)
    alike = all(sizes[0][label] == sizes[1][label] for label in shared)
    unique = all(len(set(labels)) == len(labels) for labels in (first, second, output))
    only = (set(first) | set(second)) - shared
    if not (alike and unique and only <= set(output) and set(output) <= set(first) | set(second)):
        raise refusal
    return _Pattern(
        *(first, second, output),
        stack="".join(label for label in first if label in shared and label in output),
        summed="".join(label for label in first if label in shared and label not in output),
        rows="".join(label for label in first if label not in shared),
        columns="".join(label for label in second if label not in shared),
    )


def _as_matrices(value: Tensor, labels: str, groups: tuple[str, str, str]) -> Tensor:
    order = [labels.index(label) for label in "".join(groups)]
    sizes = [math.prod(value.shape[labels.index(label)] for label in group) for group in groups]
    return value.permute(order).reshape(sizes)


def _operands(call: Call) -> tuple[_Pattern, Operand, Operand]:
    operands = list(call.operands.values())
    if len(operands) > 1 and operands[1].items:
        operands = [operands[0], *operands[1].items]
    if len(operands) != 3 or not isinstance(operands[0].value, str):
        raise NoBoundError(f"{call.name} has a bound rule for two operands.")
    _, left, right = operands
    return _pattern(operands[0].value, left.value, right.value, call.name), left, right


def _einsum(call: Call) -> Sensitivity:
    pattern, left, right = _operands(call)
    if left.is_constant or right.is_constant:
        constant, source = (left, right) if left.is_constant else (right, left)
        labels, own = (pattern.left, pattern.rows) if left.is_constant else (pattern.right, pattern.columns)
        matrices = _as_matrices(constant.value.double(), labels, (pattern.stack, own, pattern.summed))
        assert isinstance(source.sensitivity, Sensitivity)
        return Sensitivity(shifted(source.sensitivity.plain(), log(spectral_norms(matrices).amax())))
    first = pattern.left[:1]
    is_apart = bool(first) and first == pattern.right[:1] == pattern.output[:1]
    groups = (pattern.stack, pattern.rows, pattern.summed), (pattern.stack, pattern.summed, pattern.columns)
    first_stack, second_stack = (
        _stacked(operand, labels, group, is_apart)
        for operand, labels, group in zip((left, right), (pattern.left, pattern.right), groups, strict=True)
    )
    return product(call, first_stack, second_stack, torch.matmul(first_stack.value, second_stack.value))


def _stacked(operand: Operand, labels: str, groups: tuple[str, str, str], is_apart: bool) -> Operand:
    def moved(value: Tensor) -> Tensor:
        matrices = _as_matrices(value, labels, groups)
        return matrices.view(len(value) if is_apart else 1, -1, *matrices.shape[1:])

    deviation = operand.around
    if deviation is not None:
        deviation = Deviation(moved(deviation.width), deviation.length)
    sensitivity = operand.sensitivity
    if isinstance(sensitivity, Sensitivity) and sensitivity.range is not None and not operand.is_constant:
        size = largest_entry(sensitivity.range)  # the vectors along the last axis may have changed
        is_kept = groups[2] == labels[-1:]
        sensitivity = sensitivity if is_kept else replace(sensitivity, range=Interval(-size, size))
    return Operand(moved(operand.value), sensitivity, None, deviation, operand.is_apart and is_apart)


def _einsum_width(call: Call) -> Tensor | None:
    _, left, right = _operands(call)
    widths = width_of(left), width_of(right)
    if widths[0] is None or widths[1] is None:
        return None
    equation = next(iter(call.operands.values())).value
    first, second = left.value.double().abs(), right.value.double().abs()
    moved: Tensor = torch.einsum(equation, first, widths[1]) + torch.einsum(equation, widths[0], second + widths[1])
    return moved


def register_rules() -> None:
    """Register the rules of this family."""
    register(_matmul, "input other", operator.matmul, torch.matmul, "matmul")
    register(_matmul, "input mat2", torch.mm, torch.bmm, "mm", "bmm")
    register(_shifted, "input mat1 mat2 beta alpha", torch.addmm, "addmm")
    register(_shifted, "input batch1 batch2 beta alpha", torch.baddbmm, "baddbmm")
    register(_einsum, None, torch.einsum, "einsum")
    for rule, width in ((_matmul, _width), (_shifted, _shifted_width), (_einsum, _einsum_width)):
        rule.width, rule.is_affine = width, _is_affine  # type: ignore[attr-defined]
