"""Splitting of a batch into parts, so that the graph and the rows of a solver fit into a memory budget.

A pass without gradient frees each activation after the next layer has used it. A Fisher pass keeps the activations,
since each product with the transpose of A is a backward pass through the same graph. A batch that fits under
``no_grad`` may therefore not fit, and is split before its forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fisher_reg.errors import ForwardError, LogitsShapeError
from fisher_reg.evaluation import (
    InputStd,
    LogitsFunction,
    SideInputs,
    WithSideInputs,
    called,
    check_inputs,
    deployed,
    in_fast_layout,
    is_sharded,
    measured,
    name_of_call,
    select,
)
from fisher_reg.left_out import magnitude
from fisher_reg.likelihood import Likelihood
from fisher_reg.operator import InputFisher
from fisher_reg.outputs import check_logits
from fisher_reg.solvers import Exact

T = TypeVar("T")

DEFAULT_MEMORY_BUDGET = 4 * 2**30
"""Default number of bytes of graph and rows; on a CUDA device at most half of the free memory."""

_FEWEST_EXAMPLES = 16
"""Smaller batches are not measured: a trial costs the forwards of three examples, here at most 2 % of an estimate."""

_KEPT_PER_NUMBER = 1024
"""Assumed number of saved numbers per input number; a batch that fits with this assumption is not measured.

At 3 x 224 x 224 pixels the graphs of DenseNet-121 and ViT-B/16 save 112 and 123, ResNet-50 69; wide networks for small
images save more. In float32 and with the default budget, batches of more than 341 images of 3 x 32 x 32 are measured,
and all batches of 16 or more images of 3 x 224 x 224.
"""

_FREE_SHARE = 0.5


@dataclass(frozen=True)
class Batch:
    """The model, the inputs and the settings of an estimate.

    Attributes:
        opens: Opens the operator, given the other attributes.
        model: As in :func:`fisher_reg.fisher_spectral_norm`, like the following attributes.
        inputs: ``(B, *S)``.
        likelihood: The output distribution.
        input_std: Standard deviation of the input normalisation.
        side_inputs: More arguments of the model.
    """

    opens: Callable[..., AbstractContextManager[InputFisher]]
    model: LogitsFunction
    inputs: Tensor
    likelihood: Likelihood
    input_std: InputStd | None
    side_inputs: SideInputs

    def in_chunks(
        self,
        run: Callable[[InputFisher], T],
        method: Callable[[int], object],
        memory_budget: int | None,
        generator: torch.Generator | None = None,
        num_eigenpairs: int = 0,
    ) -> list[T]:
        """Return the result of ``run`` for each part of the batch; all parts draw the same random numbers.

        Args:
            run: Function of an operator.
            method: From the number of outputs to the solver or estimator, which determines the number of vectors.
            memory_budget: As in :func:`fisher_reg.fisher_spectral_norm`.
            generator: The generator of ``run``.
            num_eigenpairs: Number of vectors in memory in addition to those of the solver.

        Returns:
            A list, in the order of the examples.

        Raises:
            ValueError: As in :func:`fisher_reg.fisher_spectral_norm`.
        """
        check_inputs(self.inputs)
        budget = budget_on(self.inputs.device, memory_budget)

        def num_rows(num_outputs: int) -> int:
            return rows_of(method(num_outputs), num_outputs) + num_eigenpairs

        run = _restarted(run, generator)
        parts = self._parts(num_rows, budget)
        expected = self._logits() if len(parts) > 1 else torch.empty(0)
        results = list[T]()
        for part in parts if len(parts) > 1 else ():
            found = self._run_on(part, run, expected[part])
            if not found:  # correct numbers are more important than a small graph
                with self.operator() as fisher:
                    return [run(fisher)]
            results += found
        return results or self._run_whole(run, num_rows, budget)

    def operator(self, part: slice | None = None) -> AbstractContextManager[InputFisher]:
        """Open the operator of a part of the batch, or of the whole batch."""
        inputs, side_inputs = self.inputs, self.side_inputs
        if part is not None:
            inputs, side_inputs = inputs[part], select(side_inputs, part, len(inputs))
        return self.opens(self.model, inputs, self.likelihood, self.input_std, side_inputs)

    def _parts(self, num_rows: Callable[[int], int], budget: int) -> list[slice]:
        """Return parts that fit into the budget, according to a trial with two examples."""
        whole = [slice(len(self.inputs))]
        # with sharded weights each forward is a collective operation, and processes may have different batch sizes
        if is_sharded(self.model) or not is_worth_measuring(self.inputs, budget):
            return whole
        try:
            with self.operator(slice(2)) as two:
                per_example = bytes_per_example(two, num_rows(two.logits.shape[1]))
        except Exception:  # the user's forward may raise any error for two examples
            return whole
        return whole if per_example is None else sizes(len(self.inputs), per_example, budget)

    def _logits(self) -> Tensor:
        """Return the logits of the whole batch, without a graph."""
        with measured(self.inputs) as inputs, torch.no_grad():
            function = WithSideInputs(deployed(self.model, inputs), self.side_inputs, len(inputs))
            logits: Tensor = called(in_fast_layout(function, inputs), inputs)
        check_logits(logits, len(inputs), self.likelihood, name_of_call(function, inputs))
        return logits

    def _run_on(self, part: slice, run: Callable[[InputFisher], T], expected: Tensor) -> list[T]:
        """Run on a part; the list is empty if its logits differ from those in the whole batch."""
        try:
            with self.operator(part) as fisher:
                return [run(fisher)] if _agrees(fisher.logits, expected) else []
        except (ForwardError, LogitsShapeError):
            return []

    def _run_whole(self, run: Callable[[InputFisher], T], num_rows: Callable[[int], int], budget: int) -> list[T]:
        with self.operator() as fisher:
            if is_sharded(self.model):
                return [run(fisher)]
            row = fisher.inputs[0].numel() * fisher.inputs.itemsize
            most = max(1, budget // (num_rows(fisher.logits.shape[1]) * row))
            return list(map(run, fisher.split(most)))


def _restarted(run: Callable[[InputFisher], T], generator: torch.Generator | None) -> Callable[[InputFisher], T]:
    """Return ``run`` with a generator that is reset to its current state before each call, as for an unsplit batch."""
    if generator is None:
        return run
    state = generator.get_state()

    def restarted(fisher: InputFisher) -> T:
        generator.set_state(state)
        return run(fisher)

    return restarted


def _agrees(logits: Tensor, expected: Tensor) -> bool:
    return torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(magnitude(expected).max()))


def budget_on(device: torch.device, memory_budget: int | None) -> int:
    """Return the given number of bytes, else the default; without synchronisation."""
    if memory_budget is not None:
        return memory_budget
    if device.type != "cuda":
        return DEFAULT_MEMORY_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(DEFAULT_MEMORY_BUDGET, int(_FREE_SHARE * free)))


def is_worth_measuring(inputs: Tensor, budget: int) -> bool:
    """Whether a batch is so large that its graph could exceed the budget."""
    bytes_each = torch.promote_types(inputs.dtype, torch.float32).itemsize
    return len(inputs) >= _FEWEST_EXAMPLES and inputs.numel() * bytes_each * _KEPT_PER_NUMBER > budget


def bytes_per_example(two: InputFisher, num_rows: int) -> int | None:
    """Return the bytes that one more example adds to the graph and to the rows. Cost: the forward of one example.

    Memory that does not depend on the number of examples, such as the weights, is not counted.

    Args:
        two: The operator of two examples.
        num_rows: Number of vectors of ``d`` numbers that a solver stores per example.

    Returns:
        The bytes; None if a single example does not have the same logits as in a batch of two.
    """
    one = two.restrict(torch.tensor([0], device=two.inputs.device))
    if one is None:
        return None
    of_an_input = two.inputs[0].numel() * two.inputs.itemsize
    return max(graph_bytes(two.logits) - graph_bytes(one.logits), of_an_input) + num_rows * of_an_input


def sizes(count: int, per_example: int, budget: int) -> list[slice]:
    """Split ``count`` examples into the fewest parts within the budget, all of about the same size.

    Args:
        count: Number of examples.
        per_example: Bytes per example.
        budget: Largest number of bytes of a part; a part has at least one example.

    Returns:
        The parts, in order.

    Example:
        >>> sizes(7, per_example=10, budget=35)
        [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
    """
    most = max(1, budget // per_example)
    size = math.ceil(count / math.ceil(count / most))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def rows_of(method: object, num_outputs: int) -> int:
    """Return the number of vectors of ``d`` numbers that a solver or an estimator stores per example."""
    if isinstance(method, Exact):
        return num_outputs
    return int(getattr(method, "num_steps", _STEPS)) + 2  # one row per step, one for the start, and one product


_STEPS = 10


def graph_bytes(output: Tensor) -> int:
    """Return the bytes that the graph of a tensor saves for its backward pass, each storage counted once."""
    storages: dict[int, int] = {}
    seen: set[Any] = set()
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for tensor in _saved_by(node):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        nodes.extend(parent for parent, _ in node.next_functions)
    return sum(storages.values())


def _saved_by(node: Any) -> Iterator[Tensor]:
    names = [name for name in dir(node) if name.startswith("_saved_")]
    for saved in (*(getattr(node, name) for name in names), getattr(node, "saved_tensors", ())):
        for item in saved if isinstance(saved, list | tuple) else (saved,):
            if isinstance(item, Tensor) and item.layout == torch.strided:
                yield item
