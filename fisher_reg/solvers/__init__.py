r"""Largest eigenvalues of :math:`F = A^\top A`, and its maximum over a cube, for a batch of operators at once.

The solvers use only ``apply`` (A), ``adjoint`` (its transpose) and start vectors, never a network. Each solver is a
frozen dataclass that holds its tolerances.

Public: all of ``__all__``.
"""

from fisher_reg.solvers.exact import Exact
from fisher_reg.solvers.hutchinson_max import HutchinsonMax
from fisher_reg.solvers.interval import Interval, RandomStart
from fisher_reg.solvers.lanczos import Lanczos
from fisher_reg.solvers.linalg import dense_rows, unit
from fisher_reg.solvers.power import PowerIteration
from fisher_reg.solvers.protocols import FactoredOperator
from fisher_reg.solvers.result import EigenpairSolver, EigenResult, Solver, TraceEstimator, concatenate
from fisher_reg.solvers.sign import SignIteration, SignResult

__all__ = [
    "EigenResult",
    "EigenpairSolver",
    "Exact",
    "FactoredOperator",
    "HutchinsonMax",
    "Interval",
    "Lanczos",
    "PowerIteration",
    "RandomStart",
    "SignIteration",
    "SignResult",
    "Solver",
    "TraceEstimator",
    "concatenate",
    "dense_rows",
    "unit",
]
