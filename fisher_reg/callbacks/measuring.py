"""Measure a probe on one or several processes: first values per example, then the numbers that are logged.

Each process measures its share. The values and the errors are exchanged once. Everything after that is a function of
the exchanged data, so that all processes log the same keys and numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn

from fisher_reg.callbacks import single_step
from fisher_reg.callbacks.batch import BoundFn
from fisher_reg.callbacks.probe import Part
from fisher_reg.errors import NoBoundError, NonFiniteError
from fisher_reg.evaluation import InputStd, is_sharded
from fisher_reg.geometry import Geometry, LInf
from fisher_reg.likelihood import Likelihood
from fisher_reg.measurement import measure
from fisher_reg.penalty import KLPenalty
from fisher_reg.solvers import Solver
from fisher_reg.summary import summarize
from fisher_reg.trace import Hutchinson

_TRACE = Hutchinson(num_samples=2)
_EXAMPLE_COLUMNS = ("eigenvalue", "trace", "is_wide", "kl_ratio")
NUM_PICTURES = 8
"""Number of the most sensitive examples that are kept for a figure."""


@dataclass(frozen=True)
class Subject:
    """The model, the examples and the settings of a measurement.

    Attributes:
        model: Returns the logits.
        parts: The part of the probe on this process.
        device: The device of the model.
        takes_parts: Whether the model takes a part of a batch, so that a failing example can be found by bisection.
        keeps_pictures: Whether the most sensitive images are kept.
        solver: As in :class:`fisher_reg.FisherMonitor`.
        likelihood: As in :class:`fisher_reg.FisherMonitor`.
        input_std: As in :class:`fisher_reg.FisherMonitor`.
        geometry: As in :class:`fisher_reg.FisherMonitor`.
        penalty: The single-step penalty that the network is trained with; None without one.
        memory_budget: As in :class:`fisher_reg.FisherMonitor`.
    """

    model: nn.Module
    parts: Sequence[Part]
    device: torch.device
    takes_parts: bool
    keeps_pictures: bool
    solver: Solver | None
    likelihood: Likelihood
    input_std: InputStd | None
    geometry: Geometry
    penalty: KLPenalty | None = None
    memory_budget: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the values measured for each example."""
        linf = ("linf",) if isinstance(self.geometry, LInf) else ()
        return _EXAMPLE_COLUMNS + linf + (() if self.penalty is None else single_step.COLUMNS)


@dataclass(frozen=True)
class Level:
    """The name and the kind of a bound, known after its first measurement.

    Attributes:
        name: ``global``, ``local``, …
        is_per_example: Whether there is one bound per input instead of one for all inputs.
    """

    name: str
    is_per_example: bool


@dataclass
class Values:
    """The measured values of one process, or of all processes.

    Attributes:
        places: ``(N,)``, the positions of the examples in the data.
        columns: Names to ``(N,)`` in double precision; NaN for an example that could not be measured.
        log10_bounds: Decimal logarithms of the bounds that hold for all inputs of a shape, by the number of the bound
            and that shape.
        shapes: The shapes of the examples.
        levels: From the number of a bound to its level.
        without_bound: Numbers of the bounds that do not exist for this network.
        seconds: From the number of a bound to its duration.
        troubles: Messages about failures, by their kind.
        pictures: The most sensitive images: ``(eigenvalue, place, image, eigenvector)``.
    """

    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    columns: dict[str, Tensor] = field(default_factory=dict)
    log10_bounds: dict[tuple[int, torch.Size], float] = field(default_factory=dict)
    shapes: set[torch.Size] = field(default_factory=set)
    levels: dict[int, Level] = field(default_factory=dict)
    without_bound: set[int] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    pictures: list[tuple[float, int, Tensor, Tensor]] = field(default_factory=list)

    def column(self, name: str) -> Tensor:
        """Return a column; NaN if no process has it."""
        return self.columns.get(name, torch.full((len(self.places),), torch.nan, dtype=torch.float64))

    def log10_bound(self, number: int) -> float:
        """Return the largest value of a bound over the input shapes, valid for all of them; NaN if one has no bound."""
        return max((self.log10_bounds.get((number, shape), math.nan) for shape in self.shapes), default=math.nan)


def measure_probe(subject: Subject) -> Values:
    """Measure the share of this process; a failure makes only the affected examples NaN.

    Returns:
        The values of this process, without bounds.
    """
    values = Values(shapes={part.inputs.shape[1:] for part in subject.parts})
    rows = [row for part in subject.parts for row in _rows(subject, _to(part, subject.device), values)]
    if rows:
        values.places = torch.cat([part.places for part in subject.parts])
        values.columns = {name: torch.cat([row[name] for row in rows]) for name in subject.columns}
    return values


def _rows(subject: Subject, part: Part, values: Values) -> list[dict[str, Tensor]]:
    """Measure some examples; if they fail together, each half separately."""
    try:
        return [_measured(subject, part, values)]
    except Exception as error:  # the user's forward may raise any error
        # with sharded weights each forward is a collective operation, so no process may retry alone
        if len(part) > 1 and subject.takes_parts and not is_sharded(subject.model):
            middle = len(part) // 2
            halves = part.part(slice(middle)), part.part(slice(middle, None))
            return [row for half in halves for row in _rows(subject, half, values)]
        kind = "" if isinstance(error, NonFiniteError) else f"{type(error).__name__}: "
        values.troubles.setdefault("examples", f"{kind}{error}")
        return [{name: torch.full((len(part),), torch.nan, dtype=torch.float64) for name in subject.columns}]


def _measured(subject: Subject, part: Part, values: Values) -> dict[str, Tensor]:
    measured = measure(
        subject.model,
        part.inputs,
        solver=subject.solver,
        estimator=_TRACE,
        likelihood=subject.likelihood,
        input_std=subject.input_std,
        side_inputs=part.side_inputs,
        geometry=subject.geometry,
        memory_budget=subject.memory_budget,
    )
    result = measured.result
    columns = [result.eigenvalue, measured.trace, ~result.converged, measured.kl_ratio]
    columns += [] if measured.linf is None else [measured.linf]
    on_host = _to_host(columns)
    if subject.keeps_pictures and part.inputs.ndim == 4 and part.inputs.shape[1] in (1, 3):
        values.pictures = _largest(values.pictures + _pictures(part, on_host[0], result.eigenvector))
    if subject.penalty is not None:
        on_host += single_step.after_steps(subject.model, part, subject.penalty, subject.takes_parts)
    return dict(zip(subject.columns, on_host, strict=True))


def _to_host(columns: Sequence[Tensor]) -> list[Tensor]:
    """Return columns ``(B,)`` in double precision on the CPU, in one transfer and with one synchronisation."""
    return list(torch.stack([column.to(columns[0]) for column in columns]).cpu().double())


def _pictures(part: Part, eigenvalue: Tensor, eigenvector: Tensor) -> list[tuple[float, int, Tensor, Tensor]]:
    """Return the most sensitive images of a part, given its eigenvalues on the CPU."""
    chosen = eigenvalue.topk(min(NUM_PICTURES, len(part))).indices
    here = chosen.to(part.inputs.device)
    shown = torch.stack([part.inputs.detach()[here], eigenvector.view_as(part.inputs)[here]]).float().cpu()
    numbers, places = eigenvalue[chosen].tolist(), part.places[chosen].tolist()
    # clones: a view would keep the whole part in memory and send it to the other processes
    return [(*found, image.clone(), v.clone()) for *found, image, v in zip(numbers, places, *shown, strict=True)]


def measure_bound(values: Values, number: int, bound: BoundFn, subject: Subject) -> None:
    """Measure a bound and add it to the values of this process; an error is recorded in ``troubles``."""
    begin = time.perf_counter()
    try:
        _add_bound(values, number, bound, subject)
    except NoBoundError as error:
        values.without_bound.add(number)
        values.troubles[f"bound {number}"] = f"leaves out a bound that does not exist for this network. {error}"
    except NonFiniteError as error:
        values.troubles["weights"] = f"logs no bound for an epoch. {error}"
    except Exception as error:  # a failing bound must not stop the training
        name = getattr(bound, "__name__", type(bound).__name__)
        values.troubles[f"bound {number}"] = f"leaves out {name}, which raised {type(error).__name__}: {error}"
    values.seconds[number] = time.perf_counter() - begin


def _add_bound(values: Values, number: int, bound: BoundFn, subject: Subject) -> None:
    is_measured, begin = values.column("eigenvalue").isfinite(), 0
    of_each = torch.full_like(values.column("eigenvalue"), torch.nan)
    for part in subject.parts:
        rows, key = slice(begin, begin := begin + len(part)), (number, part.inputs.shape[1:])
        # if no example was measured, try all, to get the error
        chosen = is_measured[rows] if bool(is_measured.any()) else ~is_measured[rows]
        if not bool(chosen.any()) or key in values.log10_bounds:
            continue
        inputs = part.inputs[chosen].to(subject.device)
        upper = bound(subject.model, inputs, likelihood=subject.likelihood, input_std=subject.input_std)
        values.levels[number] = Level(upper.level, isinstance(upper.log10_value, Tensor))
        if isinstance(upper.log10_value, Tensor):
            of_each[rows] = of_each[rows].masked_scatter(chosen, upper.log10_value.double().cpu())
            values.columns[_bound_column(number)] = of_each
        else:
            values.log10_bounds[key] = upper.log10_value


def exchange(values: Values, end: float, num_samples: int | None) -> Values:
    """Join the values of all processes; each example counts once, in the order of its position.

    Args:
        values: The values of this process.
        end: Positions from this one on are repetitions and do not count.
        num_samples: Largest number of examples, those with the lowest positions; None for all.

    Returns:
        The joined values, equal on all processes.
    """
    shares = [values]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares = [values] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, values)
    places = torch.cat([share.places for share in shares])
    names = dict.fromkeys(name for share in shares for name in share.columns)
    kept = _first_of_each(places, end)[:num_samples]
    counted = set(places[kept].tolist())
    joined = Values(
        places=places[kept],
        columns={name: torch.cat([share.column(name) for share in shares])[kept] for name in names},
        shapes=set().union(*(share.shapes for share in shares)),
        pictures=_largest([picture for share in shares for picture in share.pictures if picture[1] in counted]),
    )
    for rank, share in enumerate(shares):
        joined.levels |= share.levels
        joined.without_bound |= share.without_bound
        for key, log10_bound in share.log10_bounds.items():
            joined.log10_bounds[key] = max(log10_bound, joined.log10_bounds.get(key, -math.inf))
        for number, seconds in share.seconds.items():
            joined.seconds[number] = max(seconds, joined.seconds.get(number, 0.0))
        for kind, trouble in share.troubles.items():
            joined.troubles.setdefault(kind, f"{trouble} (on process {rank})" if rank else trouble)
    return joined


def _first_of_each(places: Tensor, end: float) -> Tensor:
    """Return the indices of the first occurrences, in ascending order of the positions below ``end``."""
    first: dict[int, int] = {}
    for index, place in enumerate(places.tolist()):
        if place < end:
            first.setdefault(place, index)
    return torch.tensor([first[place] for place in sorted(first)], dtype=torch.long)


def numbers(values: Values, levels: dict[int, Level]) -> dict[str, float]:
    """Return the numbers to log, by the last part of their key.

    Args:
        values: The joined values of all processes.
        levels: The known levels of all bounds; a bound that failed in this measurement is NaN.
    """
    eigenvalue = values.column("eigenvalue")
    is_measured = eigenvalue.isfinite()
    found = eigenvalue[is_measured]
    logged = _statistics("lambda_max", found)
    if "linf" in values.columns:
        logged |= _statistics("lambda_linf", values.column("linf")[is_measured])
    logged["trace_mean"] = _mean(values.column("trace")[is_measured])
    logged["wide_interval_share"] = _mean(values.column("is_wide")[is_measured])
    ratios = values.column("kl_ratio")
    logged["kl_ratio"] = float(summarize(ratios[ratios.isfinite()])["median"])
    if values.columns.keys() >= set(single_step.COLUMNS):
        logged["single_step_ratio"] = single_step.ratio(*map(values.column, single_step.COLUMNS))
    logged["num_left_out"] = float(len(eigenvalue) - len(found))
    for number in sorted(values.seconds.keys() & levels.keys()):
        logged |= _of_a_bound(values, number, levels[number], eigenvalue)
    return logged


def _statistics(name: str, found: Tensor) -> dict[str, float]:
    logged = {f"{name}_{statistic}": float(value) for statistic, value in summarize(found).items()}
    return logged | {f"log10_{name}_{which}": _log10(logged[f"{name}_{which}"]) for which in ("max", "median")}


def _of_a_bound(values: Values, number: int, level: Level, eigenvalue: Tensor) -> dict[str, float]:
    decades = eigenvalue.log10()
    if level.is_per_example:
        log10_bounds = values.column(_bound_column(number))
        gaps = log10_bounds - decades
        mean = {f"bound_{level.name}_mean": _mean((10**log10_bounds)[~log10_bounds.isnan()])}
        log10_bound, gap = _mean(log10_bounds[log10_bounds.isfinite()]), _mean(gaps[gaps.isfinite()])
    else:
        log10_bound = values.log10_bound(number)
        mean = {f"bound_{level.name}": 10**log10_bound if log10_bound < 308 else math.inf}
        finite = decades[decades.isfinite()]
        gap = log10_bound - float(finite.max()) if len(finite) else math.nan
    return mean | {
        f"log10_bound_{level.name}": log10_bound,
        f"log10_gap_{level.name}": gap,
        f"seconds_bound_{level.name}": values.seconds.get(number, math.nan),
    }


def _largest(pictures: list[tuple[float, int, Tensor, Tensor]]) -> list[tuple[float, int, Tensor, Tensor]]:
    """Return the pictures of the largest eigenvalues, each example once."""
    of_each = {picture[1]: picture for picture in pictures}
    return sorted(of_each.values(), key=lambda picture: (-picture[0], picture[1]))[:NUM_PICTURES]


def _bound_column(number: int) -> str:
    return f"log10_bound {number}"


def _to(part: Part, device: torch.device) -> Part:
    inputs, side_inputs = move_data_to_device((part.inputs, part.side_inputs), device)
    return Part(inputs, side_inputs, part.places)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


def with_names(known: Mapping[int, Level], found: Mapping[int, Level]) -> dict[int, Level]:
    """Return the levels of all bounds with unique names: a second ``global`` one gets its number as a suffix."""
    levels = dict(known)
    for number, level in sorted(found.items()):
        if number not in levels:
            is_taken = level.name in {other.name for other in levels.values()}
            name = f"{level.name}_{number + 1}" if is_taken else level.name
            levels[number] = Level(name, level.is_per_example)
    return levels


def messages(values: Values) -> dict[str, str]:
    """Return the warnings after a measurement, by their kind."""
    warnings = dict(values.troubles)
    if "examples" in warnings:
        left_out = int((~values.column("eigenvalue").isfinite()).sum())
        begin = f"leaves out {left_out} of the {len(values.places)} examples of its probe, which cannot be measured"
        warnings["examples"] = f"{begin}. The first failure: {warnings['examples']}"
    ratios = values.column("kl_ratio")
    ratios = ratios[ratios.isfinite()]
    if len(ratios) and ratios.median() < _MASKS:
        warnings["masking"] = _MASKING.format(float(ratios.median()))
    missed = single_step.warning(*map(values.column, single_step.COLUMNS))
    if missed is not None:
        warnings["single step"] = missed
    return warnings


_MASKS = 0.2
_MASKING = (
    "found gradient masking: along the top eigenvector, at the length of fisher_kl_ratio, the median divergence is "
    "{:.1%} of the value that the eigenvalue predicts. The eigenvalue then does not predict the effect of an attack. "
    "Use an attack, or blackbox_spectral_norm with a step of that length, instead."
)
